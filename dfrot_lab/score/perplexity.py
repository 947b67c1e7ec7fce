"""What a recipe is worth: perplexity with its uncertainty, by the WikiText-2 protocol of GPTQ, QuaRot and
DFRot: the text tokenised whole, cut into windows, exp(mean over windows of the mean next-token loss)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.model import door, stream
from dfrot_lab.model.checkpoint import HEAD
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.stream import Walk
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score.build import Built, build, build_key, quantized, windows
from dfrot_lab.weights.run import OnPart, nothing

KIND = "evaluation"
FINITE = "finite (a broken model, or too small a dtype: try --dtype float32)"


def perplexity(losses: np.ndarray, axis: int = -1) -> Any:
    """exp of the mean loss in nats."""
    return np.exp(losses.mean(axis))


@dataclass(frozen=True)
class EvalResult:
    """Mean next-token loss of each window (windows,) in nats, how long, by which code; its inputs' `key`."""

    spec: Recipe
    losses: np.ndarray
    seconds: float
    provenance: str
    versions: dict[str, str]
    family: str = ""
    commit: str | None = None
    key: str | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(perplexity(self.losses))


def window_loss(loaded: LoadedModel, ids: Tensor) -> float:
    """Mean next-token loss in nats of one window of token ids (window,), logits in float32."""
    return window_losses(Walk(loaded, [ids[None]]))[0]


@torch.inference_mode()
def window_losses(walk: Walk, on_part: OnPart = nothing) -> list[float]:
    """The mean next-token loss of each window of a walk, all windows passed through layer after layer."""
    loaded = walk.loaded
    for number in walk.layers():
        walk.step(number)
        on_part("layer", number + 1, len(loaded.layers))
    with stream.part(loaded, HEAD):
        pairs = zip(walk.hidden, walk.ids, strict=True)
        return [float(stream.loss(loaded, x[0], ids[0])) for x, ids in pairs]


def evaluate(
    spec: Recipe, store: Store | None = None, on_part: OnPart = nothing, kept: dict[str, Built] | None = None
) -> EvalResult:
    """The losses of a recipe, stored or computed now, from the window on that was reached before. `on_part`
    is told of each window kept; `kept` holds the model built last, by `build_key`, for the next recipe."""
    store, spec, kept = store or Store(), door.resolved(spec).canonical(), {} if kept is None else kept

    def make(writer: Writer) -> None:
        if (key := build_key(spec)) not in kept:
            kept.clear()  # frees that model before the next one is built
            kept[key] = build(spec, store, on_part)
        loaded = kept[key].loaded
        losses, seconds = _losses(kept[key], spec, writer, on_part)
        require(f"losses of {loaded.spec.source} at {spec.bits}", losses, np.isfinite(losses).all(), FINITE)
        writer.save_json("losses", losses)
        writer.save_json("recipe", spec.plain())
        writer.note.update(provenance=loaded.provenance, family=loaded.family, scoring_seconds=seconds)

    return _result(spec, store.get_or_make(KIND, lambda: keys.evaluation(spec, door.prints), make))


def stored(spec: Recipe, store: Store) -> EvalResult | None:
    """The losses of a recipe if the store has them, else None; computes nothing."""
    spec = door.resolved(spec).canonical()
    artefact = store.open(KIND, keys.evaluation(spec, door.prints))
    return None if artefact is None else _result(spec, artefact)


def _result(spec: Recipe, artefact: Artefact) -> EvalResult:
    note, losses = artefact.manifest["note"], np.array(artefact.json("losses"))
    said = (note["scoring_seconds"], note["provenance"], dict(artefact.manifest["versions"]), note["family"])
    return EvalResult(spec, losses, *said, artefact.manifest.get("commit"), artefact.key)


def _losses(built: Built, spec: Recipe, writer: Writer, on_part: OnPart) -> tuple[list[float], float]:
    """Each window's loss and the seconds of all, those of a run that was stopped included: window by window,
    or, where the model does not fit into memory, all windows layer by layer."""
    ids, row = windows(spec, built.loaded), f"{spec.rotation.name} {spec.bits}"
    names = [f"window-{i:03d}" for i in range(len(ids))]
    with quantized(built, spec):
        if built.loaded.checkpoint is not None:
            walk = Walk(built.loaded, ids.split(1), name=row, writer=writer)
            return window_losses(walk, on_part), walk.seconds
        bar = tqdm(names, desc=row, unit="window", leave=False)
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
    on_result: Callable[[EvalResult], None] | None = None, on_part: OnPart = nothing,
) -> list[EvalResult]:  # fmt: skip
    """`evaluate` for each recipe in turn; neighbours that share a built model build it once."""
    found, kept = list[EvalResult](), dict[str, Built]()
    for spec in specs:
        found.append(evaluate(spec, store, on_part, kept))
        if on_result:
            on_result(found[-1])
    return found
