"""Overwrite massive values while a model runs, to see what they are for (Sun et al., arXiv 2402.17762, Sec.
3.3): those of the residual stream before a layer that are, by rule `sun`, > 100 and >= 1000 x the median."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dfrot_lab.model import loading
from dfrot_lab.model.hooks import at_sites, sites_of
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import massive

See = Callable[[int, Tensor], Tensor | None]
"""From a layer's number and its input (windows, tokens, channels), a new input, or None to leave it."""


def massive_mask(x: Tensor) -> Tensor:
    """Which values of a residual stream `x` (..., tokens, channels) are massive by rule `sun`, as a mask."""
    magnitude = x.abs()
    return (magnitude > massive.SUN_ABSOLUTE) & (magnitude >= massive.SUN_RATIO * magnitude.median())


@torch.inference_mode()
def mean_massive(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Mean of the massive values of each layer's input in each channel (layers, channels) over token ids
    (windows, window); 0 where none is."""
    total = torch.zeros(len(loaded.layers), loaded.channels, dtype=torch.float64)
    count = torch.zeros_like(total)

    def add(layer: int, x: Tensor) -> None:
        mask = massive_mask(x)
        total[layer] += torch.where(mask, x, 0).double().sum((0, 1)).cpu()
        count[layer] += mask.sum((0, 1)).cpu()

    with before_layers(loaded, add):
        for window in ids:
            loading.body(loaded)(window[None].to(loaded.device), use_cache=False)
    return total / count.clamp(min=1)


@contextmanager
def massive_set(loaded: LoadedModel, to: str, ids: Tensor) -> Iterator[None]:
    """While the block runs, massive values before every layer are 0 (`to` = zero), or their average over
    `ids` (windows, window) (mean)."""
    value = torch.zeros(len(loaded.layers), loaded.channels) if to == "zero" else mean_massive(loaded, ids)
    with before_layers(loaded, lambda layer, x: torch.where(massive_mask(x), value[layer].to(x), x)):
        yield


@contextmanager
def before_layers(loaded: LoadedModel, function: See) -> Iterator[None]:
    """While the block runs, `function` sees, and may replace, what enters every layer."""

    def see(site: str, x: Tensor) -> Tensor | None:
        return function(int(site.split(".")[1]), x)

    with at_sites(loaded, see, sites_of(loaded, "residual")):
        yield
