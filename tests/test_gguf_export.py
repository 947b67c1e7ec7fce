"""A GGUF file is what was rotated: real llama.cpp finds transformers' probabilities in it, the lab reads the values
it put there, and nothing of the header that it came from is lost.
"""

import json
import sys
from pathlib import Path

import gguf as package
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_writer import write_gguf
from safetensors.torch import load_file, save_file
from test_export import ask, spec_of
from test_stream import TOKENS
from torch import Tensor
from transformers import AutoModelForCausalLM

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export import gguf, hf, llama_cpp
from dfrot_lab.model import checkpoint, loading
from dfrot_lab.recipe.specs import ModelSpec, Recipe

LETTER = 56  # a token that llama.cpp is made to say: half a character has no probabilities to show
PROMPTS = [[40, 50, 60, 70], [90, 33, 41, 100, 101, 102, 103, 104, 105], list(range(35, 67))]


def of_case(tmp_path: Path, text_file: Path, case: str) -> Recipe:
    """A recipe of a tiny model whose tokenizer merges, as llama.cpp wants one to: h and e, in place of a byte."""
    recipe = spec_of(tmp_path, text_file, case, dtype="float32")
    path = tmp_path / "original" / "tokenizer.json"
    said = json.loads(path.read_text())
    words = said["model"]["vocab"]
    rarest = next(word for word, number in words.items() if number == 255)
    said["model"] |= {"vocab": {("he" if word == rarest else word): n for word, n in words.items()}}
    said["model"] |= {"merges": [["h", "e"]]}
    path.write_text(json.dumps(said))
    return recipe


@pytest.fixture
def tiny(tmp_path, text_file) -> Recipe:
    return of_case(tmp_path, text_file, "llama")


def file_of(folder: Path) -> Path:
    return sorted(folder.glob("*.gguf"))[0]


def by_llama_cpp(path: Path, prompts: list[list[int]], words: int) -> Tensor:
    """The log-probabilities (prompts, words) of what follows each prompt, by llama.cpp itself."""
    server, found = llama_cpp.server(path), torch.full((len(prompts), words), torch.nan)
    for row, prompt in zip(found, prompts, strict=True):
        request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "logit_bias": [[LETTER, 100]]}
        answer = server.handle_completions(request | {"logprobs": True, "n_probs": words})
        for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[each["id"]] = each["logprob"]
    return found


@torch.inference_mode()
def by_transformers(folder: Path, prompts: list[list[int]]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts])


def logits(model, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids).logits


IDS = torch.arange(3 * 40).reshape(3, 40) * 7 % 90 + 32


# ---- real llama.cpp


@pytest.mark.parametrize("case", ["llama", "llama 3", "llama with biases", "qwen2", "qwen3"])
def test_llama_cpp_finds_the_probabilities_of_the_original(case, tmp_path, text_file, store):
    folder = gguf.export(of_case(tmp_path, text_file, case), tmp_path / "made", store, kind="F32")
    wanted = by_transformers(tmp_path / "original", PROMPTS)
    found = by_llama_cpp(file_of(folder), PROMPTS, wanted.shape[1])
    assert not found.isnan().any()
    assert float((found - wanted).abs().max()) < 1e-3


# ---- what lies in it


def read(path: Path) -> dict[str, tuple[Kind, np.ndarray]]:
    """Every tensor of a file: what it is written as, and its values."""
    tensors = package.GGUFReader(path).tensors
    return {x.name: (x.tensor_type, np.array(package.dequantize(x.data, x.tensor_type))) for x in tensors}


