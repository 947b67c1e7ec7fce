"""Linears in integer arithmetic: the int8 product of activation and weight codes, then the scales. For a
token with scale s, codes q, zero point z, and an output channel with scale t, codes p, sum of s (q - z) t p =
s t (sum of (q - z) p): the left is what fake quantization computes, the right the same at int8's speed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor, nn

from dfrot_lab.maths.quantizers import Fixed, Quantized, centred
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.model.parts import Transform
from dfrot_lab.model.stream import dressed
from dfrot_lab.recipe.grids import QuantSpec

Maybe = Transform | None
_Coded = tuple[Tensor, Tensor, Tensor, Tensor | None]  # activation, codes less zeros, scales, rows spared
_ROWS = 512  # tokens worked on at once: what is between input, codes, int32 sums and result stays in cache


def fits(spec: QuantSpec) -> bool:
    """Whether codes less their zero point fit int8, one scale a token; in the free scheme the zero point may
    lie anywhere."""
    return spec.group_size is None and spec.scheme != "free" and spec.bits <= (8 if spec.symmetric else 7)


@cache
def _fast_on_cpu() -> bool:
    """Whether the CPU has instructions for int8: without, torch's product takes 50 times float32's time."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (m, k) @ b.T for int8 `a`, `b` (n, k): int32 (m, n), exact; by floats where int8 is not fast."""
    if (len(a) > 16 and a.shape[1] % 8 == 0 and len(b) % 8 == 0) if a.is_cuda else _fast_on_cpu():
        return torch._int_mm(a, b.T)
    largest = a.shape[1] * math.prod(int(x.to(torch.int16).abs().max()) for x in (a, b))
    exact = torch.float32 if largest < 1 << 24 else torch.float64
    return (a.to(exact) @ b.to(exact).T).to(torch.int32)


class _Input:
    """The activation last quantized: q, k and v (gate and up) read one tensor, and the first quantizes it."""

    def __init__(self) -> None:
        self.last: _Coded | None = None

    def take(
        self, x: Tensor, spec: QuantSpec, before: Maybe, spare: Maybe, fixed: Fixed | None = None
    ) -> _Coded:
        """`x` as codes, by a `fixed` scale where there is one; what was held before is dropped first."""
        if self.last is None or self.last[0] is not x:
            self.last = None
            rows = x.reshape(-1, x.shape[-1])
            codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
            parts = zip(rows.split(_ROWS), codes.split(_ROWS), strict=True)
            before = before or (lambda part: part)
            scale = torch.cat([centred(before(part), spec, out, fixed) for part, out in parts])
            self.last = (x, codes, scale, spare(rows).nonzero().flatten() if spare else None)
        return self.last


class IntegerLinear(nn.Module):
    """In place of a linear with quantized weights: quantizes its input per token, or by a `fixed` scale, and
    multiplies codes, scales; `before` transforms the input first (R4), rows that `spare` marks (tokens,) stay
    in floats."""

    def __init__(
        self, own: nn.Linear, weight: Quantized, source: _Input, spec: QuantSpec, before: Maybe,
        spare: Maybe, fixed: Fixed | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.fixed = fixed
        self.original, self.codes, self.scale = own, weight.codes, weight.scale.flatten()
        self.source, self.spec, self.before, self.spare = source, spec, before, spare

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x's dtype."""
        _, all_codes, scales, spared = self.source.take(x, self.spec, self.before, self.spare, self.fixed)
        wide = torch.promote_types(x.dtype, torch.float32)  # an int32 sum may be too large for 16 bits
        out = x.new_empty(len(all_codes), len(self.codes), dtype=wide)
        for codes, scale, result in zip(
            *(whole.split(_ROWS) for whole in (all_codes, scales, out)), strict=True
        ):
            result.copy_(product(codes, self.codes)).mul_(scale).mul_(self.scale)
        if self.original.bias is not None:
            out += self.original.bias
        if spared is not None:
            out[spared] = self.original(x.reshape(-1, x.shape[-1])[spared]).to(wide)
        return out.reshape(*x.shape[:-1], -1).to(x.dtype)


def _rounded_at(loaded: LoadedModel, site: str) -> str:
    """Where what a group of linears reads is rounded: an expert's input, as all tokens pass the norm."""
    return loaded.roles.feeds[1][0] if site.endswith("mlp_in") else site


@contextmanager
def integer_linears(
    loaded: LoadedModel, codes: Sequence[Mapping[str, Quantized]], spec: QuantSpec, *, r4: Maybe,
    spare: Maybe, clips: Mapping[str, float] = MappingProxyType({}),
    static: Mapping[str, Fixed] = MappingProxyType({}),
) -> Iterator[None]:  # fmt: skip
    """While it runs, linears are `IntegerLinear`s on `codes`; `r4` is on down_proj, `spare` at norms; `clips`
    are clip ratios and `static` fixed scales by site, where one has its own."""
    source = _Input()
    after_norm = [name for _, _, names in loaded.roles.feeds for name in names]

    @contextmanager
    def replaced(number: int) -> Iterator[None]:
        layer, downs = loaded.layers[number], loaded.roles.downs(loaded.layers[number])
        groups = loaded.roles.groups(layer).items()
        sites = {name: _rounded_at(loaded, site) for site, names in groups for name in names}
        with ExitStack() as stack:
            stack.callback(setattr, source, "last", None)
            for name, weight in codes[number].items():
                original, before = linear(layer, name), r4 if name in downs else None
                spared = spare if name in after_norm else None
                site = f"layers.{number}.{sites[name]}"
                grid = spec.with_(clip_ratio=clips.get(site, spec.clip_ratio))
                own = grid, before, spared, static.get(site)
                layer.set_submodule(name, IntegerLinear(original, weight, source, *own))
                stack.callback(layer.set_submodule, name, original)
            yield

    with dressed(loaded, replaced):
        yield
