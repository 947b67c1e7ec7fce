"""aespa (Kim et al., arXiv 2402.08958) as BoA (Kim et al., arXiv 2406.13474) rounds it: q, k and v by what
they do to their head's attention, all other linears by GPTQ. For the error dW (head size, in) of a head's
rows, and H = sum x x^T, scores change by tr(G dW H dW^T), G = K^T K for q and Q^T Q for k, each as it is in
the scores: since a token's place turns its rows by an R (`places`), G is the mean of R^T G R. What v's head
gives changes by tr(dW X A^T A X^T dW^T), A being its map. Heads that share keys and values are summed over.
Neither mask nor softmax is in G."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized, dequantize
from dfrot_lab.model.families import heads_of
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights import gptq, look, places
from dfrot_lab.weights.gptq import Seen, hessian_of, hessian_seen, inverse_factor

CALIBRATED = True
VERSION = 1


class Attention(NamedTuple):
    """Of a layer G of its `scores`, q's heads, then k's (heads + key-value heads, head size, head size), the
    Hessian of its `values` (key-value heads, in, in), and the `rows` where q, k and v lie (out,)."""

    scores: Tensor
    values: Tensor
    rows: Tensor


def quantize(weight: Tensor, seen: Seen | None, spec: WeightSpec) -> Quantized:
    """`weight` (out, in): of q, k and v, which have an `Attention`, by that; of others GPTQ. ValueError."""
    hessian = hessian_seen(seen, "aespa")
    about: Attention | None = seen and seen.attention
    if about is None:
        return gptq.quantize(weight, seen, spec)
    size = about.scores.shape[-1]
    sizes = [len(each) * size for each in about[:2]]
    scored, values = weight.float()[about.rows].split(sizes)
    parts = [row_by_row(scored.unflatten(0, (-1, size)), hessian, about.scores, spec)]
    for own, rows in zip(about.values, values.split(size), strict=True):
        parts.append(gptq.quantize(rows, Seen(own), spec))
    back = about.rows.argsort()
    every = (torch.cat(each).unflatten(0, (len(back), -1))[back] for each in zip(*parts, strict=True))
    return Quantized(*(each.flatten(0, 1) for each in every))


def row_by_row(weight: Tensor, hessian: Tensor, scores: Tensor, spec: WeightSpec) -> Quantized:
    """`weight` (heads, head size, in), the least tr(G dW H dW^T) sought: GPTQ of the Hessian G x H. First row
    of all heads, then second: each by GPTQ for H, then its error to the rows after it by the Cholesky factor
    of the inverse of G, `scores` (heads, head size, head size), as columns have theirs."""
    left, factor = weight.clone(), inverse_factor(hessian, spec.damping)
    upper = torch.stack([inverse_factor(own, spec.damping) for own in scores])
    upper = upper / upper.diagonal(dim1=1, dim2=2)[..., None]
    done = list[Quantized]()
    for row in range(weight.shape[1]):
        done.append(gptq.in_order(left[:, row], hessian, spec, factor))
        error = left[:, row] - dequantize(done[-1], left[:, row].shape)
        left[:, row + 1 :] -= upper[:, row, row + 1 :, None] * error[:, None]
    every = (
        torch.stack([x.unflatten(0, (len(weight), -1)) for x in each], 1) for each in zip(*done, strict=True)
    )
    return Quantized(*(each.flatten(0, 2) for each in every))


class Look(look.Look):
    """Sums over the chunks G before it is turned, and the Hessians of values."""

    def __init__(self, loaded: LoadedModel, number: int, skip: int) -> None:
        super().__init__(loaded, number, skip)
        self.heads, self.kv_heads, self.size = heads_of(loaded.config)
        make = partial(torch.zeros, self.kv_heads, device=loaded.device)
        self.keys, self.queries = make(self.size, self.size), make(self.size, self.size)  # K^T K, Q^T Q
        where = places.rows(loaded).to(loaded.device)
        self.told = Attention(self.keys, make(loaded.channels, loaded.channels), where)
        self.windows = 0  # of the first chunk
        self.probe: Tensor | None = None

    def see(self, x: Tensor, qkv: Sequence[Tensor], mask: Tensor | None, how: Mapping[str, Any]) -> None:
        """Adds a chunk."""
        if self.probe is not None:
            self.probe = qkv[0][..., self.skip :, :]
            return
        self.windows = self.windows or len(x)
        q, k = (each.transpose(0, 1).float() for each in qkv[:2])  # (heads, windows, tokens, size)
        for total, own in ((self.queries, q[:, :, self.skip :]), (self.keys, k)):
            rows = own.reshape(self.kv_heads, -1, self.size)
            total += rows.mT @ rows
        for window, part in self.parts(qkv, mask, how):
            mixed = (part @ x[window, : part.shape[-1]]).unflatten(0, (self.kv_heads, -1)).flatten(1, 2)
            for total, own in zip(self.told.values, mixed, strict=True):
                total += hessian_of(own)

    def finish(self, again: Callable[[], None]) -> None:
        """Turns G back."""

        def show() -> Tensor:
            again()
            assert self.probe is not None
            return self.probe

        self.probe = torch.empty(0)
        turns = places.turns(self.loaded, self.layer, self.windows, show)
        found = list[Tensor]()
        for name, each, heads in (("q_norm", self.keys, self.heads), ("k_norm", self.queries, self.kv_heads)):
            own = places.turned_back(each, turns).repeat_interleave(heads // self.kv_heads, 0)
            gains = places.gains(self.loaded, self.layer, name, heads)
            found.append(own * gains * gains.mT)
        self.told = self.told._replace(scores=torch.cat(found))

    def of(self, site: str) -> Attention | None:
        """Of q, k and v alone."""
        return self.told if site == look.INPUT else None
