"""Which linears play which role in a model and in a layer, and how one is changed: in float64, cast once."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dfrot_lab.model.loading import LoadedModel, linear

Transform = Callable[[Tensor], Tensor]  # of one activation (..., channels), to another of the same shape
EDIT_ROWS = 1024  # rows of a weight worked on at once


def ends(loaded: LoadedModel) -> tuple[nn.Linear, nn.Linear]:
    """lm_head and the embedding."""
    return linear(loaded.model, loaded.roles.lm_head), linear(loaded.model, loaded.roles.embedding)


def tables(loaded: LoadedModel) -> list[nn.Linear]:
    """The embedding, and the table of positions where there is one."""
    names = (loaded.roles.embedding, loaded.roles.positions)
    return [linear(loaded.model, name) for name in names if name]


def feeds(loaded: LoadedModel, number: int) -> dict[str, tuple[nn.Linear | None, list[nn.Linear]]]:
    """A layer's norms (None: none) and what alone reads each one's output (linears, routers), by site."""
    layer, found = loaded.layers[number], dict[str, tuple[nn.Linear | None, list[nn.Linear]]]()
    for site, (norm, readers) in loaded.roles.readers(layer).items():
        own = linear(layer, norm) if norm else None
        found[f"layers.{number}.{site}"] = own, [linear(layer, name) for name in readers]
    return found


def writers(loaded: LoadedModel, number: int) -> list[nn.Linear]:
    """A layer's linears that write into the residual stream: o, down."""
    layer = loaded.layers[number]
    return [linear(layer, name) for name in (loaded.roles.o, *loaded.roles.downs(layer))]


def rounded(loaded: LoadedModel, number: int, linears: list[nn.Linear]) -> list[nn.Linear]:
    """Those of a layer's `linears` whose weights are quantized: a router's are not."""
    layer = loaded.layers[number]
    own = {id(linear(layer, name)) for name in loaded.roles.linears(layer)}
    return [one for one in linears if id(one) in own]


def edit_rows(modules: Iterable[nn.Linear], function: Transform) -> None:
    """Replace weights by a function of their rows, in float64 and cast once, a few at a time."""
    for module in modules:
        for part in module.weight.data.split(EDIT_ROWS):
            part.copy_(function(part.double()))


def edit(module: nn.Linear, weight: Transform, bias: Transform | None = None) -> None:
    """Replace a module's weight (and bias) by a function of it, computed in float64 and cast once."""
    with torch.no_grad():
        module.weight.copy_(weight(module.weight.double()))
        own = getattr(module, "bias", None)  # an embedding has none
        if bias is not None and own is not None:
            own.copy_(bias(own.double()))
