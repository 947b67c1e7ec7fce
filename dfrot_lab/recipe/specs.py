"""What to do, said immutably: which model, text, rotation, quantizers; `Recipe` is all of it in one value."""

import math
import re
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar

import yaml

from dfrot_lab.recipe import registry
from dfrot_lab.recipe.base import MethodSpec, Once, Spec, one_of, require_file, ruled
from dfrot_lab.recipe.grids import ACTIVATIONS, KV_CACHE, QuantSpec, require_cache
from dfrot_lab.recipe.sources import (  # noqa: F401 all specs are found here
    CALIBRATION,
    DEFAULT_MODEL,
    DEVICES,
    DTYPES,
    MODEL_SOURCES,
    PACKAGED,
    SAMPLED,
    SECOND_MODEL,
    SPLITS,
    WHOLE,
    WINDOW,
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    PrefixSpec,
    StaticSpec,
    calibration_of,
    prefix_on,
)  # fmt: skip

WINDOWS = 2  # scored in one build: more builds tell more than more windows (docs/measuring.md)
ROTATION_KINDS = ("NR", "RO", "RH", "RHT2", "GSR", "file")
ROW_RULES = ("nr_error_8.5", "nr_error_9.5", "ro_vs_nr")  # they judge a row alone, as `QuaRot.FP16()`
MASSIVE_RULES = ("ratio_8", "ratio_64", "sun", *ROW_RULES)
DEFAULT_RULE = "ratio_8"  # portable: finds the first token, no plain embeddings, in different families
PAPER_RULE, RELEASED_KEEP_OUT = "nr_error_8.5", "nr_error_9.5"  # the released code's
REFINE_VARIANTS = ("accelerated", "guarded", "as_paper", "as_released")
KEEP_OUT_COUNTS = ("most_massive", "worst", "random")  # by largest value, largest error, or any
BLOCK = "None or a whole number >= 1"  # None: the largest that there is
ONLINE = ("none", "R3", "R4")  # which of the two Hadamards that act while a model runs, where not both
KEPT_COUNTED = f"a number with keep_out {', '.join(KEEP_OUT_COUNTS)}, and None with any other"


class RotationSpec(MethodSpec):
    """One matrix: NR (identity), RO (random orthogonal), RH (random Hadamard), RHT2 (two of these), GSR
    (Walsh matrices), a file; in `block`s."""

    method: ClassVar[str] = "random"
    kind: str = one_of("RH", ROTATION_KINDS)
    seed: int = ruled(0, "a whole number in 0..2^63", ge=0, lt=1 << 63)
    block: int | None = ruled(None, BLOCK, ge=1)
    path: str | None = None

    def _check(self) -> None:
        fits = (self.path is not None) == (self.kind == "file")
        self._require("path", fits, "given for kind 'file' and for no other")

    @property
    def name(self) -> str:
        """Short name for tables and figures: NR, RO, RH, RH-b312, or the file's name."""
        if self.kind == "file":
            return PureWindowsPath(str(self.path)).name
        return self.kind if self.block is None else f"{self.kind}-b{self.block}"

    @property
    def first_seed(self) -> int | None:
        """The seed of a random rotation; None for one that is not."""
        return self.seed if self.kind in ("RO", "RH", "RHT2") else None

    def canonical(self) -> "RotationSpec":
        """The same with the default seed where nothing is random."""
        return self.with_(seed=0) if self.first_seed is None else self


