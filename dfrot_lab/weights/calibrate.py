"""Calibrated weight quantizers (GPTQ and its like) walk the calibration windows through the model: just
before a group of linears that read the same input (q, k, v; o; gate, up; down) is first used, a hook sums its
Hessian and puts the quantized weights in, so each is calibrated on what the quantized model before it sends,
as QuaRot's; with a rounding, on activations that are rounded, too. A quantizer that asks for the drift is
also told what full precision has in the same place: its windows walk beside, and pass a layer before anything
of it is quantized; one that asks for attention is shown it then, too (`look`). An expert is calibrated on the
tokens that are sent to it; one that sees none is rounded to nearest, and named."""

import logging
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab.disk.artefacts import Writer
from dfrot_lab.maths.quantizers import Quantized
from dfrot_lab.model import corpus, hooks, loading, stream
from dfrot_lab.model.experts import widths
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.prefix import after, before, tokens
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights import codes, look
from dfrot_lab.weights.codes import LayerCodes
from dfrot_lab.weights.gptq import Seen, hessian_of

log = logging.getLogger(__name__)
CHUNK_BYTES, MLP_VALUES = 2e9, 3 * 4  # what the MLP's activations of windows in one pass may fill; each's
Rounding = tuple[hooks.At, Collection[str]]  # what rounds activations, and at which sites


def windows_at_once(window: int, width: int) -> int:
    """How many windows of `window` tokens pass a layer together, its MLP's width being `width`."""
    return max(1, int(CHUNK_BYTES / (MLP_VALUES * window * width)))


def quantize(layer: nn.Module, names: Sequence[str], seen: Seen | None, spec: WeightSpec) -> LayerCodes:
    """Of linears that read the same input, as one: what they compute of a Hessian is computed once."""
    weights = [loading.linear(layer, name).weight.detach() for name in names]
    together = torch.cat(weights) if len(weights) > 1 else weights[0]
    found = registry.load(registry.WEIGHTS, spec.method).quantize(together, seen, spec)
    groups = len(found.codes) // len(together)
    sizes = [len(weight) * groups for weight in weights]
    parts = (part.split(sizes) for part in (found.codes, found.scale, found.zero))
    return {name: Quantized(*own) for name, *own in zip(names, *parts, strict=True)}


def _kind(site: str) -> str:
    """What kind of site it is; all inputs of experts are of one."""
    return site.rpartition(".")[2]


class _SeenEnough(Exception):
    """Raised in a forward pass once the Hessian it was for has been added to."""


