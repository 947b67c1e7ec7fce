"""Which model families can be rotated, and which part plays which role. A new one: an entry in FAMILIES."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which submodule plays which role, a layer's parts named inside the decoder layer. From `feeds` (site,
    norm, the linears that alone read its output) follow the fusing of gains, R1 and what is quantized."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    feeds: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("input_norm", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_norm", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    )

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The linears of one layer by the site they read, in the order a forward pass reaches them."""
        (norm, _, qkv), (mlp_norm, _, mlp) = self.feeds
        return {norm: qkv, "o_proj_in": (self.o,), mlp_norm: mlp, "down_proj_in": (self.down,)}

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of one layer in the order a forward pass reaches them: q, k, v, o, gate, up, down."""
        return tuple(name for names in self.groups.values() for name in names)


FAMILIES: dict[str, Roles] = {
    "LlamaForCausalLM": Roles(),
    "MistralForCausalLM": Roles(),
    "Qwen2ForCausalLM": Roles(),  # q, k, v have biases: they are on the output side, where R1 does not act
    "Qwen3ForCausalLM": Roles(),  # q and k are normalised per head before RoPE: R3 comes after it
}
"""Roles by the class name of the transformers model."""
REFUSED: dict[str, str] = dict.fromkeys(
    ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    "its norms multiply by 1 + gain, and its post-norms sit before the residual add, so no rotation of the "
    "residual stream passes through them",
) | dict.fromkeys(
    ("GPT2LMHeadModel", "OPTForCausalLM", "GPTNeoXForCausalLM", "BloomForCausalLM", "PhiForCausalLM"),
    "it uses LayerNorm, which subtracts the mean: a rotation does not commute with that until the model is "
    "converted to RMSNorm",
)
"""Families that rotation would change, with the reason."""


def roles_of(architecture: str) -> Roles:
    """The roles of a class name such as LlamaForCausalLM; a ValueError says why another one is refused."""
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    if architecture in REFUSED:
        reason = f"cannot be rotated without changing it: {REFUSED[architecture]}"
    elif not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        reason = "has no causal decoder, and DFRot is about decoders"
    else:
        reason = "is not in the table of roles (dfrot_lab.model.families.FAMILIES)"
    raise ValueError(f"{architecture} {reason}. Supported: {', '.join(FAMILIES)}.")
