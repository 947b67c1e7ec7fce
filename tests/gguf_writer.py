"""GGUF files as llama.cpp's converter writes them, out of models of the four architectures, for tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from dfrot_lab.model.families import heads_of
from dfrot_lab.model.loading import LoadedModel

HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "Q2_K": (80, 82), "Q3_K": (108,)}  # fmt: skip
"""Where in a block its scales lie, of kinds that the package gguf reads and cannot write."""


def write_gguf(
    path: Path,
    loaded: LoadedModel,
    *,
    kinds: Mapping[str, Kind] | Kind = Kind.F32,
    said: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    split: int = 0,
    pre: str | None = None,
    pieces: Sequence[str] = (),
) -> None:
    """Matrices of a `kinds` (by the end of the name, or one for all), keys added to or, where None, taken from
    the header, further tensors, at most `split` tensors a part; the tokenizer is byte-level, or of sentencepiece `pieces`.
    """
    config = loaded.config
    writer = gguf.GGUFWriter(path, config.model_type, split_max_tensors=split)
    heads, kv_heads, size = heads_of(config)
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": int(size * config.rope_parameters.get("partial_rotary_factor", 1)),
        **(said or {}),
    }
    if pieces:
        write_pieces(writer, pieces)
    else:
        write_tokenizer(writer, loaded.tokenizer, pre)
    for key, value in keys.items():
        name = key if key.startswith("tokenizer.") else f"{config.model_type}.{key}"
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}  # fmt: skip
        for part in writer.kv_data:  # what is said takes the place of what a tokenizer has
            part.pop(name, None)
        if value is not None:
            add[type(value)](name, value)
    arch = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in loaded.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        x = tensor.float().numpy()
        if (config.model_type == "llama" and "q_proj" in name) or (
            config.model_type == "llama" and "k_proj" in name
        ):
            x = to_interleaved(x, size)
        add_tensor(
            writer, names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(x), kinds
        )
    for name, x in (tensors or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, pre: str | None) -> None:
    """A byte-level tokenizer; its one merge is there since a converter without one is an error in tokenizers."""
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens[:-1], tokens[0] + tokens[1]])
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_bos_token_id(7)
    writer.add_eos_token_id(0)


def write_pieces(writer: gguf.GGUFWriter, pieces: Sequence[str]) -> None:
    """A sentencepiece tokenizer, the later of two pieces the better."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([float(n) for n in range(len(pieces))])
    writer.add_token_types(
        [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.NORMAL] * (len(pieces) - 3)]
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def add_tensor(writer: gguf.GGUFWriter, name: str, x: np.ndarray, kinds: Mapping[str, Kind] | Kind) -> None:
    """One tensor, a matrix in the kind that is said for the end of its name, F32 where none is."""
    of = {"": kinds} if isinstance(kinds, Kind) else kinds
    kind = (
        next((each for end, each in of.items() if name.endswith(end)), Kind.F32) if x.ndim == 2 else Kind.F32
    )
    if kind is Kind.F32:
        writer.add_tensor(name, x)
    elif kind.name in HALVES or kind.name.startswith("IQ"):
        writer.add_tensor(name, random_blocks(x.shape, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)


def random_blocks(shape: tuple[int, int], kind: Kind) -> np.ndarray:
    """Blocks (rows, bytes) of a kind that the package gguf cannot quantize: any bytes, with finite scales."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(shape[0])
    blocks = random.integers(0, 256, (shape[0] * shape[1] // block, size), dtype=np.uint8)
    for at in HALVES.get(kind.name, ()):
        blocks[:, at : at + 2] = (
            random.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16).view(np.uint8)
        )
    return blocks.reshape(shape[0], -1)


def to_interleaved(weight: np.ndarray, head: int) -> np.ndarray:
    """Rows of q or k from half-split RoPE (channel i pairs with i + head / 2) to interleaved (2 i pairs with
    2 i + 1), head by head.
    """
    order = np.arange(head).reshape(2, head // 2).T.reshape(-1)
    return weight.reshape(-1, head, *weight.shape[1:])[:, order].reshape(weight.shape)
