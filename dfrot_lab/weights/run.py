"""Quantize the weights of a whole model by any quantizer of the table, layer by layer, each kept once done. A
calibrated quantizer (GPTQ) walks the calibration windows through the model: just before a group of linears
that read the same input (q, k, v; o; gate, up; down) is first used, a hook sums its Hessian and puts the
quantized weights in, so each is calibrated on what the quantized model before it sends, as QuaRot. An expert
is calibrated on the tokens that are sent to it; one that sees none is rounded to nearest, and named."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.disk.atomic import Inputs
from dfrot_lab.maths.quantizers import Quantized, dequantize
from dfrot_lab.model import corpus, hooks, loading, stream, surgery
from dfrot_lab.model.experts import widths
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights.gptq import hessian_of

log = logging.getLogger(__name__)
KIND = "weights"
CHUNK_BYTES, MLP_VALUES = 2e9, 3 * 4  # what the MLP's activations of windows in one pass may fill; each's
LayerCodes = dict[str, Quantized]  # the quantized weights of one decoder layer by linear name
Online = Callable[..., AbstractContextManager[None]]  # `surgery.online` of the model
OnPart = Callable[[str, int, int], None]  # told of finished `layer`s, `window`s: done, total; may raise


def nothing(_part: str, _done: int, _total: int) -> None:
    """The OnPart that listens to nothing."""


def windows_at_once(window: int, width: int) -> int:
    """How many windows of `window` tokens pass a layer together, its MLP's width being `width`."""
    return max(1, int(CHUNK_BYTES / (MLP_VALUES * window * width)))


class Codes(Sequence[LayerCodes]):
    """The quantized weights of each layer, memory-mapped when asked for."""

    def __init__(self, artefact: Artefact, device: torch.device, count: int) -> None:
        self.artefact, self.device, self.layers = artefact, device, count

    def __len__(self) -> int:
        return self.layers

    def __getitem__(self, number: Any) -> Any:
        return _codes_of(self.artefact.tensors(_file(number)), self.device)


def quantize_weights(
    loaded: LoadedModel, spec: WeightSpec, key: Inputs, store: Store, *,
    r4: bool = True, blocks: surgery.Blocks = (None, None), on_part: OnPart = nothing,
) -> Sequence[LayerCodes]:  # fmt: skip
    """Put quantized weights into every linear of `loaded` (rotated as wanted; `r4`: down_proj gets R4 of
    `blocks`) but lm_head and embedding; from the store, under `key` (`keys.weights`), or computed now. The
    codes, one mapping a layer, memory-mapped; none at 16 bits. `on_part` is told of each layer once kept."""
    if spec.quantizer.bits == 16:
        return []
    run = _run_calibrated if registry.load(registry.WEIGHTS, spec.method).CALIBRATED else _run
    online = partial(surgery.online, loaded, r4=r4, blocks=blocks)
    linears = ((layer, name) for layer in loaded.layers for name in loaded.roles.linears(layer))
    size = sum(loading.linear(*place).weight.numel() for place in linears)  # a byte a code

    def make(writer: Writer) -> None:
        writer.reserve(size)
        run(loaded, spec, writer, online, on_part)

    artefact = store.get_or_make(KIND, key, make)
    codes: Sequence[LayerCodes] = Codes(artefact, loaded.device, len(loaded.layers))
    if loaded.checkpoint is None:
        codes = [codes[number] for number in range(len(codes))]
    stream.change(loaded, lambda number: _install(loaded.layers[number], codes[number]))
    return codes


def _quantize(layer: nn.Module, names: Sequence[str], hessian: Tensor | None, spec: WeightSpec) -> LayerCodes:
    """Of linears that read the same input, as one: what they compute of a Hessian is computed once."""
    weights = [loading.linear(layer, name).weight.detach() for name in names]
    together = torch.cat(weights) if len(weights) > 1 else weights[0]
    found = registry.load(registry.WEIGHTS, spec.method).quantize(together, hessian, spec)
    sizes = [len(weight) for weight in weights]
    parts = (part.split(sizes) for part in (found.codes, found.scale, found.zero))
    return {name: Quantized(*own) for name, *own in zip(names, *parts, strict=True)}


def _file(index: int) -> str:
    return f"layer-{index:03d}"


def _codes_of(saved: Mapping[str, Tensor], device: torch.device) -> LayerCodes:
    codes = LayerCodes()
    for name in sorted({key.rsplit(":", 1)[0] for key in saved}):
        small, scale = (saved[f"{name}:{part}"].to(device) for part in ("codes", "scale"))
        codes[name] = Quantized(small, scale, torch.zeros_like(scale))
    return codes


def _install(layer: nn.Module, codes: LayerCodes) -> None:
    for name, quantized in codes.items():
        _put(loading.linear(layer, name), quantized)


def _put(linear: nn.Linear, quantized: Quantized) -> None:
    with torch.no_grad():
        linear.weight.copy_(dequantize(quantized, linear.weight.shape))


def _save(writer: Writer, index: int, done: LayerCodes) -> None:
    codes = {f"{name}:codes": q.codes for name, q in done.items()}
    writer.save_tensors(_file(index), codes | {f"{name}:scale": q.scale for name, q in done.items()})


