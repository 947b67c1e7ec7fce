"""Change a model without changing its function: untie, fuse norms, rotate R1 and R2, rotate and hook R3 and
R4.

With rows as tokens, x the residual stream and R orthogonal, RMSNorm(x R) = RMSNorm(x) R once the norm's gain
sits in the linears it feeds. So
    embedding E -> E R;  q, k, v, gate, up, lm_head: W -> W R  (their input is x R, and x R (W R)^T = x W^T);  o, down: W -> R^T W, b -> b R,
leaves every logit as it was (QuaRot, arXiv 2404.00456, Sec. 3; DFRot, arXiv 2412.00648, Sec. 3.1). The
embedding is not centred: RMSNorm does not subtract a mean, so centring would change the model. All products
run in float64 and are cast once.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab.maths.hadamard import hadamard_transform, has_hadamard
from dfrot_lab.maths.rotations import check
from dfrot_lab.model.loading import LoadedModel, linear

Transform = Callable[[Tensor], Tensor]
"""A function of one activation (..., channels) to another of the same shape."""

SiteFunction = Callable[[str, Tensor], Tensor | None]
"""From a site and its activation, a new one of the same shape, or None to leave it."""

EDIT_ROWS = 1024
"""Rows of a weight worked on at once."""


def untie(loaded: LoadedModel) -> None:
    """Give lm_head its own copy of a tied embedding, since the two are about to be rotated and scaled
    differently. Logits unchanged.
    """
    embedding = linear(loaded.model, loaded.roles.embedding)
    head = linear(loaded.model, loaded.roles.lm_head)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    loaded.model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def is_tied(loaded: LoadedModel) -> bool:
    """Whether lm_head and the embedding are one tensor."""
    return (
        linear(loaded.model, loaded.roles.lm_head).weight
        is linear(loaded.model, loaded.roles.embedding).weight
    )


def fuse_norms(loaded: LoadedModel) -> None:
    """Move each RMSNorm gain g into the linears it feeds, W -> W diag(g), g -> 1. Logits unchanged. Needs
    untied embeddings.
    """
    _require_untied(loaded)
    for layer in loaded.layers:
        for _, norm, linears in loaded.roles.feeds:
            fuse_norm(linear(layer, norm), [linear(layer, name) for name in linears])
    fuse_norm(linear(loaded.model, loaded.roles.final_norm), [linear(loaded.model, loaded.roles.lm_head)])


def fuse_norm(norm: nn.Linear, linears: list[nn.Linear]) -> None:
    """Move one norm's gain g into the `linears` that alone read it, W -> W diag(g), g -> 1: their outputs
    stay as they were.
    """
    for reader in linears:
        reader.weight.data.mul_(
            norm.weight
        )  # one product a value: rounded once, as if it were taken in float64
    norm.weight.data.fill_(1)


def norms_are_fused(loaded: LoadedModel) -> bool:
    """Whether every norm gain that R1 must pass is 1."""
    norms = [linear(layer, norm) for layer in loaded.layers for _, norm, _ in loaded.roles.feeds]
    norms.append(linear(loaded.model, loaded.roles.final_norm))
    return all(bool(torch.all(norm.weight == 1)) for norm in norms)


def rotate_residual(loaded: LoadedModel, R: Tensor) -> None:
    """Fuse R1 = `R` (channels, channels) into embedding, all linears and lm_head. Logits unchanged. Needs
    fused norms.
    """
    _require_untied(loaded)
    if not norms_are_fused(loaded):
        raise ValueError(
            "norm gains must be fused (surgery.fuse_norms) before R1: a gain that is not 1 does not commute with a rotation"
        )
    R = check(R, loaded.channels).to(loaded.device)
    _edit_rows(linear(loaded.model, loaded.roles.embedding), lambda w: w @ R)
    for layer in loaded.layers:
        for _, _, linears in loaded.roles.feeds:
            for name in linears:
                _edit_rows(linear(layer, name), lambda w: w @ R)
        for name in (loaded.roles.o, loaded.roles.down):
            _edit(linear(layer, name), lambda w: R.T @ w, lambda b: b @ R)
    _edit_rows(linear(loaded.model, loaded.roles.lm_head), lambda w: w @ R)


def fold_gains(loaded: LoadedModel, gains: Any) -> None:
    """x"""


def rotate_heads(loaded: LoadedModel, R2: Any = None) -> None:
    """Fuse R2, a Hadamard matrix on each head's values: v -> v H, and o_proj takes it back. Logits unchanged."""
    head = head_size(loaded)
    _require_hadamard(head, "a head's size, so neither R2 nor R3")

    def rows(w: Tensor) -> Tensor:  # output side: each head's rows of W, or its part of the bias
        heads = w.reshape(-1, head, *w.shape[1:])
        return hadamard_transform(heads.transpose(1, -1), head**-0.5).transpose(1, -1).reshape(w.shape)

    def columns(w: Tensor) -> Tensor:
        return hadamard_transform(w.reshape(len(w), -1, head), head**-0.5).reshape(w.shape)

    for layer in loaded.layers:
        _edit(linear(layer, loaded.roles.v), rows, rows)
        _edit(linear(layer, loaded.roles.o), columns)


