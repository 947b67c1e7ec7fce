"""The one walk over a model's layers. Each is read, changed (fused, rotated, quantized), used for all windows
of a text, and dropped, so that memory is one layer and the hidden states; a model that fits is kept, and
nothing is read or dropped. Whatever looks at a model as a whole text passes through it is written on this."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Writer
from dfrot_lab.model import loading
from dfrot_lab.model.checkpoint import EMBEDDING, HEAD
from dfrot_lab.model.loading import LoadedModel

log = logging.getLogger(__name__)
Dress = Callable[[int], AbstractContextManager[Any]]  # what a layer wears while it is used, by its number
STATE = "walk"
SAVE_AFTER = 5.0  # seconds between two saves of the hidden states
LOGIT_ROWS = 256  # tokens whose logits exist at once: a whole window's would be 0.4 GB
LOSS_ROWS = 8  # of these whose losses are taken at once, where they stay in a processor's cache


def change(loaded: LoadedModel, edit: Callable[[int], None], parts: set[int] | None = None) -> None:
    """Change `parts` of a model for good, by default its layers, each by `edit(part)`: at once, or whenever
    a part is read anew."""
    chosen = set(range(len(loaded.layers))) if parts is None else parts
    if loaded.checkpoint is not None:
        loaded.changes.append((edit, chosen))
        return
    for part in sorted(chosen):
        edit(part)


@contextmanager
def dressed(loaded: LoadedModel, dress: Dress) -> Iterator[None]:
    """While the block runs, each layer wears `dress(number)` whenever it is there to be used."""
    if loaded.checkpoint is not None:
        loaded.dresses.append(dress)
        try:
            yield
        finally:
            loaded.dresses.remove(dress)
        return
    with ExitStack() as stack:
        for number in range(len(loaded.layers)):
            stack.enter_context(dress(number))
        yield


@contextmanager
def part(loaded: LoadedModel, which: int) -> Iterator[None]:
    """While the block runs, a part of the model (a layer's number, EMBEDDING, HEAD) is there to be used."""
    if loaded.checkpoint is None:
        yield
        return
    loaded.checkpoint.read(which)
    try:
        for edit, parts in loaded.changes:
            if which in parts:
                edit(which)
        with ExitStack() as stack:
            for dress in loaded.dresses if which >= 0 else ():
                stack.enter_context(dress(which))
            yield
    finally:
        loaded.checkpoint.drop(which)


class _Stub(nn.Module):
    """In place of a layer or of a model's body: notes what it is called with, or returns what it is given."""

    def __init__(self, real: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "real", real)  # not as a submodule: it is another model's part
        self.answer = answer

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.answer(*args, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.real, name)


@contextmanager
def _in_place(parent: nn.Module, name: str, stub: nn.Module) -> Iterator[None]:
    real = parent.get_submodule(name)
    parent.set_submodule(name, stub)
    try:
        yield
    finally:
        parent.set_submodule(name, real)


class Walk:
    """Texts on their way through the layers: of each of `ids` (windows, tokens) the states `hidden` (windows,
    tokens, channels) that enter the next layer. With `writer` they are kept now and then, and a killed walk
    goes on from there."""

    def __init__(
        self, loaded: LoadedModel, ids: Sequence[Tensor], *, name: str = "", writer: Writer | None = None
    ) -> None:
        self.loaded, self.ids, self.name, self.writer = loaded, ids, name, writer
        self.home = torch.device("cpu") if loaded.checkpoint else loaded.device
        self.calls: dict[torch.Size, list[tuple[Any, Any]]] = {}
        self.hidden: list[Tensor] = []
        self.next, self.seconds, self._saved = 0, 0.0, time.monotonic()
        with torch.no_grad(), part(loaded, EMBEDDING):
            self.hidden = [self._enter(each) for each in ids]
        saved = writer.load_tensors(STATE) if writer and writer.has(STATE) else {}
        if saved and torch.equal(saved["ids"], self._text()):
            self.next, self.seconds = int(saved["next"]), float(saved["seconds"])
            self.hidden = [saved[f"{i}"].to(self.home) for i in range(len(ids))]
            log.info("%s goes on at layer %d of %d", name, self.next, len(loaded.layers))

    def _enter(self, ids: Tensor) -> Tensor:
        """What enters the first layer for `ids` (windows, tokens); notes what else layers are called with."""
        found: list[Tensor] = []
        calls: list[tuple[Any, Any]] = []

        def note(x: Tensor, *args: Any, **options: Any) -> Tensor:
            found.append(x)
            calls.append((args, options))
            return x

        model, norm = self.loaded.model, self.loaded.roles.final_norm
        with ExitStack() as stack:
            for number, layer in enumerate(self.loaded.layers):
                stack.enter_context(_in_place(self.loaded.layers, str(number), _Stub(layer, note)))
            stack.enter_context(_in_place(model, norm, _Stub(model.get_submodule(norm), lambda x: x)))
            loading.body(self.loaded)(ids.to(self.loaded.device), use_cache=False)
        self.calls.setdefault(ids.shape, calls)
        return found[0].to(self.home)

    def layers(self, first: int | None = None) -> Iterator[int]:
        """The layers that are left (of the `first` few), by number, each there to be used (`run`, `step`)
        while it is the current one. Who listens must `step` before the next."""
        count = len(self.loaded.layers[:first])
        options: dict[str, Any] = {"initial": self.next, "total": count, "unit": "layer", "leave": False}
        if not self.name:
            options["disable"] = True  # said False it would overrule TQDM_DISABLE
        bar = tqdm(range(self.next, count), self.name, **options)
        for number in bar:
            started = time.monotonic()
            with part(self.loaded, number):
                if self.loaded.checkpoint and number + 1 < count:
                    self.loaded.checkpoint.ahead(number + 1)
                yield number
            self.next, self.seconds = number + 1, self.seconds + time.monotonic() - started
            if self.next < count and time.monotonic() - self._saved > SAVE_AFTER:
                self._save()
        if self.writer:
            self.writer.drop(STATE)

    def _text(self) -> Tensor:
        """All its token ids in a row: what a saved state is of."""
        return torch.cat([each.flatten().cpu() for each in self.ids])

    def _save(self) -> None:
        if self.writer:
            saved = {f"{i}": x for i, x in enumerate(self.hidden)}
            saved |= {
                "ids": self._text(),
                "next": torch.tensor(self.next),
                "seconds": torch.tensor(self.seconds).double(),
            }
            self.writer.save_tensors(STATE, saved)
        self._saved = time.monotonic()

    def run(self, number: int, x: Tensor) -> Tensor:
        """What a layer makes of `x` (windows, tokens, channels)."""
        args, options = self.calls[x.shape[:-1]][number]
        out = self.loaded.layers[number](x.to(self.loaded.device), *args, **options)
        return out[0] if isinstance(out, tuple) else out

    def step(self, number: int) -> None:
        """Pass all windows through a layer."""
        for i, x in enumerate(self.hidden):
            self.hidden[i] = self.run(number, x).to(self.home)

    @torch.inference_mode()
    def through(self, on_layer: Callable[[int, int], object] = lambda *_: None) -> list[Tensor]:
        """Pass all windows through the layers that are left; `on_layer` is told how many are done, of how
        many. What leaves the last for each of `ids`: (windows, tokens, channels)."""
        for number in self.layers():
            self.step(number)
            on_layer(number + 1, len(self.loaded.layers))
        return self.hidden


def through(loaded: LoadedModel, ids: Sequence[Tensor], name: str = "") -> list[Tensor]:
    """What leaves the last layer for each of `ids` (windows, tokens): (windows, tokens, channels)."""
    return Walk(loaded, ids, name=name).through()


def kept(loaded: LoadedModel, ids: Sequence[Tensor]) -> tuple[Walk, list[list[Tensor]]]:
    """A walk through all layers, and what entered each: of every layer for each of `ids` (windows, tokens,
    channels). What `back` starts from."""
    entered: list[list[Tensor]] = []
    with torch.no_grad():
        walk = Walk(loaded, ids)
        for number in walk.layers():
            entered.append(list(walk.hidden))
            walk.step(number)
    return walk, entered


def back(
    walk: Walk, entered: list[list[Tensor]], losses: Sequence[Callable[[Tensor], Tensor]]
) -> list[float]:
    """Each text's loss, by its own function of what left the last layer; then back from it through the
    layers, each run again, for whatever takes a gradient on the way. Empties `entered`."""
    values, gradients = list[float](), list[Tensor]()
    with part(walk.loaded, HEAD):
        for x, loss_of in zip(walk.hidden, losses, strict=True):
            value, gradient = _gradient(x, loss_of)
            values.append(float(value))
            gradients.append(gradient)
    for number in reversed(range(len(entered))):
        with part(walk.loaded, number):
            for i, x in enumerate(entered.pop()):
                gradients[i] = _gradient(x, partial(walk.run, number), gradients[i])[1]
    return values


def _gradient(
    x: Tensor, function: Callable[[Tensor], Tensor], above: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A function's value at `x`, and the gradient at x for the gradient `above` at that value."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = function(x)
        value.backward(above)
    assert x.grad is not None
    return value.detach(), x.grad


def logits(loaded: LoadedModel, hidden: Tensor) -> Tensor:
    """The logits (windows, tokens, vocabulary) of what leaves the last layer, by the model's own head: call
    it while the part HEAD is there."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    hidden = loaded.model.get_submodule(loaded.roles.final_norm)(hidden.to(loaded.device))
    given = MoeModelOutputWithPast(last_hidden_state=hidden)  # it has what any family's head looks for
    name = loaded.roles.layers.rpartition(".")[0]
    stub = _Stub(loading.body(loaded), lambda *_args, **_options: given)
    with _in_place(loaded.model, name, stub):
        return loaded.model(inputs_embeds=hidden, use_cache=False).logits


def loss(loaded: LoadedModel, hidden: Tensor, ids: Tensor) -> Tensor:
    """The mean next-token loss in nats of one window `ids` (tokens,), logits in float32 and sums in float64,
    from what leaves the last layer (tokens, channels): call it while the part HEAD is there."""
    total, ids = hidden.new_zeros((), dtype=torch.float64), ids.to(loaded.device)
    for part, target in zip(hidden[:-1].split(LOGIT_ROWS), ids[1:].split(LOGIT_ROWS), strict=True):
        found = logits(loaded, part[None])[0].float()
        for rows, aim in zip(found.split(LOSS_ROWS), target.split(LOSS_ROWS), strict=True):
            wide = rows.double()  # sums in float32 are 2e-5 nats off
            entropy = torch.nn.functional.cross_entropy(wide, aim, reduction="sum")
            total = total + entropy.to(total.device)
    return total / (len(ids) - 1)
