"""What the main job and the experiments are run on: one setting, and its quick profile."""

import logging
import os
from collections.abc import Sequence
from typing import Any, cast

from dfrot_lab.model import door
from dfrot_lab.recipe import registry, specs
from dfrot_lab.recipe.base import MethodSpec, Spec, one_of, ruled

log = logging.getLogger(__name__)
FIGURE_LAYER = 15  # in the middle of the stretch where the default model's token 0 is massive (12 to 28)
PROFILE = "DFROT_LAB_PROFILE"  # environment variable: notebooks, experiments `quick` (minutes) or `full`
BUILDS = 7  # that a comparison is made of: the fewest that tell RO from RH surely (docs/measuring.md)
QUICK: dict[str, Any] = {"windows": 1, "window": 256, "gptq_windows": 2, "weights": "rtn"}
QUICK |= {"builds": 1, "limit": 2, "steps": 20, "quick": True}  # what the quick profile changes


class Setting(Spec):
    """A model, a text, sizes; `builds` of all that is random (None: as many as is usual for what is asked),
    the rotations' seeds rising from `seed`, of which this setting's rows are the `build`th; `rule`: the rows
    weighted by `gamma`; `quick`: sweeps cut."""

    model: specs.ModelSpec = specs.ModelSpec()
    corpus: str = "auto"
    calibration: str | None = None
    seed: int = ruled(0, "a whole number >= 0", ge=0)
    windows: int = ruled(specs.WINDOWS, "a whole number >= 1", ge=1)
    gamma: float = 100.0
    rule: str = one_of(specs.DEFAULT_RULE, specs.MASSIVE_RULES)
    builds: int | None = ruled(None, "a whole number >= 1, or None for the usual", ge=1)
    build: int = ruled(0, "a whole number >= 0", ge=0)
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

    def texts(self) -> list[str]:
        """The texts to exchange: WikiText-2 and the packaged sample where both can be had, else its own."""
        if self.quick or door.resolved(specs.CorpusSpec(name="auto")).name != "wikitext2":
            log.info("testing on another text is left out: it needs WikiText-2 (and the full profile)")
            return [self.corpus]
        return ["wikitext2", "wikipedia-sample"]

    def of_builds(self, usual: int = BUILDS) -> "Setting":
        """With `usual` builds where none are chosen."""
        return self if self.builds else self.with_(builds=usual)

    def few(self, values: Sequence[Any]) -> list[Any]:
        """All values of a sweep; in the quick profile the first and the last of many, the first of two."""
        chosen = values[:: len(values) - 1] if len(values) > 2 else values[:1]
        return list(chosen if self.quick else values)

    def each(self) -> list["Setting"]:
        """The setting of each of its builds."""
        return [self.with_(build=number) for number in range(self.builds or BUILDS)]

    @property
    def calibration_text(self) -> specs.CorpusSpec:
        """What to capture, refine and calibrate on: a text of its own, or the scored one's other half."""
        return specs.calibration_of(self.corpus, self.calibration)

    @property
    def capture(self) -> specs.CaptureSpec:
        """A window of calibration tokens, or as much of it as a capture takes at once: the first window, and
        for the next builds others, spread over the text."""
        of: dict[str, Any] = {"model": self.model, "corpus": self.calibration_text}
        of |= {"sample": self.build} if self.build else {}
        return specs.CaptureSpec(**of, tokens=min(self.window, specs.WINDOW))

    @property
    def refine(self) -> specs.RefineSpec:
        """DFRot from RH on the rows of `capture`, with the evaluation's own asymmetric quantizer."""
        return cast(specs.RefineSpec, self.method("DFRot"))

    def rotation(self, kind: str) -> specs.RotationSpec:
        """A rotation that looks at nothing, with the build's seed."""
        return specs.RotationSpec(kind=kind, seed=self.seed + self.build)

    def method(self, row: str) -> MethodSpec:
        """A row of the table of methods; the build's seed, capture, those it has of gamma, rule, steps."""
        spec: MethodSpec = registry.spec_of(row, seed=self.seed + self.build, capture=self.capture)
        fields = set(type(spec).model_fields)
        own: dict[str, Any] = {
            name: getattr(self, name) for name in ("gamma", "rule", "steps") if name in fields
        }
        # an update may pass the whole model, many times the work of a step on captured rows
        own |= {"updates": max(1, self.steps // 4)} if self.quick and "updates" in fields else {}
        return spec.with_(**own)

    def row(self, bits: str, rotation: MethodSpec, *, weights: str = "", **fields: Any) -> specs.Recipe:
        """The recipe of one row: this setting's model and text, weights by the text's other half; windows,
        calibration sample and jitter are the build's; the quick profile does not search for clips."""
        text = specs.CorpusSpec(name=self.corpus, split="evaluation")
        own = {"model": self.model, "corpus": text, "windows": self.windows, "window": self.window}
        own |= {"sample": self.build, "jitter": self.build or None}
        spec = specs.recipe_of(bits, rotation=rotation, **{**own, **fields})
        by = {"method": weights or self.weights, "windows": self.gptq_windows, "window": self.window}
        by |= {"sample": self.build} if self.build else {}
        by |= {"clip_search": False} if self.quick else {}  # a third of the time that a build takes
        return spec.with_(weights=spec.weights.with_(corpus=self.calibration_text, **by))


def figure_site(sites: Sequence[str]) -> str:
    """Of the sites a table has, the one its figure shows: the first of layer 15, or the middle layer's."""
    of_layer = [site for site in sites if site.startswith(f"layers.{FIGURE_LAYER}.")]
    return of_layer[0] if of_layer else sites[len(sites) // 4 * 2]
