"""Which model families can be rotated, and which part plays which role. A new one: an entry in FAMILIES."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GAINS = {"rms": 0.0, "rms_plus_one": 1.0, "layer": 0.0}
"""Kinds of norm, and what is added to the weight of each to make its gain: RMSNorm; Gemma's, whose gain is
1 + weight; LayerNorm, which subtracts the mean and may have a bias (surgery makes an RMSNorm of it)."""


QKV, MLP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which submodule plays which role, a layer's parts named inside the decoder layer. From `feeds` (site,
    norm, the linears that alone read its output) follow the fusing of gains, R1 and what is quantized.
    `positions`: a table added to the embedding; `v_rows`: of a config, which rows of `v` are values, head by
    head, where others lie in the same linear; `norm`: of GAINS. A norm named "" is none: its linears read the
    residual stream itself. `online`: what a layer adds to the residual stream passes a norm first, which no
    rotation passes, so R1 acts where linears read, a product a site, and not in the stream. `experts`: an
    MLP that in some layers is a mixture (`model.experts`), each expert with the linears of the MLP here."""

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    v: str = "self_attn.v_proj"
    v_rows: Callable[[Any], list[int]] | None = None
    o: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    norm: str = "rms"
    online: bool = False
    experts: str = ""
    feeds: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("input_norm", "input_layernorm", QKV),
        ("post_attention_norm", "post_attention_layernorm", MLP),
    )

    def mlps(self, layer: Any) -> dict[str, str]:
        """The MLPs of a decoder layer by what the names of their sites begin with: one, or its experts."""
        mixture = layer.get_submodule(self.experts) if self.experts else None
        inner = getattr(mixture, "mlps", {})
        return {site: f"{self.experts}.{name}" for site, name in inner.items()} or {"": self.experts}

    def groups(self, layer: Any) -> dict[str, tuple[str, ...]]:
        """A layer's linears by the site they read, in the order a forward pass reaches them."""
        (norm, _, qkv), (mlp_norm, _, mlp) = self.feeds
        groups = {norm: qkv, "o_proj_in": (self.o,)}
        for site, own in self.mlps(layer).items():
            *first, down = (own + name.removeprefix(self.experts) for name in (*mlp, self.down))
            groups |= {f"{site}mlp_in" if site else mlp_norm: (*first,), f"{site}down_proj_in": (down,)}
        return groups

    def linears(self, layer: Any) -> tuple[str, ...]:
        """A layer's linears in the order a forward pass reaches them: q, k, v, o, gate, up, down."""
        return tuple(name for names in self.groups(layer).values() for name in names)

    def downs(self, layer: Any) -> tuple[str, ...]:
        """A layer's linears that write what its MLPs found into the residual stream."""
        return tuple(names[0] for site, names in self.groups(layer).items() if site.endswith("down_proj_in"))

    def readers(self, layer: Any) -> dict[str, tuple[str, tuple[str, ...]]]:
        """A layer's norms by site, each with all that reads it: the linears, and what routes to experts."""
        (site, norm, qkv), (mlp_site, mlp_norm, _) = self.feeds
        routers = getattr(layer.get_submodule(self.experts), "routers", ()) if self.experts else ()
        read = [f"{self.experts}.{name}" for name in routers]
        for where, names in self.groups(layer).items():
            read += names if where == mlp_site or where.endswith("mlp_in") else ()
        return {site: (norm, qkv), mlp_site: (mlp_norm, tuple(read))}


