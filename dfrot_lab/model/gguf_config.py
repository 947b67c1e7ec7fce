"""What the header of a GGUF file says, as a transformers config that computes the same. What a key or tensor
means is llama.cpp's word; one that the model would not obey is refused by name, never left out."""

from collections.abc import Mapping
from typing import Any

from dfrot_lab.model.files import check_numbers, check_rope
from dfrot_lab.recipe.base import require

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Class by the architecture's name, which the file and transformers share."""
KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""What every file says, behind its architecture's name, and what a transformers config calls it."""
HEADS = ("attention.head_count", "attention.head_count_kv")
IDLE = ("tensor_data_layout", "rope.scaling.finetuned")  # keys that change no number
NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}
"""Keys, and the one value of each that changes nothing: at any other the file is refused."""
DIVISORS = (
    ("rope_freqs.weight", "rope_freqs.weight"),
    ("rope_factors_short.weight", "rope_factors_long.weight"),
)
"""Tensors that RoPE's frequencies are divided by, one a pair of channels: within a context, and beyond it."""


def config_of(header: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """The config of a model with these keys, and these gguf tensors by name. ValueError: what is wrong."""
    from transformers import AutoConfig

    kind = str(header.get("general.architecture"))
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"holds a {kind} model, and of GGUF files only these can be read: {known}")
    said = {
        key.removeprefix(f"{kind}."): value for key, value in header.items() if key.startswith(f"{kind}.")
    }
    said.setdefault("attention.head_count_kv", said.get("attention.head_count"))
    if lacking := [key for key in KEYS if said.get(key) is None]:
        raise ValueError(f"does not say {kind}.{lacking[0]}")
    values = {name: _same(f"{kind}.{key}", said.pop(key)) for key, name in KEYS.items()}
    check_numbers("its header", values, {*KEYS.values()} - {"rms_norm_eps"})
    layers, heads, kv_heads = (values[KEYS[key]] for key in ("block_count", *HEADS))
    require(
        "block_count in its header", layers, layers <= len(tensors), f"at most its {len(tensors)} tensors"
    )
    require(
        "head_count_kv in its header", kv_heads, heads % kv_heads == 0, f"a divisor of head_count, {heads}"
    )
    size = said.pop("attention.key_length", values["hidden_size"] // values["num_attention_heads"])
    values |= {"head_dim": size, "vocab_size": int(_tensor(tensors, "token_embd.weight").shape[1])}
    _check_tokens(header, said.pop("vocab_size", None), values["vocab_size"])
    values |= {f"{each}_token_id": header.get(f"tokenizer.ggml.{each}_token_id") for each in ("bos", "eos")}
    if kind == "phi3":
        values |= {"pad_token_id": None, "sliding_window": said.pop("attention.sliding_window", 0) or None}
        original = said.get("rope.scaling.original_context_length", values["max_position_embeddings"])
        values["original_max_position_embeddings"] = original
    check_numbers("its header", values)
    values["rope_parameters"] = _rope(kind, said, tensors, values)
    check_rope("its header", values["rope_parameters"])
    for key, value in said.items():
        if key not in IDLE and value != {**NEUTRAL, "attention.value_length": size}.get(key):
            raise ValueError(f"says {kind}.{key} = {value}, which would not be done")
    values["tie_word_embeddings"] = "output.weight" not in tensors
    return AutoConfig.for_model(kind, **values, architectures=[ARCHITECTURES[kind]], dtype="float32")


def _check_tokens(header: Mapping[str, Any], told: Any, rows: int) -> None:
    """Refuse ids of tokens that have no row of the embedding, and answers that are no yes or no."""
    rule = f"the rows of token_embd.weight, {rows}"
    require("vocab_size in its header", told, told in (None, rows), rule)
    model = header.get("tokenizer.ggml.model", "gpt2")
    require(
        "tokenizer.ggml.model in its header", repr(model)[:40], model in ("gpt2", "llama"), "gpt2 or llama"
    )
    for key, value in header.items():
        is_id = type(value) is int and 0 <= value < rows
        if key.startswith("tokenizer.") and key.endswith("_token_id"):
            require(f"{key} in its header", value, is_id, f"an id below the vocabulary's size, {rows}")
        if key.startswith("tokenizer.ggml.add_"):
            require(f"{key} in its header", repr(value)[:40], type(value) is bool, "true or false")


def _same(key: str, value: Any) -> Any:
    """One number for all layers, however the file says it."""
    if isinstance(value, list) and len(set(value)) != 1:
        raise ValueError(f"says {key} = {value}, and every layer must have the same")
    return value[0] if isinstance(value, list) else value


def _tensor(tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        raise ValueError(f"lacks the tensor {name}")
    return tensors[name]


def _rope(kind: str, said: dict[str, Any], tensors: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """RoPE's parameters, whose keys are taken out of what is `said`: what is left there is not applied."""
    size, context = values["head_dim"], values["max_position_embeddings"]
    rotary = said.pop("rope.dimension_count", size)
    rope: dict[str, Any] = {"rope_theta": float(said.pop("rope.freq_base", 10000.0))}
    if kind == "phi3":
        rope["partial_rotary_factor"] = rotary / size
    elif rotary != size:
        raise ValueError(
            f"says {kind}.rope.dimension_count = {rotary}, and heads of {size} would be rotated whole"
        )
    scaling = said.pop("rope.scaling.type", "linear")  # without a type llama.cpp takes it as linear
    require("rope.scaling.type in its header", repr(scaling)[:40], isinstance(scaling, str), "a word")
    factor = float(said.pop("rope.scaling.factor", said.pop("rope.scale_linear", 0)) or 1)
    original = int(said.pop("rope.scaling.original_context_length", context))
    fast, slow = (
        float(said.pop(f"rope.scaling.yarn_beta_{end}", by)) for end, by in (("fast", 32), ("slow", 1))
    )
    pair = next((names for names in DIVISORS if tensors.keys() & set(names)), None)
    is_scaled = factor != 1 and scaling != "none"
    if is_scaled and (pair or kind == "phi3" or scaling not in ("linear", "yarn")):
        raise ValueError(
            f"says {kind}.rope.scaling.type = {scaling}, with factor {factor}, which would not be done"
        )
    if pair:
        short, long = (_tensor(tensors, name).data.astype(float).tolist() for name in pair)
        if not len(short) == len(long) == rotary // 2:
            raise ValueError(
                f"holds {pair[0]} of {len(short)} values, and RoPE turns {rotary // 2} pairs of channels"
            )
        rope |= {
            "short_factor": short,
            "long_factor": long,
            "attention_factor": float(said.pop("rope.scaling.attn_factor", 1)),
            "factor": context / original,
        }
        return rope | {"rope_type": "longrope", "original_max_position_embeddings": original}
    if is_scaled and scaling == "yarn":
        rope |= {"beta_fast": fast, "beta_slow": slow, "original_max_position_embeddings": original}
    return rope | ({"rope_type": scaling, "factor": factor} if is_scaled else {"rope_type": "default"})
