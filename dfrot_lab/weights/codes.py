"""The quantized weights of a model: integer codes with their scales, kept and put in place by layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab.disk.artefacts import Artefact, Writer
from dfrot_lab.maths.quantizers import Quantized, dequantize
from dfrot_lab.model import loading

LayerCodes = dict[str, Quantized]  # the quantized weights of one decoder layer by linear name


class Codes(Sequence[LayerCodes]):
    """The quantized weights of each layer, memory-mapped when asked for."""

    def __init__(self, artefact: Artefact, device: torch.device, count: int) -> None:
        self.artefact, self.device, self.layers = artefact, device, count

    def __len__(self) -> int:
        return self.layers

    def __getitem__(self, number: Any) -> Any:
        return _codes_of(self.artefact.tensors(name_of(number)), self.device)


def name_of(number: int) -> str:
    """What a layer's codes are kept under."""
    return f"layer-{number:03d}"


def kept(writer: Writer, number: int, device: torch.device) -> LayerCodes | None:
    """The codes of a layer that a run before this one has kept; None where it has not."""
    name = name_of(number)
    return _codes_of(writer.load_tensors(name), device) if writer.has(name) else None


def keep(writer: Writer, number: int, done: LayerCodes) -> None:
    """Keep the codes of a layer."""
    codes = {f"{name}:codes": q.codes for name, q in done.items()}
    writer.save_tensors(name_of(number), codes | {f"{name}:scale": q.scale for name, q in done.items()})


def _codes_of(saved: Mapping[str, Tensor], device: torch.device) -> LayerCodes:
    codes = LayerCodes()
    for name in sorted({key.rsplit(":", 1)[0] for key in saved}):
        small, scale = (saved[f"{name}:{part}"].to(device) for part in ("codes", "scale"))
        codes[name] = Quantized(small, scale, torch.zeros_like(scale))
    return codes


@torch.no_grad()
def install(layer: nn.Module, codes: LayerCodes) -> None:
    """Put what the codes stand for into the linears of a layer."""
    for name, quantized in codes.items():
        weight = loading.linear(layer, name).weight
        weight.copy_(dequantize(quantized, weight.shape))
