"""What the experiments are run on: one setting, and its quick profile."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dfrot_lab.model import corpus
from dfrot_lab.recipe.specs import (
    WINDOW,
    CaptureSpec,
    CorpusSpec,
    EvalSpec,
    ModelSpec,
    RefineSpec,
    RotationSpec,
    eval_spec,
)

MAIN_BITS = ("16-4-16", "4-4-16", "4-4-4")


FIGURE_LAYER = 15
"""A layer in the middle of the stretch where the default model's first token is massive (12 to 28)."""


PROFILE = "DFROT_LAB_PROFILE"
"""The environment variable that makes notebooks and experiments `quick` (minutes, for tests) or `full`
(default).
"""


QUICK: dict[str, Any] = {
    "windows": 2,
    "window": 512,
    "gptq_windows": 4,
    "seeds": 1,
    "limit": 2,
    "weights": "rtn",
    "steps": 20,
    "quick": True,
}


@dataclass(frozen=True)
class Setting:
    """What the main job and the experiments are run on. `quick` trims sweeps to a few rows: to see that all
    works, not what is true.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    corpus: str = "auto"
    seed: int = 0
    windows: int = 6
    gamma: float = 100.0
    seeds: int = 3
    window: int = WINDOW
    gptq_windows: int = 16
    limit: int | None = 100
    weights: str = "gptq"
    steps: int = 100
    quick: bool = False

    @classmethod
    def of_profile(cls, **choices: Any) -> "Setting":
        """The setting of the profile that DFROT_LAB_PROFILE names, corpus resolved; `choices` go before it."""
        profile = os.environ.get(PROFILE, "full")
        if profile not in ("quick", "full"):
            raise ValueError(f"{PROFILE} must be quick or full; got {profile!r}")
        return cls(**{**(QUICK if profile == "quick" else {}), **choices}).resolved()

    def resolved(self) -> "Setting":
        """With `auto` replaced by the corpus that is there."""
        return replace(self, corpus=corpus.resolve(CorpusSpec(name=self.corpus)).name)

    @property
    def capture(self) -> CaptureSpec:
        """The first window of calibration tokens."""
        return CaptureSpec(
            model=self.model, corpus=CorpusSpec(name=self.corpus, split="calibration"), tokens=self.window
        )

    @property
    def refine(self) -> RefineSpec:
        """DFRot with the paper's rows, gamma and 100 steps, from RH, with the evaluation's own asymmetric
        quantizer.
        """
        return RefineSpec(
            capture=self.capture,
            gamma=self.gamma,
            init=RotationSpec(kind="RH", seed=self.seed),
            steps=self.steps,
        )

    def rotation(self, kind: str, offset: int = 0) -> RotationSpec:
        """NR, RO or RH with the setting's seed, or one of the `seeds` that follow it."""
        return RotationSpec(kind=kind, seed=self.seed + offset)

    def row(
        self, bits: str, rotation: RotationSpec | RefineSpec, *, weights: str | None = None, **fields: Any
    ) -> EvalSpec:
        """The EvalSpec of one row: this setting's model, text and windows, weights calibrated on the text's
        other half.
        """
        text = CorpusSpec(name=self.corpus, split="evaluation")
        spec = eval_spec(
            bits,
            model=self.model,
            corpus=text,
            rotation=rotation,
            windows=self.windows,
            window=self.window,
            **fields,
        )
        calibration = {
            "corpus": text.with_(split="calibration"),
            "windows": self.gptq_windows,
            "window": self.window,
        }
        return spec.with_(weights=spec.weights.with_(method=weights or self.weights, **calibration))


def figure_site(sites: Sequence[str]) -> str:
    """Of a table's or capture's sites, the one a figure shows: layer 15's first, or one in the middle."""
    middle = sites[len(sites) // 4 * 2]  # an input norm, where each layer has two sites
    return next((site for site in sites if site.startswith(f"layers.{FIGURE_LAYER}.")), middle)