class _Layer:
    """One layer under calibration: the groups of linears still to quantize, by site; what was `seen` of those
    that are `wanted` now. `at_once`: whether all windows pass together, so that a group can be quantized
    before they use it; else they pass once a stage, a stage being the groups of one kind. `look`: what is
    asked of its attention first."""

    def __init__(
        self, loaded: LoadedModel, number: int, spec: WeightSpec, at_once: bool, asked: look.Look
    ) -> None:
        self.layer, self.spec, self.at_once, self.look = loaded.layers[number], spec, at_once, asked
        self.left, self.codes = dict(loaded.roles.groups(self.layer)), LayerCodes()
        self.wanted, self.seen = set(self.left), dict[str, Seen]()
        self.nearest: list[str] = []  # the linears that no token reached
        self.full = dict[str, list[Tensor]]()  # what full precision has at a site, chunk by chunk
        self.chunk = 0  # which of the walk's windows pass now

    def stages(self) -> Iterator[None]:
        """Unless windows pass `at_once`: while each stage is the current one, they must pass."""
        for kind in dict.fromkeys(map(_kind, () if self.at_once else self.left)):
            self.wanted = {site for site in self.left if _kind(site) == kind}
            yield
            self.finish()
        self.wanted = set(self.left)

    def note_full(self, site: str, x: Tensor) -> None:
        """What a site of the layer has (..., channels) in the full-precision model."""
        if site in self.left:
            self.full.setdefault(site, []).append(x.reshape(-1, x.shape[-1]).float().clone())

    def arrive(self, site: str, x: Tensor) -> None:
        """What a site of the layer has (..., channels)."""
        if site not in self.wanted:
            return
        rows = x.reshape(-1, x.shape[-1]).float()
        weighed = self.look.weighed(self.chunk, rows)
        now = Seen(hessian_of(weighed), self._drift(site, rows) if self.full else None, self.look.of(site))
        if before := self.seen.get(site):
            now.hessian.add_(before.hessian)
            if now.drift is not None and before.drift is not None:
                now.drift.add_(before.drift)
        self.seen[site] = now
        if self.at_once:
            self.quantize(site)
        elif len(self.wanted) == 1:
            raise _SeenEnough

    def _drift(self, site: str, rows: Tensor) -> Tensor:
        """sum (x0 - x) x^T (in, in) of a chunk's `rows` x (tokens, in); what was kept of it is used up."""
        return self.full[site][self.chunk].sub_(rows).T @ rows

    def finish(self) -> None:
        """Quantize what is wanted and left: what every window has reached, or none."""
        for site in [site for site in self.left if site in self.wanted]:
            self.quantize(site)

    def quantize(self, site: str) -> None:
        """Quantize the linears that read what a site has."""
        seen, names = self.seen.pop(site, None), self.left.pop(site)
        self.nearest += names if seen is None else ()
        spec = self.spec.with_(method="rtn") if seen is None else self.spec
        done = quantize(self.layer, names, seen, spec)
        codes.install(self.layer, done)
        self.codes |= done
        self.full.pop(site, None)


class _Hook:
    """What is done at every site while windows pass a layer (if it is to be quantized, `layer`): activations
    are rounded and noted; of the full-precision model's windows (`is_full`) noted as they are."""

    def __init__(self, rounding: Rounding | None, skip: int) -> None:
        self.skip = skip  # tokens of each window that nothing is calibrated on: a prefix's
        self.round, self.rounded = rounding or (lambda _site, x: x, ())
        self.layer: _Layer | None = None
        self.is_full = self.is_look = False
        self.entered: Tensor | None = None  # what q, k and v read, while their attention is looked at

    def __call__(self, site: str, x: Tensor) -> Tensor:
        """R4 has acted before: what arrives is what the linears read."""
        inner = site.split(".", 2)[2]
        if self.is_full:
            if self.layer:
                self.layer.note_full(inner, after(x, self.skip))
            return x
        if site in self.rounded:
            new = self.round(site, x)
            x = x if new is None else new
        if self.is_look and inner == look.INPUT:
            self.entered = after(x, self.skip)
        elif self.layer and not self.is_look:
            self.layer.arrive(inner, after(x, self.skip))
        return x

    def attend(self, _number: int, seen: list[Tensor | None], how: Mapping[str, Any]) -> None:
        """What a layer's attention is about to see: it is the last that is looked at."""
        if self.is_look and self.layer and self.entered is not None:
            *qkv, mask = seen
            self.layer.look.see(self.entered.float(), [x for x in qkv if x is not None], mask, how)
            raise _SeenEnough

    def pass_look(self, walk: stream.Walk, number: int) -> None:
        """Pass the windows through a layer, nothing of which is quantized yet, as far as its attention."""

        def show(x: Tensor) -> None:
            with suppress(_SeenEnough):
                walk.run(number, x)

        if self.layer and type(self.layer.look) is not look.Look:
            self.is_look = True
            for x in walk.hidden:
                show(x)
            self.layer.look.finish(partial(show, walk.hidden[0]))
            self.is_look, self.entered = False, None

    def pass_full(self, walk: stream.Walk | None, number: int) -> None:
        """Pass full precision's windows, if any walk, through a layer, nothing of which is quantized yet."""
        if walk:
            self.is_full = True
            walk.step(number)
            self.is_full = False


