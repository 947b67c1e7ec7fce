"""What the refinement explorer takes from a capture: rows to watch, tokens to choose from."""

import torch
from torch import Tensor

from dfrot_lab.observe.capture import Capture
from dfrot_lab.show.markup import visible

WATCHED = 4096
"""Rows the losses are drawn of at every step; the refinement's own checks are on all its rows."""
MASSIVE_ONES, OTHERS = 8, 4
"""Tokens offered: those with the largest value in the residual stream, and some ordinary ones."""


def watched(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """At most WATCHED of the rows (tokens, channels) and their mask, up to a quarter of them massive."""
    if len(rows) <= WATCHED:
        return rows, mask
    generator = torch.Generator().manual_seed(0)
    heavy, light = (
        found[torch.randperm(len(found), generator=generator)]
        for found in (mask.nonzero().flatten(), (~mask).nonzero().flatten())
    )
    heavy = heavy[: WATCHED // 4]
    chosen = torch.cat([heavy, light[: WATCHED - len(heavy)]])
    return rows[chosen], mask[chosen]


def choices(recorded: Capture, site: str) -> list[tuple[str, int]]:
    """Tokens of a site worth a look, as (label, position), the most massive first."""
    largest, texts = recorded.residual_max[recorded.place(site)], recorded.texts
    top = largest.argsort(descending=True)[:MASSIVE_ONES].tolist()
    even = torch.linspace(0, recorded.tokens - 1, OTHERS + 2).long().tolist()[1:-1]
    return [
        (f"{i}: {visible(texts[i])}  (residual |max| {float(largest[i]):.0f})", i)
        for i in dict.fromkeys([*top, *even])
    ]
