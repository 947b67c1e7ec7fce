"""What a recipe is worth: perplexity with its uncertainty, by the WikiText-2 protocol of GPTQ, QuaRot and
DFRot: the text tokenised whole, cut into windows, exp(mean over windows of the mean next-token loss)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

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
from dfrot_lab.score import divergence
from dfrot_lab.score.build import Built, build, build_key, quantized, require_texts, windows_of
from dfrot_lab.score.divergence import FINITE, window_measures
from dfrot_lab.weights.run import OnPart, nothing

if TYPE_CHECKING:
    import pandas as pd

KIND = "evaluation"
TOKENS = "tokens"
_unknown = partial(np.full, 1, np.nan)  # of a measure that was not taken


def perplexity(losses: np.ndarray, axis: int = -1) -> Any:
    """exp of the mean loss in nats."""
    return np.exp(losses.mean(axis))


@dataclass(frozen=True)
class EvalResult:
    """Mean next-token loss of each window (windows,) in nats, how long, by which code; its inputs' `key`. And
    against full precision, as means over a window's tokens (windows,): `divergences`, KL(full precision ||
    quantized) of the next-token distributions in nats; `agreements`, the share of tokens with the same most
    likely next token, 0 to 1; `reference_losses`, the full-precision model's losses in nats."""

    spec: Recipe
    losses: np.ndarray
    seconds: float
    provenance: str
    versions: dict[str, str]
    family: str = ""
    commit: str | None = None
    key: str | None = None
    divergences: np.ndarray = field(default_factory=_unknown)
    agreements: np.ndarray = field(default_factory=_unknown)
    reference_losses: np.ndarray = field(default_factory=_unknown)

    @property
    def divergence(self) -> float:
        """Mean KL divergence from the full-precision model in nats; nan where it was not measured."""
        return float(self.divergences.mean())

    @property
    def agreement(self) -> float:
        """Share of tokens whose most likely next token is the full-precision model's, 0 to 1; or nan."""
        return float(self.agreements.mean())

    @property
    def reference_loss(self) -> float:
        """The full-precision model's mean loss in nats; or nan."""
        return float(self.reference_losses.mean())

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(perplexity(self.losses))


def window_loss(loaded: LoadedModel, ids: Tensor) -> float:
    """Mean next-token loss in nats of one window of token ids (window,), logits in float32."""
    return window_losses(Walk(loaded, [ids[None]]))[0]


@torch.inference_mode()
def window_losses(walk: Walk) -> list[float]:
    """The mean next-token loss of each window of a walk, all windows passed through layer after layer."""
    states = walk.through()
    with stream.part(walk.loaded, HEAD):
        pairs = zip(states, walk.ids, strict=True)
        return [float(stream.loss(walk.loaded, x[0], ids[0])) for x, ids in pairs]


def evaluate(
    spec: Recipe, store: Store | None = None, on_part: OnPart = nothing, kept: dict[str, Built] | None = None
) -> EvalResult:
    """The measures of a recipe, stored or computed now, from the window on that was reached before. `on_part`
    is told of each window kept; `kept` holds the model built last, by `build_key`, for the next recipe."""
    store, spec, kept = store or Store(), door.resolved(spec).canonical(), {} if kept is None else kept

    def make(writer: Writer) -> None:
        require_texts(spec, store)
        ids = windows_of(spec, store)
        found = divergence.references(spec, ids, store, on_part)  # before another model fills the memory
        if (key := build_key(spec)) not in kept:
            kept.clear()  # frees that model before the next one is built
            kept[key] = build(spec, store, on_part)
        loaded = kept[key].loaded
        tokens, seconds = _measured(kept[key], spec, ids, found, writer, on_part)
        losses, divergences, agreements = tokens.double().mean(1).T.tolist()
        require(f"losses of {loaded.spec.source} at {spec.bits}", losses, np.isfinite(losses).all(), FINITE)
        before = [each.manifest["note"]["loss"] for each in found]
        means = {"divergences": divergences, "agreements": agreements, "reference_losses": before}
        writer.save_json("losses", losses)
        writer.save_json("means", means)
        writer.save_tensors(TOKENS, {"ids": ids, "measures": tokens})
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
    made = note.get("made") or artefact.manifest  # elsewhere, or here
    said = (note["scoring_seconds"], note["provenance"], dict(made["versions"]), note["family"])
    means: dict[str, Any] = {name: np.array(values) for name, values in artefact.json("means").items()}
    return EvalResult(spec, losses, *said, made.get("commit"), artefact.key, **means)


def by_token(result: EvalResult, store: Store) -> "pd.DataFrame":
    """A row for each token of a result's windows but the last: its `window` and `position` from 0, its id and
    that of the `next`, and what is measured there: `loss` and `divergence` in nats, `agreement`, 0 or 1.
    KeyError: a result that is not in the store."""
    import pandas as pd

    if (artefact := store.at(KIND, str(result.key))) is None:
        rule = f"EvalResult.key must be that of an evaluation in the store {store.root}"
        raise KeyError(f"{rule}; got {result.key}: evaluate it again")
    if TOKENS not in artefact.names:
        raise KeyError(f"evaluation {result.key} was made elsewhere: its tokens are not kept here")
    kept = artefact.tensors(TOKENS)
    ids, found = kept["ids"], kept["measures"].flatten(0, 1)
    window, position = np.indices((len(ids), ids.shape[1] - 1)).reshape(2, -1)
    own = {"window": window, "position": position, "token": ids[:, :-1].flatten().numpy()}
    table = pd.DataFrame(own | {"next": ids[:, 1:].flatten().numpy()})
    return table.assign(**dict(zip(divergence.MEASURES, found.T.numpy(), strict=True)))


def _measured(
    built: Built, spec: Recipe, ids: Tensor, found: Sequence[Artefact], writer: Writer, on_part: OnPart
) -> tuple[Tensor, float]:
    """What is measured of each window beside its reference, (windows, tokens - 1, 3), and the seconds of all,
    those of a run that was stopped included: window by window, or, where the model does not fit into memory,
    all windows layer by layer. A model that is its own reference has passed the layers already."""
    row, own = f"{spec.rotation.name} {spec.bits}", divergence.is_full_precision(spec)
    by_layer = built.loaded.checkpoint is not None and not own
    names = [f"window-{i:03d}" for i in range(len(ids))]
    passed = sum(each.manifest["note"]["seconds"] for each in found) if own else 0.0
    states: list[Tensor | None] = [divergence.states_of(each) if own else None for each in found]
    with quantized(built, spec):
        if by_layer:
            walk = divergence.walk(built, list(ids), name=row, writer=writer)
            through = walk.through(lambda done, of: on_part("layer", done, of))
            states = [x[0, divergence.skipped(built) :] for x in through]
            passed = walk.seconds
        bar = tqdm(names, desc=row, unit="window", leave=False)
        with stream.part(built.loaded, HEAD):
            for done, (name, *of) in enumerate(zip(bar, ids, found, states, strict=True), 1):
                if not writer.has(name):
                    started = time.perf_counter()
                    measured = window_measures(built, *of)
                    seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
                    writer.save_tensors(name, {"measures": measured, "seconds": seconds})
                if not by_layer:
                    on_part("window", done, len(ids))
    kept = [writer.load_tensors(name) for name in names]
    for name in names:
        writer.drop(name)
    passed += sum(float(each["seconds"]) for each in kept)
    return torch.stack([each["measures"] for each in kept]), passed


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