@torch.no_grad()
def layers(
    loaded: LoadedModel, spec: WeightSpec, writer: Writer, online: hooks.Online,
    rounding: Rounding | None = None, prefix: Tensor | None = None,
) -> Generator[int]:  # fmt: skip
    """Quantize layer after layer, each kept once done, and named by its number; one that was kept before is
    put in place. The ids of a `prefix` (tokens,) are before every window. ValueError: no text or too short; a
    model that the quantizer cannot be told of what it asks."""
    if spec.corpus is None:
        raise ValueError(f"WeightSpec.corpus must be a text to calibrate {spec.method} on; got None")
    is_drifting, asked = registry.drifts(spec.method), _asked(loaded, spec)
    loading.check_tokens(loaded, spec.window)
    text: dict[str, Any] = {"blocks": spec.windows, "window": spec.window, "sample": spec.sample}
    ids = before(corpus.sampled_blocks(spec.corpus, loaded.tokenizer, **text), prefix)
    name = spec.method.upper()
    log.info("%s to %d bits on %d x %d tokens of %s", name, spec.quantizer.bits, *ids.shape, spec.corpus.name)
    chunks = ids.split(windows_at_once(ids.shape[1], max(widths(loaded.layers, loaded.roles))))
    hook = _Hook(rounding, tokens(prefix))
    sites = {*hooks.sites_of(loaded, *hooks.LINEAR_INPUTS, "mlp_in"), *hook.rounded}
    with online(function=hook, sites=sites), _attended(loaded, asked, hook):
        walk = stream.Walk(loaded, chunks, name=name, writer=writer)
        full = stream.Walk(loaded, chunks) if is_drifting else None
        for number in range(walk.next):  # a run before this one has quantized these
            with stream.part(loaded, number):
                hook.pass_full(full, number)
        for number in walk.layers():
            done = codes.kept(writer, number, loaded.device)
            of = loaded, number, spec, len(chunks) == 1
            hook.layer = None if done else _Layer(*of, asked(loaded, number, hook.skip))
            hook.pass_full(full, number)
            if done:
                codes.install(loaded.layers[number], done)
            hook.pass_look(walk, number)
            _pass(walk, number, hook.layer)
            if hook.layer:
                _say(writer, number, hook.layer.nearest)
                codes.keep(writer, number, hook.layer.codes)
            yield number


def _asked(loaded: LoadedModel, spec: WeightSpec) -> type[look.Look]:
    """What the quantizer asks of a layer's attention. ValueError: it cannot be told of this model."""
    if registry.drifts(spec.method) and loaded.roles.experts:
        why = "experts are sent other tokens once something is rounded; use gptq"
        raise ValueError(f"the model must be without experts for {spec.method}: {why}")
    asked: type[look.Look] = getattr(registry.load(registry.WEIGHTS, spec.method), "Look", look.Look)
    if why_not := asked.why_not(loaded):
        raise ValueError(f"{spec.method} does not take a {loaded.family}: {why_not}; use gptq")
    return asked


def _attended(loaded: LoadedModel, asked: type[look.Look], hook: _Hook) -> AbstractContextManager[None]:
    """While the block runs, the hook is told what attention is about to see, if anything is asked of it."""
    return nullcontext() if asked is look.Look else hooks.at_attention(loaded, hook.attend)


def _pass(walk: stream.Walk, number: int, layer: _Layer | None) -> None:
    """Pass the windows through a layer, which is quantized on the way if it is still to be."""
    if layer is None:
        walk.step(number)
        return
    for _ in layer.stages():
        for layer.chunk, x in enumerate(walk.hidden):
            with suppress(_SeenEnough):
                walk.run(number, x)
    walk.step(number)
    layer.finish()


def _say(writer: Writer, number: int, nearest: Sequence[str]) -> None:
    """Name, in the log and in the artefact, the linears of a layer that no calibration token reached."""
    if nearest:
        said = "layer %d: no calibration token reached %d linears, so they are rounded to nearest: %s"
        log.warning(said, number, len(nearest), ", ".join(nearest))
        writer.save_json(f"{codes.name_of(number)}-nearest", nearest)