class RefineSpec(MethodSpec):
    """How to refine R1 (DFRot, Eq. 2-8): on all rows or a sample of `rows`; weight `gamma` of those `rule`
    calls massive (gamma^2 in the squared loss; inf: them alone). `as_paper` runs the paper's steps and
    returns the last R, `guarded` the best by the weighted objective, `accelerated` minimises that in a sixth
    of the time, `as_released` is the released code, with its QR (of the turn) and its accept test."""

    method: ClassVar[str] = "dfrot"
    capture: CaptureSpec = CaptureSpec()
    init: RotationSpec = RotationSpec()
    gamma: float = ruled(100.0, "> 0", gt=0)
    rule: str = one_of(DEFAULT_RULE, MASSIVE_RULES)
    steps: int = ruled(100, "a whole number >= 1", ge=1)
    quantizer: QuantSpec = QuantSpec(scheme="asymmetric")
    variant: str = one_of("accelerated", REFINE_VARIANTS)
    rows: int | None = ruled(None, "None or a whole number >= 1", ge=1)

    def _check(self) -> None:
        fits = self.quantizer.bits < 16 and self.quantizer.granularity == "per_token"
        self._require("quantizer", fits, "per_token, of fewer than 16 bits")
        self._require("gamma", self.gamma < 1e9 or self.gamma == math.inf, "below 1e9, or inf")
        free = self.variant != "as_released" or self.gamma < math.inf
        self._require("gamma", free, "finite with variant as_released")

    @property
    def name(self) -> str:
        """Name for tables and figures: always DFRot; gamma, rule and variant have their own columns."""
        return "DFRot"

    @property
    def first_seed(self) -> int | None:
        """The seed of its start."""
        return self.init.first_seed


class WeightSpec(Spec):
    """How the linears' weights are quantized: by `method`, if calibrated on `windows` of `corpus`, the first
    or those of a `sample`, as Recipe has it. `rounded`: on activations as the recipe rounds them, or as they
    are (None: rounded for gptaq and qep alone). `correction`: the part of the inputs' drift that these two
    make good, of the way back to a weight's first value with foem (None: each's own)."""

    LATER: ClassVar[tuple[str, ...]] = ("sample", "rounded", "correction")

    method: str = "gptq"
    quantizer: QuantSpec = QuantSpec(granularity="per_channel")
    clip_search: bool = True
    damping: float = ruled(0.01, "> 0", gt=0)
    corpus: CorpusSpec | None = CALIBRATION
    windows: int = ruled(16, "a whole number >= 1", ge=1)
    window: int = ruled(WINDOW, "a whole number >= 2", ge=2)
    sample: int | None = ruled(None, SAMPLED, ge=0)
    rounded: bool | None = one_of(None, (None, True, False))
    correction: float | None = ruled(None, "None or in [0, 1]", ge=0, le=1)

    def _check(self) -> None:
        self._require("method", self.method in registry.WEIGHTS, f"one of {', '.join(registry.WEIGHTS)}")
        grid = self.quantizer
        shared = grid.granularity == "per_channel" or (grid.granularity == "per_group" and grid.group_size)
        rule = "symmetric, and per_channel or per_group with a group_size"
        self._require("quantizer", bool(shared and grid.symmetric), rule)

    @property
    def sees_rounded(self) -> bool:
        """Whether what it is calibrated on is rounded."""
        return registry.drifts(self.method) if self.rounded is None else self.rounded

    def canonical(self, rounds: bool) -> "WeightSpec":
        """The same with what has no effect set to defaults, in a recipe that `rounds` activations or not."""
        if self.quantizer.bits == 16:
            return WeightSpec(method="rtn", quantizer=self.quantizer, corpus=None)
        method = registry.load(registry.WEIGHTS, self.method)
        if not method.CALIBRATED:
            kept = {name: getattr(self, name) for name in ("method", "quantizer", "clip_search")}
            return WeightSpec(**kept, corpus=None)
        drifts, rounded = registry.drifts(self.method), rounds and self.sees_rounded
        own = {"correction": self.correction if hasattr(method, "CORRECTION") else None}
        return self.with_(rounded=rounded if rounded or drifts else None, **own)


