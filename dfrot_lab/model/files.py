"""A model's folder before anything is built of it: which files are read, what they say, whether it can be
true. What is read is what is hashed: plain names in the folder, of weights safetensors alone."""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dfrot_lab.disk.atomic import digest
from dfrot_lab.model.families import Roles, heads_of
from dfrot_lab.recipe.base import content_key, require

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = (".json", ".model", ".txt", ".jinja")  # endings of what config and tokenizer are read from
AGAIN = "Copy or download it again."
LONGEST = 64 << 20  # bytes of a JSON file that says what a model is: a long index has 10 million
FLOATS = ("F64", "F32", "F16", "BF16")
HARMLESS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias", "attention.bias")  # buffers old files hold
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
MOST = {
    "num_hidden_layers": 1000, "num_labels": 1000, "head_dim": 1 << 13, "num_attention_heads": 1 << 13,
    "num_key_value_heads": 1 << 13, "num_experts": 1 << 13, "num_local_experts": 1 << 13,
    "hidden_size": 1 << 18, "intermediate_size": 1 << 20, "ffn_dim": 1 << 20, "word_embed_proj_dim": 1 << 18,
    "moe_intermediate_size": 1 << 20, "vocab_size": 1 << 24, "max_position_embeddings": 1 << 28,
    "shared_expert_intermediate_size": 1 << 20, "num_experts_per_tok": 1 << 13, "sliding_window": 1 << 28,
    "original_max_position_embeddings": 1 << 28, "decoder_sparse_step": 1000,
}  # fmt: skip
"""Sizes that a config may say, and the largest that is believed: far above any model there is."""
LARGEST = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_epsilon"), 1.0),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), 1.0),
    **dict.fromkeys(("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"), 1e9),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier"), 1e9),
    "logits_scaling": 1e9,
}
"""Numbers above 0 that a config may say, and the largest that is believed."""
ROPE = 1e12  # the largest of RoPE's parameters that is believed


@contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Whatever others' code raises in the block is a ValueError of one line: `what`, the reason, `advice`."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:300] or "no reason given"
        why = "it needs code of its own, which is never run here" if "trust_remote_code" in why else why
        raise ValueError(f"{what} ({type(error).__name__}: {why}). {advice}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError: something else, damaged, or far too long."""
    size = path.stat().st_size
    require(f"{path}", f"{size:,} bytes", size <= LONGEST, f"at most {LONGEST:,} bytes")
    with explained(f"{path} must be JSON", AGAIN):
        found = json.loads(path.read_bytes())
    require(f"{path}", json.dumps(found)[:40], isinstance(found, dict), "a JSON object")
    return dict(found)


def check_pointer(path: Path, key: str, name: str) -> None:
    """Refuse a JSON file, if it is there, whose `key` has transformers read another file than `name`."""
    said = read_object(path).get(key, [name]) if path.is_file() else [name]
    require(f"{key} in {path}", repr(said)[:80], said in ([name], []), f"[{name!r}], the file that is read")


def weights_of(folder: Path) -> list[Path]:
    """The weight files of a folder: those its index names, else model.safetensors. ValueError: an index
    that names anything but files beside it, or one that is not there."""
    index, names = folder / INDEX, [WEIGHTS]
    if index.is_file():
        told = read_object(index).get("weight_map")
        names = list(told.values()) if isinstance(told, dict) else []
        require(f"the weight_map of {index}", repr(told)[:40], names, "tensors' names with their files'")
        for name in names:
            is_plain = isinstance(name, str) and re.fullmatch(r"[^/\\:]+\.safetensors", name)
            require(f"a file in {index}", repr(name), is_plain, "the plain name of a *.safetensors beside it")
    files = [folder / name for name in sorted(set(names))]
    if lost := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"the weights in {folder} lack {lost[0]}. Put it there, or download them again.")
    return files


def is_model(folder: Path) -> bool:
    """Whether a folder has a config, and weights in safetensors."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def files_of(folder: Path) -> list[Path]:
    """The files that are read when a folder's model is loaded: its weights, and all that may say what its
    config and tokenizer are, sorted. ValueError as of `weights_of`."""
    return sorted({*weights_of(folder), *(f for f in folder.iterdir() if f.suffix in TEXTS and f.is_file())})


def key_of(folder: Path) -> str:
    """The content key of the files that are read; one that did not change is not hashed again."""
    return content_key([[file.name, digest(file)] for file in files_of(folder)])


def headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Of each tensor in a folder's weight files its file and shape; the values are not read. ValueError: a
    damaged file, a tensor that is there twice, or that holds no floats."""
    from safetensors import safe_open

    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in weights_of(folder):
        with explained(f"the weights in {path} are damaged or not this model's", AGAIN):
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no dict
            said = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
        for name, (kind, shape) in said.items():
            is_float = kind in FLOATS or name.endswith(HARMLESS)
            require(f"{name} in {path}", kind, is_float, f"of {', '.join(FLOATS)}")
            require_once(name, path, found[name][0] if name in found else None)
            found[name] = path, shape
    return found


