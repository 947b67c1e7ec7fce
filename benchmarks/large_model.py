"""A random model of a large one's shape, and what each stage takes of memory and time on it when it is read layer
by layer: `python benchmarks/large_model.py make FOLDER --layers 32`, then `... STAGE FOLDER`, a stage a process,
so that its peak is its own. Bytes for words: any text will do, and its ids fit any vocabulary.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

NAMES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32000),
    "llama-3-8b": (4096, 14336, 32, 8, 128256),
    "llama-3-70b": (8192, 28672, 64, 8, 128256),
    "small": (256, 512, 4, 4, 512),
}
SETUP = """
import runpy, sys, torch
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, RefineSpec, recipe_of
folder, name = sys.argv[1:3]
model, text = ModelSpec(source=folder), CorpusSpec(name=name)
calibration = text.with_(split="calibration")
"""
COMMAND = """
sys.argv = ["dfrot-lab", *{words!r}, "--corpus", name, "--model", folder]
try:
    runpy.run_module("dfrot_lab", run_name="__main__", alter_sys=True)
except SystemExit as end:
    if end.code:
        raise
"""
REFINE = """
from dfrot_lab.rotate.dfrot import refined
capture = CaptureSpec(model=model, corpus=calibration)
refined(RefineSpec(capture=capture, rows=8192, steps=20, rule="nr_error_8.5"))
"""
GPTQ = """
from dfrot_lab.score.build import build
spec = recipe_of("4-16-16", model=model, corpus=text, windows=1)
build(spec.with_(weights=spec.weights.with_(windows=4, corpus=calibration)), Store())
"""
EXPORT = """
import tempfile
with tempfile.TemporaryDirectory(dir=folder + "/..") as out:
    sys.argv = ["dfrot-lab", "export", *{words!r}, "--out", out + "/made", "--corpus", name, "--model", folder]
    try:
        runpy.run_module("dfrot_lab", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""
PEAK = """
if torch.cuda.is_available():
    print(f"peak on the GPU: {torch.cuda.max_memory_reserved() / 1e9:.2f} GB")
"""
RTN = ["evaluate", "--rotation", "RH", "--bits", "4-4-4", "--weights", "rtn", "--windows", "2"]
STAGES = {
    "evaluate": COMMAND.format(words=RTN),
    "capture": COMMAND.format(words=["capture"]),
    "refine": REFINE,
    "gptq": GPTQ,
    "hf": EXPORT.format(words=["--to", "hf", "--dtype", "bfloat16"]),
    "compressed": EXPORT.format(
        words=["--to", "compressed-tensors", "--bits", "4-16-16", "--weights", "rtn", "--dtype", "bfloat16"]
    ),
    "gguf": EXPORT.format(words=["--to", "gguf", "--kind", "Q8_0"]),
}


def make(folder: Path, shape: str, layers: int) -> None:
    """Write a bfloat16 model, a shard a layer, values of standard deviation 0.02, made from a seed."""
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from dfrot_lab.model.checkpoint import part_of
    from dfrot_lab.model.families import FAMILIES
    from dfrot_lab.model.files import INDEX

    config = LlamaConfig(**dict(zip(NAMES, SHAPES[shape], strict=True)), num_hidden_layers=layers, max_position_embeddings=4096, dtype="bfloat16",
                         architectures=["LlamaForCausalLM"], bos_token_id=None, eos_token_id=None)  # fmt: skip
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    roles, generator, places = FAMILIES["LlamaForCausalLM"], torch.Generator(device).manual_seed(0), {}
    for part in (-1, *range(layers), -2):
        tensors = {}
        for name, empty in model.named_parameters():
            if part_of(name, roles) == part:
                values = (
                    torch.ones(empty.shape)
                    if "norm" in name
                    else torch.randn(empty.shape, generator=generator, device=device) * 0.02
                )
                tensors[name] = values.bfloat16().cpu()
        save_file(tensors, folder / f"model-{part + 2:03d}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(tensors, f"model-{part + 2:03d}.safetensors")
        print(f"part {part}: {sum(x.nbytes for x in tensors.values()) / 1e9:.2f} GB", flush=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def measure(folder: Path, stage: str, corpus: str) -> None:
    """Run one stage in a process of its own; its seconds and its peak resident memory."""
    started = time.perf_counter()
    code = SETUP + STAGES[stage] + PEAK
    subprocess.run([sys.executable, "-c", code, str(folder), corpus], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{stage} of {folder.name}: {time.perf_counter() - started:.0f} s, peak {peak:.2f} GB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", *STAGES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--corpus", default="wikipedia-sample")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.shape, given.layers)
    else:
        measure(given.folder, given.what, given.corpus)
