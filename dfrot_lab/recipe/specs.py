"""What to do, said immutably: every spec validates itself, and `spec.key` is the content hash that names its
artefact.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

WINDOW = 2048
"""Tokens in one window: the length DFRot, QuaRot and GPTQ calibrate and evaluate with."""

DEFAULT_MODEL = "smollm2-135m"

ROTATION_KINDS = ("NR", "RO", "RH", "file")
SPLITS = ("calibration", "evaluation", "train", "valid", "test")
MASSIVE_RULES = ("sun", "nr_error", "ro_vs_nr", "ratio")
REFINE_VARIANTS = ("accelerated", "guarded", "as_paper", "as_released")
WEIGHT_METHODS = ("gptq", "rtn")
GRANULARITIES = ("per_token", "per_channel", "per_group", "per_tensor")
DTYPES = ("float32", "float64", "bfloat16", "float16")
KEEP_OUT_RULES = ("nr_error", "ro_vs_nr")
"""Rules that judge a token by its own row: those `QuaRot.FP16()` can use while the model runs."""
KEEP_OUT_COUNTS = ("most_massive", "worst", "random")
"""Which `keep_out_tokens` of a window to keep out: those with the largest value, those with the largest
error, or any.
"""
SET_MASSIVE = ("zero", "mean")

LATER = {"later": True}
"""Marks a field added when results were stored already: at its default it is left out of the key, so that
they are still found.
"""


def content_key(value: Any) -> str:
    """The first 32 hex digits of the sha256 of a JSON-able value: equal values have equal keys, in any
    process.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: Any, kind: Any) -> Any:
    """A field's value as plain JSON: a whole number in a float field as a float, so that equal specs have
    equal keys; infinity as text.
    """
    if isinstance(value, Spec):
        return value.to_dict()
    return value if kind is not float else "inf" if value == math.inf else float(value)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of all specs: frozen, keyword-only; an unknown field is a TypeError, a bad one a ValueError that
    names it.
    """

    def _require(self, name: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ValueError(f"{type(self).__name__}.{name} must be {rule}; got {getattr(self, name)!r}")

    def _require_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        self._require(
            name,
            isinstance(value, int) and not isinstance(value, bool) and value >= least,
            f"a whole number >= {least}",
        )

    def _require_one_of(self, name: str, choices: tuple[str | None, ...]) -> None:
        self._require(name, getattr(self, name) in choices, f"one of {', '.join(map(str, choices))}")

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values, nested specs included, with the class name under `spec`."""
        said = [f for f in fields(self) if not ("later" in f.metadata and getattr(self, f.name) == f.default)]
        return {"spec": type(self).__name__, **{f.name: _plain(getattr(self, f.name), f.type) for f in said}}

    @property
    def key(self) -> str:
        """Content hash of the spec (32 hex digits)."""
        return content_key(self.to_dict())

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Spec):
    """Which language model: `smollm2-135m` (packaged), a folder, a `.gguf` file, or `hub:owner/name` (the
    only form that uses the network).
    """

    source: str = DEFAULT_MODEL
    dtype: str = "float32"
    revision: str | None = None

    def __post_init__(self) -> None:
        self._require(
            "source", bool(self.source.strip()), "a packaged name, a folder, a .gguf file or hub:owner/name"
        )
        self._require_one_of("dtype", DTYPES)


@dataclass(frozen=True, kw_only=True)
class CorpusSpec(Spec):
    """Which text: `auto`, `wikitext2`, `wikipedia-sample` or a text file; and which part of it.

    `calibration` and `evaluation` are a corpus's own halves: the valid and test split of WikiText-2, two sets
    of articles of the sample.
    """

    name: str = "auto"
    split: str = "evaluation"

    def __post_init__(self) -> None:
        self._require("name", bool(self.name.strip()), "auto, wikitext2, wikipedia-sample or a text file")
        self._require_one_of("split", SPLITS)


