"""Quantize the linears' weights: round to nearest, or GPTQ (Frantar et al., arXiv 2210.17323), per output
channel, symmetric, with clip search.

GPTQ runs in ONE forward pass over all calibration windows: just before a group of linears that read the same
input (q, k, v; o; gate, up; down) is first used, a hook sums that input's Hessian and puts the quantized
weights in, so each group is calibrated on what the quantized model before it really sends, activations
unquantised (as QuaRot). Every finished layer is kept, so a stopped run goes on where it was.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.maths.quantizers import Quantized, clip_search, code_range, dequantize, scale_zero
from dfrot_lab.model import corpus, hooks, loading, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.specs import WeightSpec

log = logging.getLogger(__name__)

LayerCodes = dict[str, Quantized]
"""The quantized weights of one decoder layer by linear name."""

OnPart = Callable[[str, int, int], None]
"""Told of every finished part of long work: what it is (`layer`, `window`), how many are done, of how many.
It may raise to stop the work there.
"""

COLUMNS = 128
"""Columns quantized before the rest of the matrix hears of their error in one product: GPTQ's lazy batch."""

HESSIAN_BLOCK = 192
"""Columns of a Hessian computed at once: half of it is known by symmetry, and narrower products are slower.
"""


def nothing(_part: str, _done: int, _total: int) -> None:
    """The OnPart that listens to nothing."""


def rtn(weight: Tensor, spec: WeightSpec) -> Quantized:
    """Round `weight` (out, in) to nearest: codes int8, scale (out, 1), zero 0."""
    weight = weight.float()
    scale = _scale(weight, spec)
    low, high = code_range(spec.quantizer)
    codes = torch.div(weight, scale).round_().clamp_(low, high)
    return _codes(codes, scale, spec)


def gptq(weight: Tensor, hessian: Tensor, spec: WeightSpec) -> Quantized:
    """GPTQ of `weight` (out, in) for inputs with `hessian` = sum x x^T (in, in): codes, scale (out, 1), zero
    0.

    Columns in order, each one's rounding error spread over those not yet rounded by the inverse Hessian's
    Cholesky factor. An input that is always zero has its weight set to 0. Raises ValueError where the damped
    Hessian is not positive definite (NaN or Inf in the calibration activations).
    """
    weight, hessian = weight.float().clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    scale = _scale(weight, spec)
    factor = _inverse_factor(hessian, spec.damping)
    low, high = code_range(spec.quantizer)
    codes = torch.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMNS):
        block = slice(start, min(start + COLUMNS, weight.shape[1]))
        codes[:, block], errors = _block(weight[:, block], factor[block, block], scale, low, high)
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    return _codes(codes, scale, spec)


def _block(weight: Tensor, factor: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors of one block of columns (out, columns). Works on the transpose, where a column
    is contiguous.

    On the CPU wherever the weight is: a GPU would take longer to start these many small steps than to do
    them.
    """
    where = weight.device
    columns, factor, step = weight.T.contiguous().cpu(), factor.cpu(), scale.flatten().cpu()
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i, diagonal in enumerate(factor.diagonal().tolist()):
        torch.div(columns[i], step, out=codes[i]).round_().clamp_(low, high)
        torch.sub(columns[i], codes[i] * step, out=errors[i]).div_(diagonal)
        columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return codes.T.to(where), errors.T.to(where)


def hessian_of(x: Tensor) -> Tensor:
    """sum over rows of x x^T (in, in) for `x` (tokens, in): the upper blocks are computed, the lower ones are
    their mirror image.
    """
    n = x.shape[1]
    hessian = x.new_empty(n, n)
    for start in range(0, n, HESSIAN_BLOCK):
        block, rest = slice(start, start + HESSIAN_BLOCK), slice(start + HESSIAN_BLOCK, n)
        hessian[block, start:] = x[:, block].T @ x[:, start:]
        hessian[rest, block] = hessian[block, rest].T
    return hessian


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, in float64, returned as float32."""
    damped = hessian.double()
    damped.diagonal().add_(damping * float(damped.diagonal().mean()))
    try:
        return torch.linalg.cholesky(
            torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True
        ).float()
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"the calibration Hessian must be positive definite; it is not ({error}). Look for NaN or Inf in the activations."
        ) from error


def _scale(weight: Tensor, spec: WeightSpec) -> Tensor:
    return clip_search(weight, spec.quantizer) if spec.clip_search else scale_zero(weight, spec.quantizer)[0]


def _codes(codes: Tensor, scale: Tensor, spec: WeightSpec) -> Quantized:
    return Quantized(
        codes.to(torch.int8 if spec.quantizer.bits <= 8 else torch.int32), scale, torch.zeros_like(scale)
    )