def header(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in package.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_the_lab_reads_the_rotated_model_again(case, tmp_path, text_file, store):
    recipe = of_case(tmp_path, text_file, case)
    path = file_of(gguf.export(recipe, tmp_path / "made", store, kind="F32"))
    again = loading.load_model(ModelSpec(source=str(path)), store)
    rotated = loading.load_model(ModelSpec(source=str(hf.export(recipe, tmp_path / "hf", store))), store)
    held = dict(rotated.model.named_parameters())
    for name, x in again.model.named_parameters():
        assert torch.equal(x, held[name]), name
    text = "the sheep went over the hill; 12 goats"
    assert again.tokenizer(text)["input_ids"] == rotated.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", [*gguf.KINDS, "Q6_K", "IQ4_NL"])
def test_each_kind_holds_the_rotated_weights_rounded_to_it(kind, tmp_path, text_file, store):
    recipe = of_case(tmp_path, text_file, "llama")
    full = read(file_of(gguf.export(recipe, tmp_path / "full", store, kind="F32")))
    made = read(file_of(gguf.export(recipe, tmp_path / "made", store, kind=kind)))
    assert made.keys() == full.keys() and made["output_norm.weight"][0] == Kind.F32
    few = kind not in ("F32", "F16", "BF16", "Q8_0")
    for name, (to, values) in made.items():
        wide = values.ndim == 2
        block = package.GGML_QUANT_SIZES[Kind[kind]][0]
        expected = Kind.Q8_0 if few and name in gguf.ENDS else Kind[kind]
        if values.shape[-1] % (block if expected == Kind[kind] else 32):
            expected = Kind.Q8_0  # of 64 and 96 channels, which no block of 256 divides
        assert to == (expected if wide else Kind.F32), name
        error = np.linalg.norm(values - full[name][1]) / np.linalg.norm(full[name][1])
        bits = 8 * package.GGML_QUANT_SIZES[to][1] / package.GGML_QUANT_SIZES[to][0]
        assert error <= (0 if to == Kind.F32 else 2 * 2.0 ** -min(bits - 1, 8)), (name, error)


def test_a_model_out_of_a_gguf_file_takes_its_header_along(tmp_path, text_file, store):
    """Each key as it was, lists and all, but what a file says of itself; the head is written apart."""
    of = of_case(tmp_path, text_file, "llama")
    said = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "tokenizer.chat_template": "{{ x }}"}
    said |= {"tokenizer.ggml.bos_token_id": 7, "tokenizer.ggml.tags": ["a", "b"]}
    source = tmp_path / "source.gguf"
    write_gguf(source, loading.load_model(of.model, store), said=said)
    recipe = of.with_(model=ModelSpec(source=str(source)))
    path = file_of(gguf.export(recipe, tmp_path / "made", store, kind="Q8_0"))
    before, after = header(source), header(path)
    assert {name for name in before if name not in after} == set()
    own = {"GGUF.tensor_count", "GGUF.kv_count", "general.file_type", "general.quantization_version"}
    assert {name: after[name] for name in before.keys() - own} == {n: before[n] for n in before.keys() - own}
    assert after["general.file_type"] == int(package.LlamaFileType.MOSTLY_Q8_0)


def test_large_files_are_split_as_llama_cpp_reads_them(tmp_path, text_file, store, monkeypatch):
    monkeypatch.setattr(gguf, "SPLIT_BYTES", 100_000)
    folder = gguf.export(of_case(tmp_path, text_file, "llama"), tmp_path / "made", store, kind="F32")
    files = sorted(folder.glob("*.gguf"))
    assert len(files) > 2 and files[0].name.endswith(f"-00001-of-{len(files):05d}.gguf")
    wanted = by_transformers(tmp_path / "original", PROMPTS[:1])
    assert float((by_llama_cpp(files[0], PROMPTS[:1], 256) - wanted).abs().max()) < 1e-3
    assert f"finds the other {len(files) - 1} files" in (folder / "README.md").read_text()


def test_a_model_read_layer_by_layer_is_written_the_same(tiny, tmp_path, store, monkeypatch):
    whole = file_of(gguf.export(tiny, tmp_path / "whole", store, kind="Q4_0"))
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    parts = file_of(gguf.export(tiny, tmp_path / "parts", Store(tmp_path / "other"), kind="Q4_0"))
    assert whole.read_bytes() == parts.read_bytes()