def require_once(name: str, path: Path, before: Path | None) -> None:
    """Refuse a tensor that is in a file `before` this one, too; ValueError."""
    require(f"{name} in {path}", f"also in {before}", before is None, "there once")


def weight_bytes(found: Mapping[str, tuple[Path, tuple[int, ...]]], dtype: str) -> int:
    """Bytes of the tensors in some headers as they are computed with."""
    return sum(math.prod(shape) for _, shape in found.values()) * int(getattr(torch, dtype).itemsize)


def check_numbers(where: Path | str, said: Mapping[str, Any], needed: Collection[str] = ()) -> None:
    """Refuse sizes of a config that are none, or that no model has, before anything is made of them."""
    unused = () if said.get("use_sliding_window", True) else ("sliding_window",)
    for name, most in MOST.items():
        value = said.get(name) if name not in unused else None
        is_size = (type(value) is int and 1 <= value <= most) or (value is None and name not in needed)
        require(f"{name} in {where}", repr(value)[:40], is_size, f"a whole number from 1 to {most:,}")
    for name, largest in LARGEST.items():
        check_real(f"{name} in {where}", said.get(name), largest)


def check_real(name: str, value: Any, largest: float) -> None:
    """Refuse what is said to be a number, if anything is, and is none above 0, or too large."""
    is_real = value is None or (type(value) in (int, float) and 0 < value <= largest)
    require(name, repr(value)[:40], is_real, f"a number above 0 and at most {largest:g}")


def check_rope(where: Path | str, said: Mapping[str, Any], field: str = "rope_parameters") -> None:
    """Refuse RoPE's parameters, of each kind of layer or of all, with a number that no model has."""
    check_numbers(where, said)
    for name, value in said.items():
        if isinstance(value, Mapping):
            check_rope(where, value, f"{field}.{name}")
        for each in value if isinstance(value, list) else [value]:
            if type(each) in (int, float):
                check_real(f"{field}.{name} in {where}", each, ROPE)


def check_config(where: Path, config: Any) -> None:
    """Refuse a transformers config with a number that no model has, its defaults too."""
    said = {name: getattr(config, name, None) for name in (*MOST, *LARGEST)}
    uses = {"use_sliding_window": getattr(config, "use_sliding_window", True)}
    check_numbers(where, {**said, **uses}, NEEDED)
    check_rope(where, getattr(config, "rope_parameters", None) or {})
    each, experts = said["num_experts_per_tok"], said["num_local_experts"] or said["num_experts"]
    is_known = not (each and experts) or each <= experts
    require(f"num_experts_per_tok in {where}", each, is_known, f"at most the number of experts, {experts}")


def check_sizes(where: Path, config: Any, roles: Roles, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what a config says with the shapes of the weights, by name. ValueError: where they part."""
    heads, kv_heads, size = heads_of(config)
    rule = f"a divisor of num_attention_heads = {heads}"
    require(f"num_key_value_heads in {where}", kv_heads, heads % kv_heads == 0, rule)
    rows = kv_heads * size + (roles.v_rows is not None) * (heads + kv_heads) * size
    table, wide = roles.embedding.rpartition(".")[2], getattr(config, "word_embed_proj_dim", None)
    inner = "ffn_dim" if hasattr(config, "ffn_dim") else "intermediate_size"
    wanted = [
        ("vocab_size", table, 0, config.vocab_size),
        ("hidden_size", table, 1, wide or config.hidden_size),
        ("num_attention_heads * head_dim", roles.o, 1, heads * size),
        ("num_key_value_heads and head_dim", roles.v, 0, rows),
        (inner, roles.down, 1, getattr(config, inner)),
    ]
    for name, shape in shapes.items():
        for field, end, axis, value in wanted:
            if f".{name}".endswith(f".{end}.weight"):
                said = f"{value}: {name} has the shape {shape}"
                ok = len(shape) == 2 and shape[axis] == value
                require(f"{field} in {where}", said, ok, f"as in the weights, {[*shape, 0, 0][axis]}")
    inside = {int(found[1]) for name in shapes if (found := re.search(r"(?:^|\.)layers\.(\d{1,9})\.", name))}
    count, layers = config.num_hidden_layers, max(inside, default=-1) + 1
    require(f"num_hidden_layers in {where}", count, layers == count, f"as in the weights, {layers}")
