"""What the main job and the experiments are run on: one setting, and its quick profile."""

import os
from collections.abc import Sequence
from typing import Any, cast

from dfrot_lab.model import door
from dfrot_lab.recipe import registry, specs
from dfrot_lab.recipe.base import MethodSpec, Spec, one_of, ruled

FIGURE_LAYER = 15  # in the middle of the stretch where the default model's token 0 is massive (12 to 28)
PROFILE = "DFROT_LAB_PROFILE"  # environment variable: notebooks, experiments `quick` (minutes) or `full`
QUICK: dict[str, Any] = {"windows": 2, "window": 512, "gptq_windows": 4, "weights": "rtn"}
QUICK |= {"seeds": 1, "limit": 2, "steps": 20, "quick": True}  # what the quick profile changes


class Setting(Spec):
    """A model, a text, seeds, sizes; `rule`: the rows weighted by `gamma`; `quick`: sweeps cut to a few."""

    model: specs.ModelSpec = specs.ModelSpec()
    corpus: str = "auto"
    calibration: str | None = None
    seed: int = ruled(0, "a whole number >= 0", ge=0)
    windows: int = ruled(6, "a whole number >= 1", ge=1)
    gamma: float = 100.0
    rule: str = one_of(specs.DEFAULT_RULE, specs.MASSIVE_RULES)
    seeds: int = ruled(3, "a whole number >= 1", ge=1)
    window: int = specs.WINDOW
    gptq_windows: int = 16
    limit: int | None = 100
    weights: str = "gptq"
    steps: int = 100
    quick: bool = False

    @classmethod
    def of_profile(cls, **choices: Any) -> "Setting":
        """The setting of the profile that DFROT_LAB_PROFILE names, resolved; `choices` go before it."""
        profile = os.environ.get(PROFILE, "full")
        if profile not in ("quick", "full"):
            raise ValueError(f"{PROFILE} must be quick or full; got {profile!r}")
        return cls(**{**(QUICK if profile == "quick" else {}), **choices}).resolved()

    def resolved(self) -> "Setting":
        """With the text and the device that `auto` stands for here."""
        text = door.resolved(specs.CorpusSpec(name=self.corpus)).name
        return self.with_(corpus=text, model=door.resolved(self.model))

    @property
    def calibration_text(self) -> specs.CorpusSpec:
        """What to capture, refine and calibrate on: a text of its own, or the scored one's other half."""
        return specs.calibration_of(self.corpus, self.calibration)

    @property
    def capture(self) -> specs.CaptureSpec:
        """The first window of calibration tokens, or as much of it as a capture takes at once."""
        tokens = min(self.window, specs.WINDOW)
        return specs.CaptureSpec(model=self.model, corpus=self.calibration_text, tokens=tokens)

    @property
    def refine(self) -> specs.RefineSpec:
        """DFRot from RH on the rows of `capture`, with the evaluation's own asymmetric quantizer."""
        return cast(specs.RefineSpec, self.method("DFRot"))

    def rotation(self, kind: str, offset: int = 0) -> specs.RotationSpec:
        """NR, RO or RH with the setting's seed, or one of the `seeds` that follow it."""
        return specs.RotationSpec(kind=kind, seed=self.seed + offset)

    def method(self, row: str, offset: int = 0) -> MethodSpec:
        """A row of the table of methods; the setting's seed, capture, those it has of gamma, rule, steps."""
        spec: MethodSpec = registry.spec_of(row, seed=self.seed + offset, capture=self.capture)
        own = {"gamma", "rule", "steps"} & set(type(spec).model_fields)
        return spec.with_(**{name: getattr(self, name) for name in own})

    def row(self, bits: str, rotation: MethodSpec, *, weights: str = "", **fields: Any) -> specs.Recipe:
        """The recipe of one row: this setting's model, text and windows, weights by the text's other half."""
        text = specs.CorpusSpec(name=self.corpus, split="evaluation")
        own = {"model": self.model, "corpus": text, "windows": self.windows, "window": self.window}
        spec = specs.recipe_of(bits, rotation=rotation, **{**own, **fields})
        by = {"method": weights or self.weights, "windows": self.gptq_windows, "window": self.window}
        return spec.with_(weights=spec.weights.with_(corpus=self.calibration_text, **by))


def figure_site(sites: Sequence[str]) -> str:
    """Of the sites a table has, the one its figure shows: the first of layer 15, or the middle layer's."""
    of_layer = [site for site in sites if site.startswith(f"layers.{FIGURE_LAYER}.")]
    return of_layer[0] if of_layer else sites[len(sites) // 4 * 2]
