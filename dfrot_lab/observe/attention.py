"""Attention maps of one window, head by head, and the attention sink (Xiao et al., arXiv 2309.17453; Gu et
al., arXiv 2410.10781): what a token gets of the attention that later tokens give away.

A head's weights are softmax(q k^T scaling + mask), where a family bounds its scores with softcap c after
c tanh(scores / c). They are made again from the q, k, mask and scaling that the model's own attention is
called with, in float32, a few queries at a time: a layer's map is never whole unless it is asked for."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.model import hooks
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.stream import Walk
from dfrot_lab.observe.inside import layers_of
from dfrot_lab.recipe.base import require

QUERIES = 256  # whose weights exist at once, of all heads: at 2048 tokens and 32 heads, 64 MiB
Part = Callable[[int, int, Tensor], None]  # a layer, its first query, weights (heads, queries, tokens)


def weights(
    q: Tensor, k: Tensor, mask: Tensor | None, how: Mapping[str, Any], queries: int = QUERIES
) -> Iterator[tuple[int, Tensor]]:
    """Attention weights of one window's q (heads, tokens, head size) and k (key-value heads, tokens, head
    size): the first query and (heads, queries, tokens) float32, a few queries at a time. `mask`: True where
    a query may look (heads or 1, tokens, tokens), or what is added to scores; None: at no later token."""
    k = k.float().repeat_interleave(len(q) // len(k), 0)
    scaling, softcap = how.get("scaling"), how.get("softcap")
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    for first in range(0, q.shape[1], queries):
        scores = (q[:, first : first + queries].float() @ k.mT).mul_(scaling)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        rows = slice(first, first + scores.shape[1])
        if mask is None:
            later = torch.ones_like(scores[0], dtype=torch.bool).triu_(first + 1)
            scores.masked_fill_(later, -torch.inf)
        elif mask.dtype == torch.bool:
            scores.masked_fill_(~mask[:, rows], -torch.inf)
        else:
            scores += mask[:, rows]
        yield first, scores.softmax(-1)


@torch.inference_mode()
def through(
    loaded: LoadedModel, ids: Tensor, see: Part, layers: Collection[int] | None = None, queries: int = QUERIES
) -> Tensor:
    """Pass one window of ids (tokens,) and show `see` the attention weights of `layers`, by default all, part
    by part; what leaves the last layer (tokens, channels). ValueError: no such layer."""
    chosen = layers_of(loaded, layers)

    def show(layer: int, seen: list[Tensor | None], how: Mapping[str, Any]) -> None:
        q, k, _, mask = seen
        if layer in chosen and q is not None and k is not None:
            for first, part in weights(q[0], k[0], None if mask is None else mask[0], how, queries):
                see(layer, first, part)

    with hooks.at_attention(loaded, show):
        return Walk(loaded, [ids[None]]).through()[0][0]


def maps(
    loaded: LoadedModel, ids: Tensor, layers: Collection[int], queries: int = QUERIES
) -> dict[int, Tensor]:
    """The attention weights of some layers (heads, tokens, tokens), query by key, float32 on the CPU."""
    parts: dict[int, list[Tensor]] = {}
    through(
        loaded, ids, lambda layer, _, part: parts.setdefault(layer, []).append(part.cpu()), layers, queries
    )
    return {layer: torch.cat(own, 1) for layer, own in parts.items()}


def shares(
    loaded: LoadedModel, ids: Tensor, layers: Collection[int] | None = None, queries: int = QUERIES
) -> tuple[Tensor, Tensor]:
    """The share of their attention that later tokens give to each token, on average over them: (layers,
    heads, tokens) float64, from 0 to 1; NaN for the last token, which none comes after. And what leaves the
    last layer (tokens, channels)."""
    require("ids", f"{len(ids)} tokens", len(ids) > 1, "of two tokens or more: a sink has one behind it")
    given: dict[int, Tensor] = {}

    def add(layer: int, first: int, part: Tensor) -> None:
        own = part.tril(first - 1).sum(1, dtype=torch.float64).cpu()
        given[layer] = given[layer] + own if layer in given else own

    hidden = through(loaded, ids, add, layers, queries)
    after = torch.arange(len(ids) - 1, -1, -1, dtype=torch.float64)
    found = torch.stack([given[layer] for layer in sorted(given)])
    return found / torch.where(after == 0, math.nan, after), hidden