# ---- what cannot be one


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("gemma", "the model's family must be one of LlamaForCausalLM, .*; got GemmaForCausalLM"),
        ("mistral", "sliding_window in config.json must be null .*; got 8"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(case, said, tmp_path, text_file, store):
    with pytest.raises(ValueError, match=said):
        gguf.export(spec_of(tmp_path, text_file, case), tmp_path / "made", store)
    assert not (tmp_path / "made").exists() and not store.list()


def test_rope_of_another_form_is_refused(tiny, tmp_path, store):
    path = tmp_path / "original" / "config.json"
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": rope}))
    with pytest.raises(
        ValueError, match=r"rope_type in config.json must be default, linear or llama3 .*; got yarn"
    ):
        gguf.export(tiny, tmp_path / "made", store)


@pytest.mark.parametrize(
    "change",
    [
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "a+"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            }
        },
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"byte_fallback": True}},
        {"model": {"ignore_merges": True}},
    ],
    ids=["cut", "prefix", "no regex", "lower", "bytes", "merges"],
)
def test_a_tokenizer_that_llama_cpp_is_not_known_to_have_is_refused(change, tiny, tmp_path, store):
    path = tmp_path / "original" / "tokenizer.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {k: said[k] | v if k == "model" else v for k, v in change.items()}))
    rule = r"the tokenizer must be a byte-level one as llama.cpp is known to have it .*; got BPE"
    with pytest.raises(ValueError, match=rule):
        gguf.export(tiny, tmp_path / "made", store)
    assert not (tmp_path / "made").exists()


def test_biases_that_llama_cpp_does_not_read_are_refused(tmp_path, text_file, store):
    recipe = of_case(tmp_path, text_file, "qwen3")
    path = tmp_path / "original" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    with pytest.raises(ValueError, match=r"attention_bias in config.json must be false for Qwen3ForCausalLM"):
        gguf.export(recipe, tmp_path / "made", store)


def test_the_card_counts_what_fell_back(tiny, tmp_path, store):
    card = (gguf.export(tiny, tmp_path / "made", store, kind="Q4_K") / "README.md").read_text()
    assert "Of its matrices 23 Q8_0: embedding and head have 8 bits at least" in card


def test_a_weight_that_f16_cannot_hold_is_refused(tiny, tmp_path, store):
    recipe = tiny.with_(rotation=tiny.rotation.with_(kind="NR"))
    weights = load_file(tmp_path / "original" / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = 2e5
    save_file(weights, tmp_path / "original" / "model.safetensors", {"format": "pt"})
    rule = r"--kind must be F32 or BF16, where a weight is larger than 65,504, .*; got F16, and 200,000 in "
    with pytest.raises(ValueError, match=rule):
        gguf.export(recipe, tmp_path / "made", store)
    assert not (tmp_path / "made").exists()
    gguf.export(recipe, tmp_path / "made", store, kind="BF16")


def test_a_kind_is_one_of_those_there_are(tiny, tmp_path, store, monkeypatch):
    with pytest.raises(ValueError, match=r"--kind must be one of F32, .*NVFP4; got Q4_9"):
        gguf.export(tiny, tmp_path / "made", store, kind="Q4_9")
    monkeypatch.setitem(sys.modules, "libgguf", None)
    with pytest.raises(ValueError, match=r"--kind Q6_K needs the package libgguf, .*: pip install libgguf"):
        gguf.export(tiny, tmp_path / "made", store, kind="Q6_K")
    assert not (tmp_path / "made").exists()


def test_llama_cpp_answers_or_says_why_not(tmp_path, text_file, store, monkeypatch):
    file = file_of(gguf.export(of_case(tmp_path, text_file, "llama"), tmp_path / "made", store))
    assert isinstance(llama_cpp.answer(file, "the sheep", tokens=4), str)
    (tmp_path / "no.gguf").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"llama.cpp cannot load .*no.gguf"):
        llama_cpp.answer(tmp_path / "no.gguf", "the sheep")
    monkeypatch.setattr(llama_cpp, "is_here", lambda: False)
    with pytest.raises(ValueError, match=r"xllamacpp must be installed: pip install xllamacpp"):
        llama_cpp.server(file)


def test_the_command(tmp_path, text_file, monkeypatch):
    of_case(tmp_path, text_file, "llama")
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    of = ["--model", str(tmp_path / "original"), "--corpus", str(text_file), "--window", str(TOKENS)]
    found = ask(*of, "--to", "gguf", "--kind", "Q8_0", "--out", str(tmp_path / "made"), "--json")
    assert found.exit_code == 0, found.output
    assert {p.name for p in (tmp_path / "made").iterdir()} == {
        "README.md",
        "dfrot_lab",
        "original-RH-Q8_0.gguf",
    }
    card = (tmp_path / "made/README.md").read_text()
    assert "llama-cli -m original-RH-Q8_0.gguf" in card and str(tmp_path) not in card
    refused = ask(*of, "--to", "hf", "--kind", "Q8_0", "--out", str(tmp_path / "other"))
    assert refused.exit_code != 0 and "hf has no such choice" in refused.output
