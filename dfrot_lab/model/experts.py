"""Mixtures of experts with plain linears: transformers keeps the experts of a layer in two fused tensors, of
which each linear here is a part, so that an edit in place is one of those, and takes no memory."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab.model.families import Roles


class Expert(nn.Module):
    """An MLP whose linears are parts of fused tensors: `gate_up` (2 * width, channels) and `down` (channels,
    width)."""

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: nn.Module) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = (_linear(weight) for weight in (gate, up, down))
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, channels) to the same shape."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _linear(weight: Tensor) -> nn.Linear:
    out, into = weight.shape
    linear = nn.Linear(into, out, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Mixture(nn.Module):
    """In place of a transformers `block` of experts. Its router (and the gate of what all tokens share) reads
    what enters; all else reads what leaves `entry`, where inputs are rounded: routing is never quantized.
    `mlps`: the names of its MLPs by what those of their sites begin with; `routers`: what only routes."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block: Any
        object.__setattr__(self, "block", block)  # not as a submodule: its parts are this one's
        fused = block.experts
        pairs = zip(fused.gate_up_proj.data, fused.down_proj.data, strict=True)
        self.gate, self.entry = block.gate, nn.Identity()
        self.experts = nn.ModuleList(Expert(*pair, fused.act_fn) for pair in pairs)
        self.mlps = {f"experts.{i}.": f"experts.{i}" for i in range(len(self.experts))}
        self.routers = ["gate"]
        if shares := hasattr(block, "shared_expert"):
            self.shared_expert, self.shared_expert_gate = block.shared_expert, block.shared_expert_gate
            self.mlps["shared."] = "shared_expert"
            self.routers.append("shared_expert_gate")
        self.shares = shares

    def forward(self, x: Tensor) -> Tensor:
        """x (..., channels) to the same shape: each token passes the experts that the router chose for it."""
        routed = x.reshape(-1, x.shape[-1])
        _, weights, chosen = self.gate(routed)
        rows = self.entry(x).reshape(routed.shape)
        out = torch.zeros_like(rows)
        for number in chosen.unique().tolist():
            token, rank = torch.where(chosen == number)
            own = self.experts[number](rows[token]) * weights[token, rank, None]
            out.index_add_(0, token, own.to(out.dtype))
        if self.shares:
            out = out + self.shared_expert_gate(routed).sigmoid() * self.shared_expert(rows)
        return out.reshape(x.shape)


def widths(layers: Iterable[Any], roles: Roles) -> set[int]:
    """The widths of the layers' MLPs, experts among them: what their last linears read."""
    return {layer.get_submodule(name).weight.shape[1] for layer in layers for name in roles.downs(layer)}


def unfuse(layer: nn.Module, roles: Roles) -> None:
    """Put a `Mixture` in place of a decoder layer's fused experts, if it has some."""
    if roles.experts and hasattr(block := layer.get_submodule(roles.experts), "experts"):
        layer.set_submodule(roles.experts, Mixture(block))


@contextmanager
def fused(layer: nn.Module, roles: Roles) -> Iterator[None]:
    """While the block runs, a decoder layer has transformers' own experts, whose tensors may be replaced."""
    mixture = layer.get_submodule(roles.experts) if roles.experts else None
    if not isinstance(mixture, Mixture):
        yield
        return
    layer.set_submodule(str(roles.experts), mixture.block)
    try:
        yield
    finally:
        unfuse(layer, roles)
