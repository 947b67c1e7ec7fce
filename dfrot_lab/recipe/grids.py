"""How one tensor is quantized, said immutably; and the grids that are the defaults."""

from typing import Any, ClassVar

from dfrot_lab.recipe import registry
from dfrot_lab.recipe.base import Spec, one_of, require, ruled

SCHEMES = {"symmetric": "sym", "asymmetric": "asym", "free": "free"}
"""Ranges and short names: in asymmetric 0 always lies (released code), free is min to max (DFRot, Eq. 5)."""
BLOCK_FLOATS = {"mxfp4": 32, "nvfp4": 16}
"""Formats of 4-bit floats (`maths.block_floats`), by the channels that share a scale."""
GRANULARITIES = {
    "per_token": "", "per_channel": "-channel", "per_group": "-head", "per_tensor": "-tensor",
    "static": "-static",
}  # fmt: skip
"""What shares one scale, and its mark in a quantizer's name; a group of a given size is marked `-g128`."""
GROUPED = "a whole number >= 1, with granularity per_group"


class QuantSpec(Spec):
    """How one tensor is quantized; `bits=16`: not at all. `granularity` says what shares one scale: a token,
    a weight's output channel, a group of `group_size` channels (a head where none is given), the tensor; or,
    `static`, whatever passes one place in the model, by a scale that was found before it ran. A `scheme` of
    BLOCK_FLOATS is not a grid but a format of floats, with blocks of its own size. `method`: of
    the KV cache another quantizer than a grid for each token (registry.CACHES), with `residual` (the last
    tokens, which stay float) or `seed` (of what is random in it), where it takes them."""

    LATER: ClassVar[tuple[str, ...]] = ("method", "residual", "seed")

    bits: int = ruled(4, "a whole number in 2..16", ge=2, le=16)
    scheme: str = one_of("symmetric", (*SCHEMES, *BLOCK_FLOATS))
    clip_ratio: float = ruled(1.0, "in (0, 1]", gt=0, le=1)
    granularity: str = one_of("per_token", tuple(GRANULARITIES))
    group_size: int | None = ruled(None, GROUPED, ge=1)
    method: str | None = None
    residual: int | None = ruled(None, "None or a whole number >= 0", ge=0)
    seed: int | None = ruled(None, "None or a whole number in 0..2^63", ge=0, lt=1 << 63)

    def _check(self) -> None:
        self._require("group_size", self.group_size is None or self.granularity == "per_group", GROUPED)
        if size := BLOCK_FLOATS.get(self.scheme):
            fixed = {"bits": 4, "clip_ratio": 1, "granularity": "per_group", "group_size": size}
            self._require_fixed({"method": None, **fixed}, f"scheme {self.scheme}")
        known, own = list(registry.CACHES), dict[str, Any]()
        if self.method is not None:
            self._require("method", self.method in known, f"None or one of {', '.join(known)}")
            own = dict(registry.CACHES[self.method].fields)
            fixed = {"granularity": "per_group", "clip_ratio": 1, "scheme": own.get("scheme", "symmetric")}
            self._require_fixed(fixed, f"method {self.method}")
        for name in ("residual", "seed", *(("group_size",) if self.method else ())):
            fits = (getattr(self, name) is not None) == (name in own)
            rule = "given" if name in own else "None"
            self._require(name, fits, f"{rule} with method {self.method}")

    def _require_fixed(self, fixed: dict[str, Any], why: str) -> None:
        for name, value in fixed.items():
            self._require(name, getattr(self, name) == value, f"{value!r} with {why}")

    @property
    def symmetric(self) -> bool:
        """Whether the range is symmetric about 0, so that the zero point is 0."""
        return self.scheme == "symmetric"

    @property
    def name(self) -> str:
        """Short name for tables: `sym4`, `asym4-c0.9`, `sym4-channel`, `asym4-g128`; with a method
        `kivi2-g32-r128`, `qjl4-s0`; a format's own; `none` at 16 bits."""
        if self.bits == 16:
            return "none"
        if self.scheme in BLOCK_FLOATS:
            return self.scheme
        if self.method is not None:
            said = {"g": self.group_size, "r": self.residual, "s": self.seed}
            own = [f"-{letter}{value}" for letter, value in said.items() if value is not None]
            return f"{self.method}{self.bits}{''.join(own)}"
        clip = f"-c{self.clip_ratio}" if self.clip_ratio != 1 else ""
        shared = f"-g{self.group_size}" if self.group_size else GRANULARITIES[self.granularity]
        return f"{SCHEMES[self.scheme]}{self.bits}{clip}{shared}"


def of_scheme(scheme: str, bits: int) -> QuantSpec:
    """The spec of a token's grid of a scheme at `bits`, or of a format of BLOCK_FLOATS. ValueError."""
    if size := BLOCK_FLOATS.get(scheme):
        return QuantSpec(bits=bits, scheme=scheme, granularity="per_group", group_size=size)
    return QuantSpec(bits=bits, scheme=scheme)


SYM4 = QuantSpec()  # symmetric, 4 bits, a scale a token: what the paper's errors are measured with
ACTIVATIONS = QuantSpec(scheme="asymmetric")
KV_CACHE = QuantSpec(bits=16, scheme="asymmetric", granularity="per_group")  # a scale a token and head
PER_TOKEN = "per-token"  # the name of KV_CACHE's own grid among the KV quantizers


def cache_of(name: str, bits: int, *, seed: int = 0, **fields: Any) -> dict[str, QuantSpec]:
    """The specs of keys and values that a KV quantizer (`per-token`, or of registry.CACHES) has at `bits`;
    `fields` in place of its usual ones. What it does not hold is per token. ValueError: no such."""
    names = (PER_TOKEN, *registry.CACHES)
    require("a KV quantizer", repr(name), name in names, f"one of {', '.join(names)}")
    plain = KV_CACHE.with_(bits=bits)
    if name == PER_TOKEN:
        return {"keys": plain, "values": plain}
    choice = registry.CACHES[name]
    own = {"scheme": "symmetric", **choice.fields, **fields}
    own |= {"seed": seed} if "seed" in choice.fields else {}
    spec = plain.with_(method=name, **own)
    return {held: spec if held in choice.holds else plain for held in ("keys", "values")}


def require_cache(held: str, spec: QuantSpec, window: int) -> None:
    """Refuse what a recipe cannot hold its keys or values in, and a window of which no token would be
    rounded; ValueError."""
    rule = "per_group (one scale a token and head, or a part of a head)"
    require(f"Recipe.{held}", repr(spec), spec.granularity == "per_group", rule)
    able = [name for name, choice in registry.CACHES.items() if held in choice.holds]
    rule = f"of method None, {', '.join(able)}"
    require(f"Recipe.{held}", repr(spec), spec.method in (None, *able), rule)
    if spec.residual is not None and spec.bits < 16:
        least = spec.residual + int(spec.group_size or 1)
        rule = f">= residual + group_size = {least}, or no token of {held} is rounded"
        require("Recipe.window", window, window >= least, rule)
