"""A family in one file: Arcee's decoder is LLaMA's with an MLP that has no gate."""

from dfrot_lab.model.families import Roles

NAME = "ArceeForCausalLM"
ROLES = Roles(
    feeds=(
        ("input_norm", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_norm", "post_attention_layernorm", ("mlp.up_proj",)),
    )
)
