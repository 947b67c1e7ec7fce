"""Invertible matrices that act while a model runs, on what its linears read: x -> x A, and in the weights
W -> W A^-T, since (x A)(W A^-T)^T = x W^T. A is never formed: it is a product of cheap steps, as DuQuant
(arXiv 2406.01721) and FlatQuant (2410.09426) have it."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dfrot_lab.model import hooks
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.model.parts import edit_rows
from dfrot_lab.model.stream import change
from dfrot_lab.recipe.base import require

Turn = Sequence[Tensor]
"""The steps of one A (n, n) in order, each a tensor: (n,) of floats, a factor for each channel; (n,) of whole
numbers, the order in which channels come to lie; (b, b), one matrix for each block of b channels."""


def apply(turn: Turn, x: Tensor) -> Tensor:
    """x A for x (..., n), in x's dtype."""
    for step in turn:
        if not step.is_floating_point():
            x = x.index_select(-1, step.to(x.device))
        elif step.ndim == 1:
            x = x * step.to(x)
        else:
            x = (x.unflatten(-1, (x.shape[-1] // len(step), len(step))) @ step.to(x)).flatten(-2)
    return x


def taken_back(turn: Turn) -> list[Tensor]:
    """The steps of A^-T, which rows of weights are multiplied by, float64. RuntimeError: a singular step."""

    def back(step: Tensor) -> Tensor:
        if not step.is_floating_point():
            return step
        return 1 / step.double() if step.ndim == 1 else torch.linalg.inv(step.double()).T.contiguous()

    return [back(step) for step in turn]


def kronecker(first: Tensor, second: Tensor) -> list[Tensor]:
    """The steps of A = first (p, p) (x) second (q, q): of channels as p rows of q, X -> first^T X second."""
    p, q = len(first), len(second)
    lying = torch.arange(p * q)
    return [second, lying.view(p, q).T.flatten(), first, lying.view(q, p).T.flatten()]


def dense(turn: Turn, channels: int) -> Tensor:
    """A itself (channels, channels) float64: for looks and tests."""
    return apply(turn, torch.eye(channels, dtype=torch.float64))


def readers(loaded: LoadedModel, number: int) -> dict[str, list[nn.Linear]]:
    """By site the linears of a layer that read it rounded: of experts all at the one site that they share,
    their router not among them."""
    layer, found = loaded.layers[number], dict[str, list[nn.Linear]]()
    for place, names in loaded.roles.groups(layer).items():
        site = loaded.roles.feeds[1][0] if place.endswith("mlp_in") else place
        found.setdefault(f"layers.{number}.{site}", []).extend(linear(layer, name) for name in names)
    return found


def act(loaded: LoadedModel, turns: Mapping[str, Turn]) -> None:
    """Let turns by site act in a model for good, and take them back in the weights (in float64, cast once):
    its function stays. Other functions at these sites see what was turned. KeyError: no such site;
    ValueError: a turn that does not fit."""
    if not turns:
        return
    sites = hooks.sites_of(loaded, *hooks.LINEAR_INPUTS)
    if unknown := set(turns) - set(sites):
        raise KeyError(f"no site {min(unknown)!r} to turn; this model has {sites[0]} .. {sites[-1]}")
    for number in range(len(loaded.layers)):
        for site, own in readers(loaded, number).items():
            _require(site, turns.get(site, ()), own[0].weight.shape[1])
    dtype = next(loaded.model.parameters()).dtype
    back = {site: _on(loaded, taken_back(turn), torch.float64) for site, turn in turns.items()}
    held = {site: _on(loaded, turn, dtype) for site, turn in turns.items()}

    def fold(number: int) -> None:
        for site, own in readers(loaded, number).items():
            if site in back:
                edit_rows(own, partial(apply, back[site]))

    change(loaded, fold)
    loaded.online.enter_context(hooks.at_sites(loaded, lambda site, x: apply(held[site], x), held))


def _on(loaded: LoadedModel, turn: Turn, dtype: torch.dtype) -> list[Tensor]:
    """The steps on the model's device, matrices and factors in `dtype`."""
    return [step.to(loaded.device, dtype if step.is_floating_point() else None) for step in turn]


def _require(site: str, turn: Turn, channels: int) -> None:
    """ValueError: a step that does not fit the channels of its site, or is not finite."""
    for step in turn:
        size, said = len(step), f"{tuple(step.shape)}, {step.dtype}, for {channels} channels"
        fits = size == channels if step.ndim == 1 else channels % size == 0 and step.shape == (size, size)
        require(f"a step of the turn of {site}", said, fits, "(n,), or (b, b) with b a divisor of n")
        if step.is_floating_point():
            require(f"a turn of {site}", "NaN or Inf", bool(step.isfinite().all()), "finite")
        else:
            order = torch.equal(step.sort().values, torch.arange(size).to(step))
            require(f"an order of {site}", step, order, "each channel once")
