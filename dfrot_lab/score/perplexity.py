"""What a recipe is worth: perplexity of the quantized model, with its uncertainty.

Perplexity follows the WikiText-2 protocol of GPTQ, QuaRot and DFRot: the text tokenised whole, cut into
windows, exp(mean over windows of the mean next-token loss)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.maths import statistics
from dfrot_lab.model import door, loading
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score.build import BuildCache, Built, build, quantized, windows
from dfrot_lab.weights.run import OnPart, nothing

LOGIT_ROWS = 256
"""Tokens whose logits exist at once: a whole window's would be the largest tensor of an evaluation (0.4 GB).
"""

KIND = "evaluation"


@dataclass(frozen=True)
class EvalResult:
    """Mean next-token loss of each window (windows,), in nats, the seconds it took, and where model and text
    came from; and the `versions` that computed it."""

    spec: Recipe
    losses: np.ndarray
    seconds: float
    provenance: str
    versions: dict[str, str]
    family: str = ""

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(statistics.perplexity(self.losses))

    @property
    def ci95(self) -> tuple[float, float]:
        """Bootstrap 95% interval of the perplexity over windows."""
        return statistics.bootstrap(statistics.perplexity, self.losses)


def statistic(function: Callable[..., Any], found: Sequence[EvalResult]) -> tuple[float, tuple[float, float]]:
    """`function(*losses, axis=)` of several evaluations and its bootstrap 95% interval, resampling the
    windows that all were scored on. ValueError where they are not the same windows, on the same device."""
    places = [(r.spec.corpus, len(r.losses), r.spec.window, r.spec.model.device) for r in found]
    for other in places[1:]:
        if other != places[0]:
            raise ValueError(
                f"paired results must share corpus, windows, window and device; got {places[0]} and {other}"
            )
    return statistics.with_interval(function, *(result.losses for result in found))


def paired_difference(a: EvalResult, b: EvalResult) -> tuple[float, tuple[float, float]]:
    """Perplexity of `a` minus that of `b` and its paired 95% interval."""
    return statistic(statistics.difference, [a, b])


@torch.inference_mode()
def window_loss(loaded: LoadedModel, ids: Tensor) -> float:
    """Mean next-token loss in nats of one window of token ids (window,), logits in float32 a few hundred
    tokens at a time."""
    head, ids = loaded.model.get_submodule(loaded.roles.lm_head), ids.to(loaded.device)
    hidden = loading.body(loaded)(ids[None], use_cache=False).last_hidden_state[0, :-1]
    total = 0.0
    for part, target in zip(hidden.split(LOGIT_ROWS), ids[1:].split(LOGIT_ROWS), strict=True):
        total += float(torch.nn.functional.cross_entropy(head(part).float(), target, reduction="sum"))
    return total / (len(ids) - 1)


def evaluate(
    spec: Recipe, store: Store | None = None, build_model: Callable[[], Built] | None = None,
    on_part: OnPart = nothing,
) -> EvalResult:  # fmt: skip
    """The losses of a recipe, from the store or computed now; a stopped evaluation goes on at the window it
    was at.

    `build_model` supplies the built model when one is needed (so that rows with the same `build_key` can
    share it); by default it is built here. `on_part` is called after each window that is finished and kept,
    and may raise to stop there."""
    store, spec = store or Store(), door.resolved(spec).canonical()

    def make(writer: Writer) -> None:
        built = build_model() if build_model else build(spec, store, on_part)
        losses, seconds = _losses(built, spec, windows(spec, built.loaded), writer, on_part)
        writer.save_json("losses", losses)
        writer.save_json("recipe", spec.plain())
        writer.note.update(provenance=built.loaded.provenance, scoring_seconds=seconds)
        writer.note.update(family=built.loaded.family)

    return _result(spec, store.get_or_make(KIND, keys.evaluation(spec, door.prints), make))


def stored(spec: Recipe, store: Store) -> EvalResult | None:
    """The losses of a recipe if the store has them, else None; computes nothing."""
    spec = door.resolved(spec).canonical()
    artefact = store.open(KIND, keys.evaluation(spec, door.prints))
    return None if artefact is None else _result(spec, artefact)


def _result(spec: Recipe, artefact: Artefact) -> EvalResult:
    note, losses = artefact.manifest["note"], np.array(artefact.json("losses"))
    versions = dict(artefact.manifest["versions"])
    seconds, family = float(note["scoring_seconds"]), str(note["family"])
    return EvalResult(spec, losses, seconds, str(note["provenance"]), versions, family)


def _losses(
    built: Built, spec: Recipe, ids: Tensor, writer: Writer, on_part: OnPart
) -> tuple[list[float], float]:
    """Each window's loss and the seconds of all, those of a run that was stopped included."""
    names = [f"window-{i:03d}" for i in range(len(ids))]
    with quantized(built, spec):
        bar = tqdm(names, desc=f"{spec.rotation.name} {spec.bits}", unit="window", leave=False)
        for done, (name, window) in enumerate(zip(bar, ids, strict=True), 1):
            if not writer.has(name):
                started = time.perf_counter()
                loss = window_loss(built.loaded, window)
                writer.save_json(name, [loss, time.perf_counter() - started])
            on_part("window", done, len(ids))
    losses, seconds = zip(*(writer.json(name) for name in names), strict=True)
    for name in names:
        writer.drop(name)
    return list(losses), sum(seconds)


def evaluate_all(
    specs: Sequence[Recipe], store: Store | None = None,
    on_result: Callable[[EvalResult], None] | None = None,
    on_part: OnPart = nothing,
) -> list[EvalResult]:  # fmt: skip
    """`evaluate` for each recipe in turn; neighbours that share a built model build it once, and what is
    stored builds nothing.

    `on_part` is told of each finished window, and of each finished layer of weights; what it raises stops the
    work there, with all that kept."""
    store = store or Store()
    cache, found = BuildCache(store), []
    for spec in specs:
        found.append(evaluate(spec, store, partial(cache.built, spec, on_part), on_part))
        if on_result:
            on_result(found[-1])
    return found
