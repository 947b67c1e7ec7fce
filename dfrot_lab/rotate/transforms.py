"""What a rotation method (of `recipe.registry.METHODS`) makes, and what it may look at."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import Fixed
from dfrot_lab.model import door, hooks, loading, stream, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.turns import Turn
from dfrot_lab.observe.capture import Capture, capture, token_blocks
from dfrot_lab.recipe import keys, registry
from dfrot_lab.recipe.specs import CaptureSpec, Recipe

Squares = Callable[[Tensor], Tensor]
Join = Callable[[list[Tensor]], Tensor]


def of_rows(kind: str, spec: Any, store: Store, make: Callable[[Capture], Tensor]) -> tuple[Tensor, float]:
    """R1 (channels, channels) float64 of a method's `spec`, from the store or what it is to `make` of the
    rows of its capture; the seconds that took."""
    spec = door.resolved(spec)

    def write(writer: Writer) -> None:
        recorded, started = capture(spec.capture, store), time.perf_counter()
        writer.save_tensors("R1", {"R1": rotations.check(make(recorded))})
        writer.note.update(seconds=time.perf_counter() - started)

    made = store.get_or_make(kind, lambda: keys.identity(spec, door.prints), write)
    return made.tensors("R1")["R1"], float(made.manifest["note"]["seconds"])


@dataclass(frozen=True)
class Transforms:
    """The transforms of one model: `R1` (channels, channels) or None; `R2` on each head's values, Hadamard,
    one (head, head) for all layers, one a layer (layers, head, head), or None; `gains` (channels,) a norm,
    folded after R1, `scales` (`model.scales`), `clips` a clip ratio and `static` a scale and zero point, all
    by site; `turns` what acts online before the linears of a site (`model.turns`); whether the online
    Hadamards R3 and R4 act; the seconds it took to find them."""

    R1: Tensor | None
    R2: Tensor | Literal["hadamard"] | None = "hadamard"
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    clips: Mapping[str, float] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    static: Mapping[str, Fixed] = field(default_factory=dict)
    turns: Mapping[str, Turn] = field(default_factory=dict)
    r3: bool = True
    r4: bool = True
    seconds: float = 0.0


class Context:
    """What a method may look at, made when asked for: the model (not to be changed), captures of it."""

    def __init__(self, recipe: Recipe, store: Store, model: LoadedModel | None = None) -> None:
        self.recipe, self.store, self._model = recipe, store, model

    @property
    def model(self) -> LoadedModel:
        """The recipe's model, untied and with fused norms."""
        if self._model is None:
            self._model = loading.load_model(self.recipe.model, self.store)
            surgery.prepare(self._model)
        return self._model

    def turned(self) -> LoadedModel:
        """A model of its own for who asks: untied, with fused norms, R2 and R4, where it acts, in its
        weights, R1 not."""
        loaded = loading.load_model(self.recipe.model, self.store)
        surgery.prepare(loaded)
        surgery.rotate_heads(loaded, block=self.recipe.head_block)
        if self.recipe.acts("R4"):
            surgery.rotate_down(loaded, self.recipe.mlp_block)
        return loaded

    @property
    def others(self) -> dict[str, Any]:
        """What the key of a descent that sees the other Hadamards holds of them; of the usual ones none."""
        recipe = self.recipe
        own: dict[str, Any] = {"blocks": recipe.blocks} if any(recipe.blocks) else {}
        return own | ({"online": recipe.online} if recipe.online else {})

    def _own(self, spec: CaptureSpec) -> CaptureSpec:
        return door.resolved(spec.with_(model=self.recipe.model))

    def rows(self, spec: CaptureSpec) -> Capture:
        """Rows (tokens, channels) of every norm output."""
        return capture(self._own(spec), self.store)

    def text(self, spec: CaptureSpec) -> Tensor:
        """Token ids (windows, window)."""
        return token_blocks(self._own(spec), self.model)

    def sensitivities(self, spec: CaptureSpec) -> dict[str, Tensor]:
        """Mean squared gradient of the unrotated model's loss at each norm output, by site (channels,)."""

        def mean(parts: list[Tensor]) -> Tensor:
            return reduce(torch.add, [part / len(parts) for part in parts])

        return self._squares("sensitivity", spec, lambda squares: squares.mean(0), mean)

    def row_sensitivities(self, spec: CaptureSpec) -> dict[str, Tensor]:
        """Each row's squared gradient, the sum over channels, of its window's loss, by site (tokens,)."""
        return self._squares("row-sensitivity", spec, lambda squares: squares.sum(1), torch.cat)

    def _squares(self, kind: str, spec: CaptureSpec, of: Squares, join: Join) -> dict[str, Tensor]:
        def make(writer: Writer) -> None:
            found = _squared_gradients(self.model, self.text(spec), of)
            writer.save_tensors("squares", {site: join(parts) for site, parts in found.items()})

        def inputs() -> dict[str, Any]:
            return {"of": keys.identity(self._own(spec), door.prints)}

        return self.store.get_or_make(kind, inputs, make).tensors("squares")


def _squared_gradients(loaded: LoadedModel, ids: Tensor, of: Squares) -> dict[str, list[Tensor]]:
    """By site, of each window what `of` makes of the loss's squared gradient (tokens, channels) at the norm's
    output."""
    found: dict[str, list[Tensor]] = {}

    def see(site: str, x: Tensor) -> Tensor:
        def add(gradient: Tensor) -> None:
            squares = gradient.detach().float().square().flatten(0, -2)
            found.setdefault(site, []).append(of(squares).cpu())

        x = x if x.requires_grad else x.requires_grad_()
        x.register_hook(add)
        return x

    walk, entered = stream.kept(loaded, ids.split(1))
    losses = [partial(_window_loss, loaded, window) for window in walk.ids]
    with hooks.at_sites(loaded, see, hooks.sites_of(loaded, *hooks.NORMS)):
        stream.back(walk, entered, losses)
    return found


def _window_loss(loaded: LoadedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """The loss of one window (1, window) from what leaves the last layer (1, window, channels)."""
    return stream.loss(loaded, hidden[0], ids[0])


def fit(recipe: Recipe, context: Context) -> Transforms:
    """The transforms of a recipe by its own method."""
    return registry.load(registry.METHODS, recipe.rotation.method).fit(recipe, context)