def is_stored(spec: WeightSpec, key: Any, store: Store) -> bool:
    """Whether `quantize_weights` of the model with identity `key` would find its codes in the store; always
    true at 16 bits.
    """
    return spec.quantizer.bits == 16 or store.open("weights", _inputs(spec, key)) is not None


def _inputs(spec: WeightSpec, key: Any) -> dict[str, Any]:
    """What the quantized weights of the model with identity `key` are keyed by."""
    spec = spec.with_(corpus=corpus.resolve(spec.corpus))
    text = {"text": corpus.fingerprint(spec.corpus)} if spec.method == "gptq" else {}
    return {"weights": spec.to_dict(), "model": key, **text}


def quantize_weights(
    loaded: LoadedModel,
    spec: WeightSpec,
    key: Any,
    store: Store | None = None,
    *,
    r4: bool = True,
    on_part: OnPart = nothing,
) -> list[LayerCodes]:
    """Put quantized weights into every linear of `loaded` (rotated as wanted; `r4` says whether down_proj
    gets R4), from the store or computed now.

    `key` is the JSON-able identity of the model as it is, bytes and rotation (so that `r4` follows from it):
    the weights are stored under it. lm_head and embedding stay as they are. Returns the codes, one mapping a
    layer, memory-mapped; an empty list at 16 bits. `on_part` is told of each layer once it is kept.
    """
    if spec.quantizer.bits == 16:
        return []
    spec = spec.with_(corpus=corpus.resolve(spec.corpus))
    store = store or Store()

    def make(writer: Writer) -> None:
        if spec.method == "gptq":
            _run_gptq(loaded, spec, writer, r4, on_part)
        else:
            _run_rtn(loaded, spec, writer, on_part)

    artefact = store.get_or_make("weights", _inputs(spec, key), make)
    return [_install(layer, artefact.tensors(_file(index))) for index, layer in enumerate(loaded.layers)]


def _file(index: int) -> str:
    return f"layer-{index:03d}"


def _install(layer: nn.Module, saved: dict[str, Tensor]) -> LayerCodes:
    where = next(layer.parameters()).device
    saved = {key: tensor.to(where) for key, tensor in saved.items()}
    names = sorted({key.rsplit(":", 1)[0] for key in saved})
    codes = {
        name: Quantized(saved[f"{name}:codes"], scale := saved[f"{name}:scale"], torch.zeros_like(scale))
        for name in names
    }
    for name, quantized in codes.items():
        _put(loading.linear(layer, name), quantized)
    return codes


def _put(linear: nn.Linear, quantized: Quantized) -> None:
    with torch.no_grad():
        linear.weight.copy_(dequantize(quantized, linear.weight.shape))


def _save(writer: Writer, index: int, done: dict[str, Quantized]) -> None:
    tensors = {f"{name}:codes": q.codes for name, q in done.items()} | {
        f"{name}:scale": q.scale for name, q in done.items()
    }
    writer.save_tensors(_file(index), tensors)


def _run_rtn(loaded: LoadedModel, spec: WeightSpec, writer: Writer, on_part: OnPart) -> None:
    for index, layer in enumerate(tqdm(loaded.layers, desc="RTN", unit="layer", leave=False)):
        if not writer.has(_file(index)):
            _save(
                writer,
                index,
                {name: rtn(loading.linear(layer, name).weight, spec) for name in loaded.roles.linears},
            )
        on_part("layer", index + 1, len(loaded.layers))


@torch.inference_mode()
def _run_gptq(loaded: LoadedModel, spec: WeightSpec, writer: Writer, r4: bool, on_part: OnPart) -> None:
    loading.check_tokens(loaded, spec.window)
    ids = corpus.token_blocks(spec.corpus, loaded.tokenizer, blocks=spec.windows, window=spec.window)
    log.info("GPTQ to %d bits on %d x %d tokens of %s", spec.quantizer.bits, *ids.shape, spec.corpus.name)
    groups, done = loaded.roles.groups, dict[str, Quantized]()
    bar = tqdm(total=len(loaded.layers), desc="GPTQ", unit="layer", leave=False)

    def arrive(site: str, x: Tensor) -> None:
        """Quantize the linears that read `site` before they use it; after a layer's last ones, keep it."""
        number, kind = int(site.split(".")[1]), site.rpartition(".")[2]
        layer = loaded.layers[number]
        if not writer.has(_file(number)):
            hessian = hessian_of(x.reshape(-1, x.shape[-1]))
            for name in groups[kind]:
                linear = loading.linear(layer, name)
                done[name] = gptq(linear.weight, hessian, spec)
                _put(linear, done[name])
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
