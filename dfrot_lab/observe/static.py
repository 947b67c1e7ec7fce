"""Static scales: for each site one scale (and zero point) that is the same for every token, found before the
model runs. As PrefixQuant has it (arXiv 2410.05265) on 8 windows, a grid of clip ratios over the range that
all their tokens together take, by squared error; its release searches ratios of 0.2 to 1 by what a block
computes, here down to 1/64 by the site's own values, since a massive token may be 100 times any other.

A site's values are counted in fine bins and rounded as their bin's middle, so that a ratio costs as much as
there are bins, not values; what that leaves out, a bin's width squared / 12 a value, all ratios share."""

import logging
from collections.abc import Iterable
from math import isfinite

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import Fixed, fake_quantize, scale_zero
from dfrot_lab.model import hooks
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.prefix import after
from dfrot_lab.model.stream import Walk
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.grids import QuantSpec

log = logging.getLogger(__name__)
KIND = "static"
RATIOS = tuple(2 ** (-step / 8) for step in range(49))  # 1 to 1/64: the error is flat about its least
BINS = 1 << 16


class _Site:
    """A site's range in its dtype, then how many values lie in each of BINS bins of it."""

    def __init__(self) -> None:
        self.range: Tensor | None = None
        self.counts: Tensor | None = None

    def widen(self, x: Tensor) -> None:
        """Take the values of `x` into the range (2,), least and largest."""
        seen = [x.amin(), x.amax()] if self.range is None else [*self.range, x.amin(), x.amax()]
        both = torch.stack(seen)
        self.range = torch.stack([both.amin(), both.amax()])

    def count(self, x: Tensor) -> None:
        """Count the values of `x`, which lie in the range."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        found = torch.histc(wide, BINS, *self.ends()).double()
        self.counts = found if self.counts is None else self.counts.add_(found)

    def ends(self) -> tuple[float, float]:
        """Where the bins begin and end: the range, or, where all values are one, of width 1."""
        assert self.range is not None
        low, high = self.range.tolist()
        return low, high if high > low else low + 1

    def best(self, grid: QuantSpec) -> Fixed:
        """The scale and zero point of least squared error over the values that were counted."""
        assert self.range is not None and self.counts is not None
        low, high = self.ends()
        edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
        centres, counts = (edges[1:] + edges[:-1]) / 2, self.counts.cpu()
        found = list(candidates(self.range, grid))
        lost = [float((fake_quantize(centres, grid, each) - centres).square() @ counts) for each in found]
        return found[lost.index(min(lost))]


def candidates(ends: Tensor, grid: QuantSpec) -> Iterable[Fixed]:
    """The scale and zero point of each of RATIOS of a range (2,), as a quantizer of a whole tensor has them:
    in the range's dtype, in which they will be used."""
    for ratio in RATIOS:
        scale, zero = scale_zero(ends[None], grid.with_(granularity="per_tensor", clip_ratio=ratio))
        yield Fixed(float(scale), float(zero))


def find(
    loaded: LoadedModel, ids: Tensor, grid: QuantSpec, online: hooks.Online, skip: int = 0
) -> dict[str, Fixed]:
    """By site the scale and zero point of the linears' inputs with the least squared error on a text `ids`
    (windows, window), but for the first tokens of each window to `skip`, while what is `online` acts. A site
    that no token reaches has none, and is named."""
    sites = hooks.sites_of(loaded, *hooks.LINEAR_INPUTS)
    seen: dict[str, _Site] = {}
    found: dict[str, Fixed] = {}
    is_counting = False

    def see(site: str, x: Tensor) -> None:
        if x.numel():
            own = seen.setdefault(site, _Site())
            (own.count if is_counting else own.widen)(after(x, skip))

    with torch.inference_mode(), online(function=see, sites=sites):
        walk = Walk(loaded, ids.split(1), name="static scales")
        for number in walk.layers():
            is_counting = False
            for x in walk.hidden:
                walk.run(number, x)
            is_counting = True
            for site, own in seen.items():
                require(f"activations of {site}", own.ends(), all(map(isfinite, own.ends())), "finite")
            walk.step(number)
            found |= {site: own.best(grid) for site, own in seen.items()}
            seen.clear()
    if unseen := [site for site in sites if site not in found]:
        said = "no token reached %d sites, so each token has a scale of its own there: %s"
        log.warning(said, len(unseen), ", ".join(unseen))
    return found
