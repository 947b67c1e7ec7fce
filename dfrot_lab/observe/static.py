"""Static scales: for each site one scale (and zero point) that is the same for every token, found before the
model runs. As PrefixQuant has it (arXiv 2410.05265) on 8 windows, a grid of clip ratios over the range that
all their tokens together take, by squared error; its release searches ratios of 0.2 to 1 by what a block
computes, here down to 1/64 by the site's own values, since a massive token may be 100 times any other.

A site's values are counted in fine bins and rounded as their bin's middle, so that a ratio costs as much as
there are bins, not values; what that leaves out, a bin's width squared / 12 a value, all ratios share. Until
its windows have passed, a layer's inputs stay in memory."""

import logging
from collections.abc import Iterable, Sequence
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


def best(parts: Sequence[Tensor], grid: QuantSpec, site: str = "a site") -> Fixed:
    """The scale and zero point of least squared error over all values of a site, in `parts`. ValueError: NaN
    or Inf among them."""
    both = torch.stack([end for x in parts for end in x.aminmax()])
    low, high = ends = torch.stack([both.amin(), both.amax()])
    require(f"activations of {site}", ends.tolist(), all(map(isfinite, ends.tolist())), "finite")
    centres, counts = counted(parts, float(low), float(high))
    found = list(candidates(ends, grid))
    lost = [float((fake_quantize(centres, grid, each) - centres).square() @ counts) for each in found]
    return found[lost.index(min(lost))]


def counted(parts: Sequence[Tensor], low: float, high: float) -> tuple[Tensor, Tensor]:
    """The middles of BINS bins of a range, of one of no width of width 1, and how many values of `parts`
    lie in each, both (BINS,) float64."""
    high = high if high > low else low + 1
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    counts = torch.zeros(BINS, dtype=torch.float64)
    for x in parts:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        counts += torch.histc(wide, BINS, low, high).double().cpu()
    return (edges[1:] + edges[:-1]) / 2, counts


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
    seen: dict[str, list[Tensor]] = {}
    found: dict[str, Fixed] = {}

    def see(site: str, x: Tensor) -> None:
        if x.numel():
            seen.setdefault(site, []).append(after(x, skip))

    with torch.inference_mode(), online(function=see, sites=sites):
        walk = Walk(loaded, ids.split(1), name="static scales")
        for number in walk.layers():
            walk.step(number)
            for site in list(seen):
                found[site] = best(seen.pop(site), grid, site)
    if unseen := [site for site in sites if site not in found]:
        said = "no token reached %d sites, so each token has a scale of its own there: %s"
        log.warning(said, len(unseen), ", ".join(unseen))
    return found