def _run(loaded: LoadedModel, spec: WeightSpec, writer: Writer, _online: Online, on_part: OnPart) -> None:
    count = len(loaded.layers)
    for number in tqdm(range(count), desc=spec.method.upper(), unit="layer", leave=False):
        if not writer.has(_file(number)):
            with stream.part(loaded, number):
                layer = loaded.layers[number]
                done = LayerCodes()
                for name in loaded.roles.linears(layer):
                    done |= _quantize(layer, [name], None, spec)
                _save(writer, number, done)
        on_part("layer", number + 1, count)


def _kind(site: str) -> str:
    """What kind of site it is; all inputs of experts are of one."""
    return site.rpartition(".")[2]


class _SeenEnough(Exception):
    """Raised in a forward pass once the Hessian it was for has been added to."""


class _Layer:
    """One layer under calibration: the groups of linears still to quantize, by site; the Hessians of those
    that are `wanted` now. `at_once`: whether all windows pass together, so that a group can be quantized
    before they use it; else they pass once a stage, a stage being the groups of one kind."""

    def __init__(self, loaded: LoadedModel, number: int, spec: WeightSpec, at_once: bool) -> None:
        self.layer, self.spec, self.at_once = loaded.layers[number], spec, at_once
        self.left, self.codes = dict(loaded.roles.groups(self.layer)), LayerCodes()
        self.wanted, self.hessians = set(self.left), dict[str, Tensor]()
        self.nearest: list[str] = []  # the linears that no token reached

    def stages(self) -> Iterator[None]:
        """Unless windows pass `at_once`: while each stage is the current one, they must pass."""
        for kind in dict.fromkeys(map(_kind, () if self.at_once else self.left)):
            self.wanted = {site for site in self.left if _kind(site) == kind}
            yield
            self.finish()
        self.wanted = set(self.left)

    def arrive(self, site: str, x: Tensor) -> None:
        """What a site of the layer has (..., channels)."""
        if site not in self.wanted:
            return
        hessian = hessian_of(x.reshape(-1, x.shape[-1]).float())
        self.hessians[site] = hessian.add_(self.hessians[site]) if site in self.hessians else hessian
        if self.at_once:
            self.quantize(site)
        elif len(self.wanted) == 1:
            raise _SeenEnough

    def finish(self) -> None:
        """Quantize what is wanted and left: what every window has reached, or none."""
        for site in [site for site in self.left if site in self.wanted]:
            self.quantize(site)

    def quantize(self, site: str) -> None:
        """Quantize the linears that read what a site has."""
        hessian, names = self.hessians.pop(site, None), self.left.pop(site)
        self.nearest += names if hessian is None else ()
        spec = self.spec.with_(method="rtn") if hessian is None else self.spec
        self.codes |= _quantize(self.layer, names, hessian, spec)
        for name in names:
            _put(loading.linear(self.layer, name), self.codes[name])


@torch.no_grad()
def _run_calibrated(
    loaded: LoadedModel, spec: WeightSpec, writer: Writer, online: Online, on_part: OnPart
) -> None:
    if spec.corpus is None:
        raise ValueError(f"WeightSpec.corpus must be a text to calibrate {spec.method} on; got None")
    loading.check_tokens(loaded, spec.window)
    of: dict[str, Any] = {"blocks": spec.windows, "window": spec.window, "sample": spec.sample}
    ids = corpus.sampled_blocks(spec.corpus, loaded.tokenizer, **of)
    name, count, at = spec.method.upper(), len(loaded.layers), dict[int, _Layer]()
    log.info("%s to %d bits on %d x %d tokens of %s", name, spec.quantizer.bits, *ids.shape, spec.corpus.name)
    chunk = windows_at_once(spec.window, max(widths(loaded.layers, loaded.roles)))

    def arrive(site: str, x: Tensor) -> None:
        """R4 has acted before: what arrives is what the linears read."""
        _, number, inner = site.split(".", 2)
        if layer := at.get(int(number)):
            layer.arrive(inner, x)

    sites = hooks.sites_of(loaded, *hooks.LINEAR_INPUTS, "mlp_in")
    with online(function=arrive, sites=sites):
        walk = stream.Walk(loaded, ids.split(chunk), name=name, writer=writer)
        for number in walk.layers():
            if writer.has(_file(number)):
                _install(loaded.layers[number], _codes_of(writer.load_tensors(_file(number)), loaded.device))
                walk.step(number)
            else:
                at[number] = layer = _Layer(loaded, number, spec, len(walk.hidden) == 1)
                for _ in layer.stages():
                    for x in walk.hidden:
                        with suppress(_SeenEnough):
                            walk.run(number, x)
                walk.step(number)
                layer.finish()
                _say(writer, number, layer.nearest)
                _save(writer, number, at.pop(number).codes)
            on_part("layer", number + 1, count)


def _say(writer: Writer, number: int, nearest: Sequence[str]) -> None:
    """Name, in the log and in the artefact, the linears of a layer that no calibration token reached."""
    if nearest:
        said = "layer %d: no calibration token reached %d linears, so they are rounded to nearest: %s"
        log.warning(said, number, len(nearest), ", ".join(nearest))
        writer.save_json(f"{_file(number)}-nearest", nearest)
