"""Weights in the compressed-tensors format: symmetric integer codes, a scale an output channel or a group of
inputs, a byte each (`int-quantized`) or packed into int32 (`pack-quantized`)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.recipe.base import require

METHOD = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized")
CODED = ("weight_packed", "weight_scale", "weight_shape", "weight")  # what a linear's codes are kept in


def pack(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """A linear's `codes` (out, in) int8 as the format names and packs them, on end into int32."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {"weight_packed": pack_to_int32(codes.cpu(), bits), "weight_shape": torch.tensor(codes.shape)}


def bits_of(source: str, told: Any) -> int:
    """The bits of the weights of a model whose config says `told` of its quantization. ValueError: they are
    in no form that is read here."""
    method = told.get("quant_method", "a method it does not name") if isinstance(told, dict) else told
    if method != METHOD:
        raise ValueError(f"{source} is already quantized, by {method}: use the unquantized model")
    online = told.get("transform_config") or {}
    if names := list(online.get("config_groups") or {}) if isinstance(online, dict) else [online]:
        advice = "use dfrot_lab.load_export, or an export without --with-r4"
        raise ValueError(f"{source} has a transform {names[0]!r} that acts while it runs: {advice}")
    groups = told.get("config_groups")
    named = list(groups.values()) if isinstance(groups, dict) else []
    weights = named[0].get("weights") if len(named) == 1 and isinstance(named[0], dict) else None
    said: dict[str, Any] = weights if isinstance(weights, dict) else {}
    fits = told.get("format") in FORMATS and not told.get("kv_cache_scheme")
    fits = fits and said.get("type") == "int" and said.get("symmetric") is True
    fits = fits and not said.get("dynamic") and said.get("actorder") in (None, "weight", "static")
    bits = said.get("num_bits")
    if not (fits and type(bits) is int and 2 <= bits <= 8):
        rule = "one group of linears with symmetric integer weights of 2 to 8 bits"
        read = f"by {METHOD}, and what is read of it is {rule}"
        raise ValueError(f"{source} is already quantized, {read}: use the unquantized model")
    return bits


def group_of(told: Any) -> int | None:
    """Of how many inputs a scale is, as a config says that `bits_of` has taken; None: of a whole row."""
    (group,) = told["config_groups"].values()
    return group["weights"].get("group_size") if group["weights"].get("strategy") == "group" else None


def groups(names: Iterable[str]) -> list[list[str]]:
    """Names of tensors, those of a linear's codes together. ValueError: one of them is read as nothing."""
    together = dict[str, list[str]]()
    for name in sorted(names):
        linear, dot, last = name.rpartition(".")
        strange = last.startswith(("weight_", "input_", "output_")) and last not in CODED
        require(
            f"{name}", "a tensor that is not read", not strange, f"one of {', '.join(CODED)}, of a linear"
        )
        together.setdefault(f"{linear}{dot}weight" if last in CODED else name, []).append(name)
    return list(together.values())


def weights(tensors: Mapping[str, Tensor], bits: int, size: int | None = None) -> dict[str, Tensor]:
    """Each tensor by name, those of a linear's codes replaced by its weight (out, in) in its scale's dtype; a
    scale is of `size` inputs, or a row's. ValueError: codes without a scale, or of another shape than is
    said."""
    found = dict(tensors)
    scaled = {
        name.rpartition(".")[0]
        for name, x in tensors.items()
        if name.endswith(f".{CODED[0]}") or not x.is_floating_point()
    }
    for linear in sorted(scaled):
        name = f"{linear}.weight_scale"
        scale = found.pop(name, torch.empty(0))
        require(
            name,
            scale.dtype if scale.numel() else "none",
            scale.numel() and scale.is_floating_point(),
            "floats, beside codes",
        )
        codes = _codes(linear, found, bits)
        groups = codes.shape[1] // (size or codes.shape[1]) if codes.numel() else 0
        fits = groups and codes.shape[1] % groups == 0 and scale.shape == (len(codes), groups)
        require(f"{name}'s shape", tuple(scale.shape), fits, f"{(len(codes), groups)}, as its config says")
        spread = codes.to(scale.dtype).unflatten(1, (groups, -1)) * scale[..., None]
        found[f"{linear}.weight"] = spread.flatten(1)
    return found


def _codes(linear: str, found: dict[str, Tensor], bits: int) -> Tensor:
    """The codes (out, in) of a linear, which are taken out of `found`."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    packed, plain = found.pop(f"{linear}.weight_packed", None), found.get(f"{linear}.weight")
    if packed is None:
        is_codes = plain is not None and plain.dtype == torch.int8 and plain.ndim == 2
        require(f"{linear}.weight", "none" if plain is None else plain.dtype, is_codes, "int8, with a scale")
        assert plain is not None
        half = 1 << (bits - 1)
        low, high = (int(plain.min()), int(plain.max())) if plain.numel() else (0, 0)
        require(f"{linear}.weight", f"{low} to {high}", -half <= low and high < half, f"of {bits} bits")
        return plain
    require(f"{linear}.weight", "both", plain is None, "packed, or there as it is")
    shape = found.pop(f"{linear}.weight_shape", torch.empty(0)).flatten().tolist()
    wide = packed.ndim == 2 and packed.dtype == torch.int32 and len(shape) == 2 and shape[0] == len(packed)
    fits = wide and packed.shape[1] == -(-int(shape[1]) * bits // 32)
    require(f"{linear}.weight_shape", shape, fits, f"what {tuple(packed.shape)} int32 of {bits} bits hold")
    return unpack_from_int32(packed, bits, torch.Size(map(int, shape)))