class Recipe(Spec):
    """All that defines a quantized model and the text it is scored on. `keep_out`: the rule by which massive
    tokens pass the q, k, v, gate and up inputs unquantised (`QuaRot.FP16()`), or which `keep_out_tokens` of a
    window do. `set_massive` overwrites massive values of the residual stream (Sun et al.). `head_block` (of
    R2 and R3) and `mlp_block` (of R4): blocks of the Hadamard matrices where not one is wanted, or known.
    `sample`: which of the text's samples of `windows` windows is scored; None: the first, as published.
    `jitter`: the seed of a change in the last bit of the embedding, as rounding makes it; None: no change.
    `clips`: the text on whose tokens each site's clip ratio is found; None: all have the quantizer's.
    `scales`: the text on whose tokens channels get scales before R2 and R4 (`model.scales`); None: none.
    `online`: which of the online Hadamards R3 and R4 acts; None: both, where the rotation wants them.
    `static`: the text on which the scales of static activations are found; None with any other.
    `prefix`: how tokens put before every window are found; None: there are none."""

    LATER: ClassVar[tuple[str, ...]] = (
        "head_block", "mlp_block", "sample", "jitter", "clips", "scales", "online", "static",
        "prefix",
    )  # fmt: skip
    SHAPES: ClassVar[tuple[str, ...]] = ("head_block", "mlp_block", "online")  # what weights hang on

    model: ModelSpec = ModelSpec()
    corpus: CorpusSpec = CorpusSpec()
    rotation: MethodSpec = RotationSpec()
    weights: WeightSpec = WeightSpec()
    activations: QuantSpec = ACTIVATIONS
    keys: QuantSpec = KV_CACHE
    values: QuantSpec = KV_CACHE
    keep_out: str | None = one_of(None, (None, *ROW_RULES, *KEEP_OUT_COUNTS))
    windows: int = ruled(WINDOWS, "a whole number >= 1", ge=1)
    window: int = ruled(WINDOW, "a whole number >= 2", ge=2)
    keep_out_tokens: int | None = ruled(None, KEPT_COUNTED, ge=1)
    set_massive: str | None = one_of(None, (None, "zero", "mean"))
    head_block: int | None = ruled(None, BLOCK, ge=1)
    mlp_block: int | None = ruled(None, BLOCK, ge=1)
    sample: int | None = ruled(None, SAMPLED, ge=0)
    jitter: int | None = ruled(None, SAMPLED, ge=0)
    clips: CaptureSpec | None = None
    scales: CaptureSpec | None = None
    online: str | None = one_of(None, (None, *ONLINE))
    static: StaticSpec | None = None
    prefix: PrefixSpec | None = None

    def _check(self) -> None:
        grid, is_static = self.activations, self.activations.granularity == "static"
        shared = is_static or grid.granularity == "per_token" or grid.group_size is not None
        self._require("activations", shared, "per_token, per_group with a group_size, or static")
        self._require("activations", grid.method is None, "of method None, the others being of the KV cache")
        self._require("activations", not is_static or grid.clip_ratio == 1, "of clip_ratio 1 where static")
        rule = "the text for static activations, and None with any other"
        self._require("static", (self.static is not None) == is_static, rule)
        for name in ("clips", "scales", "keep_out", "set_massive"):
            rule = "None with static activations, whose scales are found without"
            self._require(name, getattr(self, name) is None or not is_static, rule)
        free = self.clips is None or self.activations.clip_ratio == 1
        self._require("clips", free, "None with activations that have a clip_ratio, which is every site's")
        free = self.scales is None or self.is_rotated
        self._require("scales", free, "None without a rotation, which spreads errors over channels")
        free = self.scales is None or self.keep_out is None
        self._require("scales", free, "None with keep_out, whose rules judge rows that are not scaled")
        for name in ("scales", "keep_out"):
            free = getattr(self, name) is None or not self.rotation.acts_online
            self._require(name, free, "None with a rotation that acts before every linear")
        for name in ("keep_out", "set_massive"):
            free = getattr(self, name) is None or self.prefix is None
            self._require(name, free, "None with a prefix, after which no token is massive")
        for held in ("keys", "values"):
            require_cache(held, getattr(self, held), self.window)
        counted = self.keep_out in KEEP_OUT_COUNTS
        self._require("keep_out_tokens", (self.keep_out_tokens is not None) == counted, KEPT_COUNTED)
        free = self.set_massive is None or not self.is_rotated
        self._require("set_massive", free, "None with a rotation, which spreads massive values over channels")

    @property
    def is_rotated(self) -> bool:
        """Whether R1 to R4 act: NR means no rotation anywhere, as in the paper's tables."""
        return not (isinstance(self.rotation, RotationSpec) and self.rotation.kind == "NR")

    def acts(self, hadamard: str) -> bool:
        """Whether R3 or R4 acts online, where the rotation wants it."""
        return self.is_rotated and self.online in (None, hadamard)

    @property
    def blocks(self) -> tuple[int | None, int | None]:
        """The blocks of the Hadamard matrices of heads and of R4."""
        return self.head_block, self.mlp_block

    @property
    def bits(self) -> str:
        """Bits of weights, activations and KV cache as in the paper's tables: `4-4-16`, or `4-4-k4v2`."""
        keys, values = self.keys.bits, self.values.bits
        cache = keys if keys == values else f"k{keys}v{values}"
        return f"{self.weights.quantizer.bits}-{self.activations.bits}-{cache}"

    def canonical(self) -> "Recipe":
        """The same with what has no effect set to defaults, so that equal work has one key."""
        rounds = min(grid.bits for grid in (self.activations, self.keys, self.values)) < 16
        changes: dict[str, Any] = {"weights": self.weights.canonical(rounds)}
        if self.activations.bits == 16:
            unrounded = ACTIVATIONS.with_(bits=16)
            changes |= {"activations": unrounded}
            changes |= dict.fromkeys(("keep_out", "keep_out_tokens", "clips", "scales", "static"))
        else:
            texts = {name: text for name in ("clips", "scales") if (text := getattr(self, name)) is not None}
            changes |= {name: text.with_(model=self.model) for name, text in texts.items()}
        changes |= {name: KV_CACHE for name in ("keys", "values") if getattr(self, name).bits == 16}
        changes |= {"jitter": None} if self.bits == "16-16-16" else {}  # nothing is rounded
        if not self.is_rotated:
            changes |= {"rotation": RotationSpec(kind="NR"), "head_block": None, "mlp_block": None}
            changes |= {"online": None}
        else:  # what a method looks at is of this very model
            rows = {name: of for name, of in self.rotation if isinstance(of, CaptureSpec)}
            own = {name: of.with_(model=self.model) for name, of in rows.items()}
            changes["rotation"] = self.rotation.with_(**own).canonical()
            r4 = self.acts("R4")
            changes |= {} if r4 else {"mlp_block": None}
            changes |= {"online": None if r4 else "none"} if self.keys.bits == 16 else {}  # R3 never acts
        return self.with_(**changes)

    def to_yaml(self) -> str:
        """The whole recipe as YAML, every field said."""
        return str(yaml.safe_dump(self.plain(), sort_keys=False))

    @classmethod
    def from_yaml(cls, text: str | Path) -> "Recipe":
        """The recipe in a YAML file (or text); fields left out have their defaults. ValueError."""
        if isinstance(text, Path):
            require_file("a recipe", text, most=1 << 20)
        try:
            said = text.read_text(encoding="utf-8") if isinstance(text, Path) else text
            found = yaml.load(said, Once)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"a recipe must be YAML; got {str(text)!r} ({why})") from error
        return cls.of(found)


def recipe_of(bits: str, *, weights: str = "gptq", **fields: Any) -> Recipe:
    """The recipe of `bits` such as `4-4-16`, with the default quantizers; ValueError: another form."""
    if not re.fullmatch("[0-9]+-[0-9]+-[0-9]+", bits):
        raise ValueError(f"bits must be WEIGHTS-ACTIVATIONS-KV such as 4-4-16; got {bits!r}")
    w_bits, a_bits, kv_bits = map(int, bits.split("-"))
    weight_spec = WeightSpec(method=weights, quantizer=QuantSpec(bits=w_bits, granularity="per_channel"))
    activations, cache = ACTIVATIONS.with_(bits=a_bits), KV_CACHE.with_(bits=kv_bits)
    defaults = {"weights": weight_spec, "activations": activations, "keys": cache, "values": cache}
    return Recipe(**{**defaults, **fields})
