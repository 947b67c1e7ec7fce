"""Quantize a model's weights by any quantizer of the table, layer by layer, each kept once done."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial

from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.disk.atomic import Inputs
from dfrot_lab.model import loading, stream, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.weights import calibrate, codes
from dfrot_lab.weights.calibrate import Rounding
from dfrot_lab.weights.codes import Codes, LayerCodes

KIND = "weights"
OnPart = Callable[[str, int, int], None]  # told of finished `layer`s, `window`s: done, total; may raise


def nothing(_part: str, _done: int, _total: int) -> None:
    """The OnPart that listens to nothing."""


def quantize_weights(
    loaded: LoadedModel, spec: WeightSpec, key: Inputs, store: Store, *,
    r3: bool = False, r4: bool = True, blocks: surgery.Blocks = (None, None), on_part: OnPart = nothing,
    rounding: Rounding | None = None, prefix: Tensor | None = None,
) -> Sequence[LayerCodes]:  # fmt: skip
    """Put quantized weights into every linear of `loaded` (rotated as wanted; `r3`, `r4`: which of the two
    acts online, in `blocks`) but lm_head and embedding; from the store, under `key` (`keys.weights`), or
    computed now. The codes, one mapping a layer, memory-mapped; none at 16 bits. `on_part` is told of each
    layer once kept; with `rounding` what a quantizer is calibrated on is rounded, with the ids of a `prefix`
    (tokens,) they are before every window."""
    if spec.quantizer.bits == 16:
        return []
    is_calibrated = registry.load(registry.WEIGHTS, spec.method).CALIBRATED
    online = partial(surgery.online, loaded, r3=r3, r4=r4, blocks=blocks)
    linears = ((layer, name) for layer in loaded.layers for name in loaded.roles.linears(layer))
    size = sum(loading.linear(*place).weight.numel() for place in linears)  # a byte a code

    def make(writer: Writer) -> None:
        writer.reserve(size)
        calibrated = partial(calibrate.layers, loaded, spec, writer, online, rounding, prefix)
        with closing(calibrated() if is_calibrated else _alone(loaded, spec, writer)) as numbers:
            for number in numbers:
                on_part("layer", number + 1, len(loaded.layers))

    artefact = store.get_or_make(KIND, key, make)
    found: Sequence[LayerCodes] = Codes(artefact, loaded.device, len(loaded.layers))
    if loaded.checkpoint is None:
        found = [found[number] for number in range(len(found))]
    stream.change(loaded, lambda number: codes.install(loaded.layers[number], found[number]))
    return found


def _alone(loaded: LoadedModel, spec: WeightSpec, writer: Writer) -> Generator[int]:
    """Quantize layer after layer by what looks at the weights alone, as `calibrate.layers`."""
    for number in tqdm(range(len(loaded.layers)), desc=spec.method.upper(), unit="layer", leave=False):
        if not writer.has(codes.name_of(number)):
            with stream.part(loaded, number):
                layer, done = loaded.layers[number], LayerCodes()
                for name in loaded.roles.linears(layer):
                    done |= calibrate.quantize(layer, [name], None, spec)
                codes.keep(writer, number, done)
        yield number