def heads_of(config: Any) -> tuple[int, int, int]:
    """Of a transformers config the attention heads, the key-value heads, and a head's size."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(size)


def _last_rows(config: Any) -> list[int]:
    """Phi-3: all queries, then all keys, then all values."""
    heads, kv_heads, size = heads_of(config)
    return list(range((heads + kv_heads) * size, (heads + 2 * kv_heads) * size))


def _third_rows(config: Any) -> list[int]:
    """GPT-NeoX: head by head its query, its key, its value."""
    heads, _, size = heads_of(config)
    return [(3 * head + 2) * size + row for head in range(heads) for row in range(size)]


FAMILIES: dict[str, Roles] = {
    "LlamaForCausalLM": Roles(),
    "MistralForCausalLM": Roles(),
    "Qwen2ForCausalLM": Roles(),  # q, k, v have biases: they are on the output side, where R1 does not act
    "Qwen3ForCausalLM": Roles(),  # q and k are normalised per head before RoPE: R3 comes after it
    "SmolLM3ForCausalLM": Roles(),  # some layers have no RoPE: R3 acts there all the same
    "GraniteForCausalLM": Roles(),  # its multipliers scale whole tensors, and a rotation commutes with that
    "MixtralForCausalLM": Roles(experts="mlp"),
    "Qwen2MoeForCausalLM": Roles(experts="mlp"),  # one more expert, which all tokens share
    "Qwen3MoeForCausalLM": Roles(experts="mlp"),  # some layers may have a plain MLP
    "OlmoeForCausalLM": Roles(experts="mlp"),
    "GemmaForCausalLM": Roles(norm="rms_plus_one"),
    "OlmoForCausalLM": Roles(norm="layer"),  # without gain or bias
    **dict.fromkeys(
        ("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
        Roles(
            norm="rms_plus_one",
            online=True,
            feeds=(
                ("input_norm", "input_layernorm", QKV),
                ("post_attention_norm", "pre_feedforward_layernorm", MLP),
            ),
        ),
    ),
    "Olmo2ForCausalLM": Roles(online=True, feeds=(("input_norm", "", QKV), ("post_attention_norm", "", MLP))),
    "HeliumForCausalLM": Roles(),
    "MinistralForCausalLM": Roles(),  # sliding windows in some layers
    "SeedOssForCausalLM": Roles(),
    "Ernie4_5ForCausalLM": Roles(),
    "GlmForCausalLM": Roles(
        feeds=(
            ("input_norm", "input_layernorm", QKV),
            ("post_attention_norm", "post_attention_layernorm", ("mlp.gate_up_proj",)),
        )
    ),
    "Starcoder2ForCausalLM": Roles(
        down="mlp.c_proj",
        norm="layer",
        feeds=(
            ("input_norm", "input_layernorm", QKV),
            ("post_attention_norm", "post_attention_layernorm", ("mlp.c_fc",)),
        ),
    ),
    "Phi3ForCausalLM": Roles(
        v="self_attn.qkv_proj",
        v_rows=_last_rows,
        feeds=(
            ("input_norm", "input_layernorm", ("self_attn.qkv_proj",)),
            ("post_attention_norm", "post_attention_layernorm", ("mlp.gate_up_proj",)),
        ),
    ),
    "OPTForCausalLM": Roles(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        o="self_attn.out_proj",
        down="fc2",
        norm="layer",
        feeds=(
            ("input_norm", "self_attn_layer_norm", QKV),
            ("post_attention_norm", "final_layer_norm", ("fc1",)),
        ),
    ),
    "GPTNeoXForCausalLM": Roles(  # attention and MLP read one residual stream, each after a norm of its own
        embedding="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        v="attention.query_key_value",
        v_rows=_third_rows,
        o="attention.dense",
        down="mlp.dense_4h_to_h",
        norm="layer",
        feeds=(
            ("input_norm", "input_layernorm", ("attention.query_key_value",)),
            ("post_attention_norm", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
    ),
}
"""Roles by the class name of the transformers model."""
_WHY: dict[str, str] = {
    "it sees pictures too: save its language model alone": "Gemma3ForConditionalGeneration",
    "its post-norms sit before the residual add, and it has no entry in the table": (
        "Olmo3ForCausalLM Glm4ForCausalLM Exaone4ForCausalLM"
    ),
    "its attention and its MLP read one norm together, and the table has one for each": (
        "PhiForCausalLM CohereForCausalLM Cohere2ForCausalLM"
    ),
    "its keys and values come from one compressed latent (MLA), which has no entry in the table": (
        "DeepseekV2ForCausalLM DeepseekV3ForCausalLM"
    ),
    "its experts are transposed, with biases, gate and up interleaved and clamped": "GptOssForCausalLM",
    "its linears are stored transposed (Conv1D), which no step of surgery edits": "GPT2LMHeadModel",
    "its embedding passes a LayerNorm before it enters the residual stream": "BloomForCausalLM",
}
REFUSED = {name: why for why, names in _WHY.items() for name in names.split()}
"""Families that are refused, with the reason."""
CAUSAL = ("ForCausalLM", "LMHeadModel")  # how a class ends that predicts the next token


def attention(config: Any) -> str:
    """How a model with this config computes attention: never by what its file says, which may name code."""
    return "eager" if config.model_type == "gemma2" else "sdpa"  # Gemma 2 cuts scores, which sdpa does not


def oddity(config: Any) -> str | None:
    """Why a model of a supported family with this config cannot be rotated all the same; None if it can."""
    if config.model_type == "opt":
        if not config.do_layer_norm_before:
            return "its norms sit after the residual add (as in OPT-350M)"
        if config.word_embed_proj_dim != config.hidden_size:
            return "its embedding is narrower than its layers (word_embed_proj_dim)"
        if config._remove_final_layer_norm:
            return "it has no norm after its layers (_remove_final_layer_norm)"
    if getattr(config, "clip_qkv", None) is not None:
        return "it cuts queries, keys and values at a threshold (clip_qkv), and R2 would move them there"
    return None


def roles_of(architecture: str) -> Roles:
    """The roles of a class name such as LlamaForCausalLM; a ValueError says why another one is refused."""
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    if architecture in REFUSED:
        reason = f"cannot be rotated here without changing it: {REFUSED[architecture]}"
    elif not architecture.endswith(CAUSAL):
        reason = "has no head for next tokens: save the model by AutoModelForCausalLM, if it is a decoder"
    else:
        reason = "is not in the table of roles (dfrot_lab.model.families.FAMILIES)"
    raise ValueError(f"{architecture} {reason}. Supported: {', '.join(FAMILIES)}.")