@dataclass(frozen=True, kw_only=True)
class RotationSpec(Spec):
    """One orthogonal matrix: NR (identity), RO (random orthogonal), RH (random Hadamard), or a safetensors
    file.

    `block` makes it block-diagonal with blocks of that many channels: `RH` with `block=312` is named
    `RH-b312`.
    """

    kind: str = "RH"
    seed: int = 0
    block: int | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        self._require_one_of("kind", ROTATION_KINDS)
        self._require_whole("seed", 0)
        self._require("block", self.block is None or self.block >= 1, "None or >= 1")
        self._require(
            "path", (self.path is not None) == (self.kind == "file"), "given for kind 'file' and for no other"
        )

    @property
    def name(self) -> str:
        """Short name for tables and figures: NR, RO, RH, RH-b312, or the file's name."""
        if self.kind == "file":
            return str(self.path).replace("\\", "/").rsplit("/", 1)[-1]
        return self.kind if self.block is None else f"{self.kind}-b{self.block}"


@dataclass(frozen=True, kw_only=True)
class QuantSpec(Spec):
    """How one tensor is quantized; `bits=16` means: leave it alone.

    `granularity` says what shares one scale: a token (row), an output channel of a weight (row), a group of
    `group_size` channels, or the tensor.
    """

    bits: int = 4
    symmetric: bool = True
    clip_ratio: float = 1.0
    granularity: str = "per_token"
    group_size: int | None = None

    def __post_init__(self) -> None:
        self._require("bits", isinstance(self.bits, int) and 2 <= self.bits <= 16, "a whole number in 2..16")
        self._require("clip_ratio", 0 < self.clip_ratio <= 1, "in (0, 1]")
        self._require_one_of("granularity", GRANULARITIES)
        grouped = self.granularity == "per_group"
        self._require(
            "group_size",
            self.group_size is None or (grouped and self.group_size >= 1),
            "a whole number >= 1, with granularity per_group",
        )

    @property
    def name(self) -> str:
        """Short name for tables: `sym4`, `asym4`, `asym4-c0.9`; `none` at 16 bits."""
        if self.bits == 16:
            return "none"
        return f"{'sym' if self.symmetric else 'asym'}{self.bits}" + (
            f"-c{self.clip_ratio:g}" if self.clip_ratio != 1 else ""
        )


