"""Rotations descended for the loss of the quantized network itself, all activations rounded, weights as they
are. SpinQuant (arXiv 2405.16406): the next-token loss, Cayley steps of plain descent. OSTQuant's residual
rotation (2501.13987): KL-Top, the divergence from full precision over its most likely words, Adam on
rotations; its scales are `Recipe.scales`' kin and not learned here. A rounding passes the gradient as if it
were not there. R2 to R4 stay Hadamard."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Writer
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import door, hooks, stream, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import MethodSpec, one_of, ruled
from dfrot_lab.recipe.grids import ACTIVATIONS, KV_CACHE, QuantSpec
from dfrot_lab.recipe.specs import WINDOW, CaptureSpec, Recipe
from dfrot_lab.rotate import descent, dfrot, downhill, random
from dfrot_lab.rotate.steps import Refined
from dfrot_lab.rotate.transforms import Context, Transforms

KIND = "task"
VERSION = 1
NEEDS = "gradients of the network"
NAMES = {"cross_entropy": "SpinQuant", "kl_top": "OSTQuant R1"}
RATES = {"cross_entropy": 1.5, "kl_top": 0.001}  # the papers' (of OSTQuant's two the one of its Table 5)
WINDOWS = 16  # of calibration text; the papers have 800 and 1000
TOP = 1000  # words of KL-Top
INNER = 5  # fixed-point iterations of a Cayley step
SAVE_EVERY = 5
LossOf = Callable[[Tensor], Tensor]
"""The loss of what leaves the last layer (1, tokens, channels)."""
Online = dict[str, Any]  # which of R3 and R4 act, and their blocks, as `surgery.online` takes them


class TaskSpec(MethodSpec):
    """The loss, the text it is of, in stretches of `length` tokens, one a step of `updates`; the grids of the
    linears' inputs and of the KV cache; `seed` of the random Hadamard it starts from."""

    method: ClassVar[str] = "task"
    loss: str = one_of("cross_entropy", tuple(NAMES))
    capture: CaptureSpec = CaptureSpec(tokens=WINDOWS * WINDOW)
    seed: int = ruled(0, "a whole number in 0..2^63", ge=0, lt=1 << 63)
    activations: QuantSpec = ACTIVATIONS
    cache: QuantSpec = KV_CACHE
    length: int = ruled(1024, "a whole number >= 2", ge=2)
    updates: int = ruled(60, "a whole number >= 1", ge=1)

    def _check(self) -> None:
        fits = self.activations.bits < 16 and self.activations.granularity == "per_token"
        self._require("activations", fits, "per_token, of fewer than 16 bits")
        self._require("cache", self.cache.method is None, "a grid, of method None")
        self._require("capture", self.capture.tokens > 1, "of 2 tokens or more: one alone has no loss")

    @property
    def name(self) -> str:
        """Name for tables and figures."""
        return NAMES[self.loss]


SPEC = TaskSpec


def spec(row: str, *, seed: int = 0, capture: CaptureSpec | None = None) -> TaskSpec:
    """The row of a loss: of a capture of one whole window, sixteen."""
    loss = next(loss for loss, name in NAMES.items() if name == row)
    capture = capture or CaptureSpec()
    tokens = WINDOWS * WINDOW if capture.tokens == WINDOW else capture.tokens
    return TaskSpec(loss=loss, capture=capture.with_(tokens=tokens), seed=seed)


def fit(recipe: Recipe, context: Context) -> Transforms:
    """R1 by the descent, R2 to R4 Hadamard."""
    assert isinstance(recipe.rotation, TaskSpec)
    found = descended(recipe.rotation, context)
    return Transforms(R1=found.R, seconds=found.seconds)


def descended(spec: TaskSpec, context: Context) -> Refined:
    """The rotation `spec` describes, from the store or made now on a model of its own; a stopped run goes on
    where it was. Its history has a line a step: step, objective (the loss before it, of that step's tokens)
    and distance from the start."""
    spec, recipe = door.resolved(spec), context.recipe
    online = {"r3": recipe.acts("R3"), "r4": recipe.acts("R4"), "blocks": recipe.blocks}

    def make(writer: Writer) -> None:
        text = context.text(spec.capture)
        result = descend(context.turned(), text, spec, online, writer)
        dfrot.keep(writer, result, result.seconds)

    def key() -> Any:
        return keys.identity(spec, door.prints) | context.others

    return dfrot.kept(context.store.get_or_make(KIND, key, make))


