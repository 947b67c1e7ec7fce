"""Quantize the weights of a whole model by any quantizer of the table, layer by layer, each kept once done. A
calibrated quantizer (GPTQ) runs in ONE forward pass over all calibration windows: just before a group of
linears that read the same input (q, k, v; o; gate, up; down) is first used, a hook sums its Hessian and puts
the quantized weights in, so each is calibrated on what the quantized model before it sends, as QuaRot."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.maths.quantizers import Quantized, dequantize
from dfrot_lab.model import corpus, hooks, loading, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights.gptq import hessian_of

log = logging.getLogger(__name__)
KIND = "weights"
LayerCodes = dict[str, Quantized]  # the quantized weights of one decoder layer by linear name
OnPart = Callable[[str, int, int], None]  # told of finished `layer`s, `window`s: done, total; may raise


def nothing(_part: str, _done: int, _total: int) -> None:
    """The OnPart that listens to nothing."""


def quantize_weights(
    loaded: LoadedModel, spec: WeightSpec, key: Mapping[str, Any], store: Store, *,
    r4: bool = True, on_part: OnPart = nothing,
) -> list[LayerCodes]:  # fmt: skip
    """Put quantized weights into every linear of `loaded` (rotated as wanted; `r4`: down_proj gets R4) but
    lm_head and embedding; from the store, under `key` (`keys.weights`), or computed now. Returns the codes,
    one mapping a layer, memory-mapped; none at 16 bits. `on_part` is told of each layer once it is kept."""
    if spec.quantizer.bits == 16:
        return []
    run = _run_calibrated if registry.load(registry.WEIGHTS, spec.method).CALIBRATED else _run
    artefact = store.get_or_make(KIND, key, lambda writer: run(loaded, spec, writer, r4, on_part))
    return [_install(layer, artefact.tensors(_file(index))) for index, layer in enumerate(loaded.layers)]


def _quantize(layer: nn.Module, name: str, hessian: Tensor | None, spec: WeightSpec) -> Quantized:
    weight = loading.linear(layer, name).weight.detach()
    return registry.load(registry.WEIGHTS, spec.method).quantize(weight, hessian, spec)


def _file(index: int) -> str:
    return f"layer-{index:03d}"


def _install(layer: nn.Module, saved: dict[str, Tensor]) -> LayerCodes:
    where, codes = next(layer.parameters()).device, LayerCodes()
    for name in sorted({key.rsplit(":", 1)[0] for key in saved}):
        small, scale = (saved[f"{name}:{part}"].to(where) for part in ("codes", "scale"))
        codes[name] = Quantized(small, scale, torch.zeros_like(scale))
        _put(loading.linear(layer, name), codes[name])
    return codes


def _put(linear: nn.Linear, quantized: Quantized) -> None:
    with torch.no_grad():
        linear.weight.copy_(dequantize(quantized, linear.weight.shape))


def _save(writer: Writer, index: int, done: LayerCodes) -> None:
    codes = {f"{name}:codes": q.codes for name, q in done.items()}
    writer.save_tensors(_file(index), codes | {f"{name}:scale": q.scale for name, q in done.items()})


def _run(loaded: LoadedModel, spec: WeightSpec, writer: Writer, _r4: bool, on_part: OnPart) -> None:
    bar = tqdm(loaded.layers, desc=spec.method.upper(), unit="layer", leave=False)
    for index, layer in enumerate(bar):
        if not writer.has(_file(index)):
            _save(writer, index, {name: _quantize(layer, name, None, spec) for name in loaded.roles.linears})
        on_part("layer", index + 1, len(loaded.layers))


@torch.inference_mode()
def _run_calibrated(loaded: LoadedModel, spec: WeightSpec, writer: Writer, r4: bool, on_part: OnPart) -> None:
    if spec.corpus is None:
        raise ValueError(f"WeightSpec.corpus must be a text to calibrate {spec.method} on; got None")
    loading.check_tokens(loaded, spec.window)
    ids = corpus.token_blocks(spec.corpus, loaded.tokenizer, blocks=spec.windows, window=spec.window)
    name, groups, done = spec.method.upper(), loaded.roles.groups, LayerCodes()
    log.info("%s to %d bits on %d x %d tokens of %s", name, spec.quantizer.bits, *ids.shape, spec.corpus.name)
    bar = tqdm(total=len(loaded.layers), desc=name, unit="layer", leave=False)

    def arrive(site: str, x: Tensor) -> None:
        """Quantize the linears that read `site` before they use it; after a layer's last ones, keep it."""
        number, kind = int(site.split(".")[1]), site.rpartition(".")[2]
        layer = loaded.layers[number]
        if not writer.has(_file(number)):
            hessian = hessian_of(x.reshape(-1, x.shape[-1]).float())
            for linear in groups[kind]:
                done[linear] = _quantize(layer, linear, hessian, spec)
                _put(loading.linear(layer, linear), done[linear])
        if kind == list(groups)[-1]:
            if done:
                _save(writer, number, done)
                done.clear()
            bar.update()
            on_part("layer", number + 1, len(loaded.layers))

    for number, layer in enumerate(loaded.layers):
        if writer.has(_file(number)):
            _install(layer, writer.load_tensors(_file(number)))
    # R4 acts before the Hessian is taken
    with bar, surgery.online(loaded, r4=r4, function=arrive, sites=hooks.sites_of(loaded, *groups)):
        loading.body(loaded)(ids.to(loaded.device), use_cache=False)
