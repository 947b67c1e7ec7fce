"""aespa (Kim et al., arXiv 2402.08958) as BoA (Kim et al., arXiv 2406.13474) rounds it: q, k and v by what
they do to their head's attention, all other linears by GPTQ. For the error dW (head size, in) of a head's
rows, and H = sum x x^T, scores change by tr(G dW H dW^T), G = K^T K for q and Q^T Q for k, each as it is in
the scores: since RoPE turns a token's rows by an R of its place, G is the mean of R^T G R. What v's head
gives changes by tr(dW X A^T A X^T dW^T), A being its map. Heads that share keys and values are summed over.
Neither mask nor softmax is in G."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import Quantized, dequantize
from dfrot_lab.model.families import QKV, heads_of
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights import gptq, look
from dfrot_lab.weights.gptq import Seen, hessian_of, hessian_seen, inverse_factor

CALIBRATED = True
VERSION = 1
PLACES = 256  # whose turns are averaged over at once


class Attention(NamedTuple):
    """Of a layer G of its `rows`, q's heads and k's, in this order (heads + key-value heads, head size, head
    size), and the Hessian of its `values` (key-value heads, in, in)."""

    rows: Tensor
    values: Tensor


def quantize(weight: Tensor, seen: Seen | None, spec: WeightSpec) -> Quantized:
    """`weight` (out, in): of q, k and v, which have an `Attention`, by that; of others GPTQ. ValueError."""
    hessian = hessian_seen(seen, "aespa")
    about: Attention | None = seen and seen.attention
    if about is None:
        return gptq.quantize(weight, seen, spec)
    size = about.rows.shape[-1]
    scored, values = weight.float().split([len(about.rows) * size, len(about.values) * size])
    parts = [row_by_row(scored.unflatten(0, (-1, size)), hessian, about.rows, spec)]
    for own, rows in zip(about.values, values.split(size), strict=True):
        parts.append(gptq.quantize(rows, Seen(own), spec))
    return Quantized(*(torch.cat(each) for each in zip(*parts, strict=True)))


def row_by_row(weight: Tensor, hessian: Tensor, rows: Tensor, spec: WeightSpec) -> Quantized:
    """`weight` (heads, head size, in), the least tr(G dW H dW^T) sought: GPTQ of the Hessian G x H. First row
    of all heads, then second: each by GPTQ for H, then its error to the rows after it by the Cholesky factor
    of the inverse of G of `rows` (heads, head size, head size), as columns have theirs."""
    left, factor = weight.clone(), inverse_factor(hessian, spec.damping)
    upper = torch.stack([inverse_factor(own, spec.damping) for own in rows])
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
        self.told = Attention(self.keys, make(loaded.channels, loaded.channels))
        self.windows = 0  # of the first chunk
        self.probes: list[Tensor] | None = None

    @staticmethod
    def why_not(loaded: LoadedModel, /) -> str | None:
        """What lies between a linear and the scores must be linear, and q, k and v linears of their own."""
        if loaded.roles.feeds[0][2] != QKV:
            return "its queries, keys and values come from one linear"
        if any(name.endswith("q_norm") for name, _ in loaded.layers[0].named_modules()):
            return "a norm lies between the linear of its queries and the scores"
        return None

    def see(self, x: Tensor, qkv: Sequence[Tensor], mask: Tensor | None, how: Mapping[str, Any]) -> None:
        """Adds a chunk."""
        if self.probes is not None:
            self.probes.append(qkv[0][..., self.skip :, :].float())
            return
        self.windows = self.windows or len(x)
        q, k = (each.transpose(0, 1).float() for each in qkv[:2])  # (heads, windows, tokens, size)
        for total, own in ((self.queries, q[:, :, self.skip :]), (self.keys, k)):
            rows = own.reshape(self.kv_heads, -1, self.size)
            total += rows.mT @ rows
        for window, first, part in self.parts(qkv, mask, how):
            stop = first + part.shape[1]  # no token looks further
            mixed = (part[..., :stop] @ x[window, :stop]).unflatten(0, (self.kv_heads, -1)).flatten(1, 2)
            for total, own in zip(self.told.values, mixed, strict=True):
                total += hessian_of(own)

    def finish(self, again: Callable[[], None]) -> None:
        """Turns G back."""
        turns = self._turns(again)
        keys, queries = turned_back(self.keys, turns), turned_back(self.queries, turns)
        keys = keys.repeat_interleave(self.heads // self.kv_heads, 0)
        self.told = self.told._replace(rows=torch.cat([keys, queries]))

    def _turns(self, again: Callable[[], None]) -> Tensor:
        """What queries pass on their way to the scores, RoPE and R3: R (tokens, size, size), R q for columns.
        In place of what their linear writes, each head of each window has, at all tokens, a column of the
        identity: what becomes of it is R's. Keys pass the same, up to a factor, which G does not feel."""
        self.probes, many = [], self.windows * self.heads
        for own in torch.eye(self.size).split(many):
            units = torch.cat([own, own.new_zeros(many - len(own), self.size)]).reshape(self.windows, 1, -1)
            with ExitStack() as stack:
                put = partial(_instead, units)
                stack.callback(linear(self.layer, QKV[0]).register_forward_hook(put).remove)
                again()
        found = torch.cat([probe.flatten(0, 1) for probe in self.probes])[: self.size]
        self.probes = None
        return found.permute(1, 2, 0)  # it was (columns, tokens, size)

    def of(self, site: str) -> Attention | None:
        """Of q, k and v alone."""
        return self.told if site == look.INPUT else None


def _instead(units: Tensor, _linear: Any, _args: Any, out: Tensor) -> Tensor:
    return units.to(out).expand_as(out)


def turned_back(each: Tensor, turns: Tensor) -> Tensor:
    """The mean over tokens of R^T G R, for G (heads, size, size) and `turns` R (tokens, size, size)."""
    total = torch.zeros_like(each)
    for part in turns.split(PLACES):
        flat = part.reshape(-1, part.shape[-1])
        for head, own in enumerate(each):
            total[head] += (own @ part).reshape_as(flat).T @ flat
    return total / len(turns)