def rotate_down(loaded: LoadedModel) -> None:
    """Fuse the offline half of R4 into down_proj, W -> W H^T: right only together with `online(...,
    r4=True)`, which sends it x H^T.
    """
    _require_hadamard(
        linear(loaded.layers[0], loaded.roles.down).weight.shape[1], "the MLP's width, so no R4"
    )
    for layer in loaded.layers:
        _edit_rows(linear(layer, loaded.roles.down), lambda w: hadamard_transform(w, w.shape[-1] ** -0.5))


def head_size(loaded: LoadedModel) -> int:
    """Channels of one attention head."""
    config: Any = loaded.model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def prepare(loaded: LoadedModel) -> None:
    """Untie and fuse the norms: what both capture and rotation start from."""
    untie(loaded)
    fuse_norms(loaded)


@contextmanager
def online(
    loaded: LoadedModel, *, r3: bool = False, r4: bool = False, function: SiteFunction | None = None
) -> Iterator[None]:
    """While the block runs: R3 on post-RoPE queries and keys, R4 before down_proj, then `function` at every site;
    all gone after it.
    """
    if r3:
        _require_hadamard(head_size(loaded), "a head's size, so neither R2 nor R3")
    with ExitStack() as stack:
        for number, layer in enumerate(loaded.layers):
            place = f"layers.{number}"
            if r4:
                _replace_input(
                    stack, layer.get_submodule(loaded.roles.down), lambda _site, x: apply_r4(x), ""
                )
            if function is not None:
                for name, norm, _ in loaded.roles.feeds:
                    _replace_output(stack, layer.get_submodule(norm), function, f"{place}.{name}")
                _replace_input(stack, layer.get_submodule(loaded.roles.o), function, f"{place}.o_proj_in")
                _replace_input(
                    stack, layer.get_submodule(loaded.roles.down), function, f"{place}.down_proj_in"
                )
        if r3 or function is not None:
            stack.enter_context(_attention(loaded, r3, function))
        yield


def apply_r4(x: Tensor) -> Tensor:
    """R4, x H^T / sqrt(n): what `rotate_down` makes down_proj expect."""
    return hadamard_transform(x, x.shape[-1] ** -0.5)


def _replace_output(stack: ExitStack, module: nn.Module, function: SiteFunction, site: str) -> None:
    handle = module.register_forward_hook(lambda _module, _args, output: function(site, output))
    stack.callback(handle.remove)


def _replace_input(stack: ExitStack, module: nn.Module, function: SiteFunction, site: str) -> None:
    def see(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        new = function(site, args[0])
        return None if new is None else (new, *args[1:])

    stack.callback(module.register_forward_pre_hook(see).remove)


@contextmanager
def _attention(loaded: LoadedModel, r3: bool, function: SiteFunction | None) -> Iterator[None]:
    """Run attention through a registered function that sees post-RoPE q, k, v (batch, heads, tokens, head size):
    transformers' own seam.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def changed(site: str, x: Tensor) -> Tensor:
        new = None if function is None else function(site, x)
        return x if new is None else new

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        if r3:
            scale = query.shape[-1] ** -0.5
            query, key = hadamard_transform(query, scale), hadamard_transform(key, scale)
        place = f"layers.{module.layer_idx}"
        query, key, value = (
            changed(f"{place}.{name}", x) for name, x in (("q", query), ("k", key), ("v", value))
        )
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    name = f"dfrot_lab_{id(attend)}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    config: Any = loaded.model.config
    before = config._attn_implementation
    loaded.model.set_attn_implementation(name)  # type: ignore[operator]
    try:
        yield
    finally:
        loaded.model.set_attn_implementation(before)  # type: ignore[operator]


def _require_untied(loaded: LoadedModel) -> None:
    if is_tied(loaded):
        raise ValueError(
            "embeddings must be untied (surgery.untie) first: lm_head and the embedding are one tensor and would be changed twice"
        )


def _require_hadamard(n: int, what: str) -> None:
    if not has_hadamard(n):
        raise ValueError(
            f"no Hadamard matrix of order {n} is known here, and that is {what} can be applied: evaluate this model with NR only"
        )


def _edit_rows(module: nn.Linear, function: Transform) -> None:
    """Replace a weight by a function of each of its rows, in float64 and cast once, a few rows at a time:
    what is between stays in cache.
    """
    with torch.no_grad():
        for part in module.weight.data.split(EDIT_ROWS):
            part.copy_(function(part.double()))


def _edit(module: nn.Linear, weight: Transform, bias: Transform | None = None) -> None:
    """Replace a module's weight (and bias) by a function of it, computed in float64 and cast once."""
    with torch.no_grad():
        module.weight.copy_(weight(module.weight.double()))
        own = getattr(module, "bias", None)  # an embedding has none
        if bias is not None and own is not None:
            own.copy_(bias(own.double()))