def descend(
    loaded: LoadedModel, ids: Tensor, spec: TaskSpec, online: Online, writer: Writer | None = None
) -> Refined:
    """Go down from a random Hadamard on a text `ids` (windows, window) of a model with R2 in its weights, and
    R4's half where it acts `online`."""
    start = random.start(spec.seed, loaded.channels).to(loaded.device).float()
    still = torch.zeros_like(start)
    state = downhill.State(start, start, still, still.clone(), [])
    if writer:
        state = downhill.resume(writer) or state
    stretches = [part for window in ids for part in window.split(spec.length) if len(part) > 1]
    bar = tqdm(range(len(state.history), spec.updates), NAMES[spec.loss], unit="step", leave=False)
    for number in bar:
        text = stretches[number % len(stretches)]
        value, slope = gradient(loaded, state.R, text, spec, online)
        length = RATES[spec.loss] * (1 + math.cos(math.pi * number / spec.updates)) / 2  # falls to 0
        line = {"step": number, "objective": value, "best": min(value, state.lowest)}
        distance = rotations.distance(state.R.cpu().double(), start.cpu().double())
        state.history.append({**line, "ordinary": math.nan, "massive": math.nan, "distance": distance})
        if spec.loss == "cross_entropy":
            state.R = cayley(state.R, slope, length)
        else:
            skew = state.R.T @ slope
            downhill.adam_turn(state, skew - skew.T, number, length * math.sqrt(len(skew)))
        state.R = descent.orthonormal(state.R)
        if writer and (number + 1) % SAVE_EVERY == 0:
            downhill.save(writer, state)
    found = rotations.check(descent.orthonormal(state.R.double()).cpu())
    return Refined(found, pd.DataFrame(state.history), state.elapsed)


def cayley(R: Tensor, slope: Tensor, rate: float) -> Tensor:
    """SpinQuant's step (its release: Cayley SGD without momentum): along W = (R g^T - g R^T) / 2, not longer
    than 1 / |W|_1, as Y = R + alpha W (R + Y) / 2 found in a few iterations."""
    W = (R @ slope.T - slope @ R.T) / 2
    alpha = min(rate, 1 / (float(W.abs().sum(0).max()) + 1e-8))
    moved = R + alpha * (W @ R)
    for _ in range(INNER):
        moved = R + alpha / 2 * (W @ (R + moved))
    return moved


def gradient(
    loaded: LoadedModel, R: Tensor, ids: Tensor, spec: TaskSpec, online: Online
) -> tuple[float, Tensor]:
    """The loss of the quantized network on a text `ids` (tokens,) and its slope at R (channels,
    channels)."""
    R = R.detach().clone().requires_grad_()
    loss = _cross_entropy(loaded, ids) if spec.loss == "cross_entropy" else _kl_top(loaded, ids, online)
    with _rounded(loaded, R, spec, online):
        [value] = stream.back(*stream.kept(loaded, [ids[None]]), [loss])
    assert R.grad is not None
    return value, R.grad


@contextmanager
def _rounded(loaded: LoadedModel, R: Tensor, spec: TaskSpec, online: Online) -> Iterator[None]:
    """While it runs, what R1 would turn is turned by R, rounded, turned back; all else rounded as is."""

    def function(site: str, x: Tensor) -> Tensor:
        kind = site.rpartition(".")[2]
        if kind not in hooks.NORMS:
            return _straight_through(x, spec.cache if kind in hooks.ATTENTION else spec.activations)
        return _straight_through(x @ R.to(x), spec.activations) @ R.to(x).T

    kinds = (*hooks.LINEAR_INPUTS, *(("k", "v") if spec.cache.bits < 16 else ()))
    r3 = online["r3"] and spec.cache.bits < 16
    own = {**online, "r3": r3, "function": function, "sites": hooks.sites_of(loaded, *kinds)}
    with surgery.online(loaded, **own):
        yield


def _straight_through(x: Tensor, grid: QuantSpec) -> Tensor:
    return x + (fake_quantize(x.detach(), grid) - x.detach())


def _cross_entropy(loaded: LoadedModel, ids: Tensor) -> LossOf:
    return lambda hidden: stream.loss(loaded, hidden[0], ids)


def _kl_top(loaded: LoadedModel, ids: Tensor, online: Online) -> LossOf:
    """The mean divergence in nats from full precision, over its most likely words, both made to sum to 1."""
    with surgery.online(loaded, **{**online, "r3": False}):
        full = stream.through(loaded, [ids[None]])[0].clone()

    def loss(hidden: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64)
        pairs = zip(hidden[0].split(stream.LOGIT_ROWS), full[0].split(stream.LOGIT_ROWS), strict=True)
        for own, wanted in pairs:
            with torch.no_grad():
                top = stream.logits(loaded, wanted[None])[0].float()
                top, words = top.topk(min(TOP, top.shape[-1]), dim=-1)
                p = top.log_softmax(-1)
            q = stream.logits(loaded, own[None])[0].float().gather(-1, words).log_softmax(-1)
            total = total + torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).double()
        return total / hidden.shape[1]

    return loss