@dataclass(frozen=True, kw_only=True)
class CaptureSpec(Spec):
    """Which activations to record: all norm outputs of `model`, norms fused, for `tokens` tokens of `corpus`
    after the first `skip` windows.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    corpus: CorpusSpec = field(default_factory=lambda: CorpusSpec(split="calibration"))
    tokens: int = WINDOW
    skip: int = field(default=0, metadata=LATER)

    def __post_init__(self) -> None:
        self._require_whole("tokens", 1)
        self._require_whole("skip", 0)


@dataclass(frozen=True, kw_only=True)
class RefineSpec(Spec):
    """How to refine R1 (DFRot, Eq. 2-8): rows, start, massive weight `gamma` (gamma^2 in the squared loss),
    steps, quantizer, variant.

    `as_paper` runs the paper's steps and returns the last R, `guarded` the best by the weighted objective;
    `accelerated` (default) minimises that objective in a sixth of the time; `as_released` is the released
    code: QR after the SVD (which flips signs), its accept test; it was released with a symmetric quantizer.
    `gamma=inf` fits the massive rows alone; `rows` takes a random sample of that many rows.
    """

    capture: CaptureSpec = field(default_factory=CaptureSpec)
    init: RotationSpec = field(default_factory=RotationSpec)
    gamma: float = 100.0
    rule: str = "nr_error"
    steps: int = 100
    quantizer: QuantSpec = field(default_factory=lambda: QuantSpec(symmetric=False))
    variant: str = "accelerated"
    rows: int | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        self._require("gamma", self.gamma > 0, "> 0")
        self._require_one_of("rule", MASSIVE_RULES)
        self._require_whole("steps", 1)
        self._require_one_of("variant", REFINE_VARIANTS)
        self._require("quantizer", self.quantizer.bits < 16, "a quantizer of fewer than 16 bits")
        if self.rows is not None:
            self._require_whole("rows", 1)
        self._require(
            "gamma", self.gamma < math.inf or self.variant != "as_released", "finite with variant as_released"
        )

    @property
    def name(self) -> str:
        """Name for tables and figures: always DFRot; gamma, rule and variant have their own columns."""
        return "DFRot"


@dataclass(frozen=True, kw_only=True)
class WeightSpec(Spec):
    """How the linears' weights are quantized: `gptq` on `windows` calibration windows, or `rtn`; per-channel
    symmetric with clip search.
    """

    method: str = "gptq"
    quantizer: QuantSpec = field(default_factory=lambda: QuantSpec(granularity="per_channel"))
    clip_search: bool = True
    damping: float = 0.01
    corpus: CorpusSpec = field(default_factory=lambda: CorpusSpec(split="calibration"))
    windows: int = 16
    window: int = WINDOW

    def __post_init__(self) -> None:
        self._require_one_of("method", WEIGHT_METHODS)
        self._require("damping", self.damping > 0, "> 0")
        self._require_whole("windows", 1)
        self._require_whole("window", 2)
        self._require(
            "quantizer",
            self.quantizer.granularity == "per_channel" and self.quantizer.symmetric,
            "per_channel and symmetric",
        )


def _activations(bits: int = 4) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=False)


def _kv(bits: int = 16) -> QuantSpec:
    return QuantSpec(bits=bits, symmetric=False, granularity="per_group")


@dataclass(frozen=True, kw_only=True)
class EvalSpec(Spec):
    """One row of a results table: a model, a rotation, the bits of weights, activations and KV cache, and the
    text it is scored on.

    `keep_out` names the rule by which massive tokens pass the q, k, v, gate and up inputs unquantised
    (`QuaRot.FP16()`), or which `keep_out_tokens` of a window do; None quantizes all. `set_massive` overwrites
    massive values of the residual stream (Sun et al.).
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    corpus: CorpusSpec = field(default_factory=CorpusSpec)
    rotation: RotationSpec | RefineSpec = field(default_factory=RotationSpec)
    weights: WeightSpec = field(default_factory=WeightSpec)
    activations: QuantSpec = field(default_factory=_activations)
    kv: QuantSpec = field(default_factory=_kv)
    keep_out: str | None = None
    windows: int = 6
    window: int = WINDOW
    keep_out_tokens: int | None = field(default=None, metadata=LATER)
    set_massive: str | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        self._require_whole("windows", 1)
        self._require_whole("window", 2)
        self._require("activations", self.activations.granularity == "per_token", "per_token")
        self._require(
            "kv",
            self.kv.granularity == "per_group",
            "per_group (one scale a token and head, or a part of a head)",
        )
        self._require_one_of("keep_out", (None, *KEEP_OUT_RULES, *KEEP_OUT_COUNTS))
        counted = self.keep_out in KEEP_OUT_COUNTS
        self._require(
            "keep_out_tokens",
            (self.keep_out_tokens is not None) == counted,
            f"given for keep_out {', '.join(KEEP_OUT_COUNTS)} alone",
        )
        if self.keep_out_tokens is not None:
            self._require_whole("keep_out_tokens", 1)
        self._require_one_of("set_massive", (None, *SET_MASSIVE))
        unrotated = isinstance(self.rotation, RotationSpec) and self.rotation.kind == "NR"
        self._require(
            "set_massive",
            self.set_massive is None or unrotated,
            "None with a rotation: it spreads massive values over all channels",
        )

    @property
    def bits(self) -> str:
        """Bits of weights, activations and KV cache, as in the paper's tables: `4-4-16`."""
        return f"{self.weights.quantizer.bits}-{self.activations.bits}-{self.kv.bits}"


def parse_bits(text: str) -> tuple[int, int, int]:
    """`4-4-16` as (weights, activations, kv); anything else is a ValueError that says the form."""
    parts = text.split("-")
    if len(parts) != 3 or not all(p.isdecimal() and p.isascii() for p in parts):
        raise ValueError(f"bits must be WEIGHTS-ACTIVATIONS-KV such as 4-4-16; got {text!r}")
    weights, activations, kv = (int(p) for p in parts)
    return weights, activations, kv


def eval_spec(bits: str, *, weights: str = "gptq", **fields: Any) -> EvalSpec:
    """The EvalSpec of `bits` such as `4-4-16` with default quantizers: W per-channel symmetric, A per-token
    and KV per-head asymmetric.
    """
    w_bits, a_bits, kv_bits = parse_bits(bits)
    weight_spec = WeightSpec(method=weights, quantizer=QuantSpec(bits=w_bits, granularity="per_channel"))
    return EvalSpec(weights=weight_spec, activations=_activations(a_bits), kv=_kv(kv_bits), **fields)
