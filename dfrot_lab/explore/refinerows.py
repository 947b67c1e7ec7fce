"""What the refinement explorer takes from a capture: rows to watch, tokens to choose from."""

import torch
from torch import Tensor

from dfrot_lab.observe.capture import Capture

from . import base

WATCHED = 4096
"""Rows the losses are drawn of at every step; the refinement's own checks are on all its rows."""


def watched(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """At most WATCHED of the rows (tokens, channels) and their mask: a quarter of them massive where there
    are so many.
    """
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


def choices(recorded: Capture, site: str, massive_ones: int = 8, others: int = 4) -> list[tuple[str, int]]:
    """Tokens of a site worth a look, as (label, position): those with the largest value in the residual
    stream, and some ordinary ones.
    """
    largest = recorded.residual_max[recorded.place(site)]
    top = largest.argsort(descending=True)[:massive_ones].tolist()
    even = [
        i for i in torch.linspace(0, recorded.tokens - 1, others + 2).long().tolist()[1:-1] if i not in top
    ]
    texts = recorded.texts
    return [
        (f"{i}: {base.visible(texts[i])}  (residual |max| {float(largest[i]):.0f})", i) for i in [*top, *even]
    ]
