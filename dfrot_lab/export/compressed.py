"""A quantized model in the compressed-tensors format, which vLLM runs and transformers loads: the codes are
those that were scored, not rounded again; R1 and R2 are in them. Activations have what vLLM's integer kernels
have: no zero point, a scale a token found while it runs. R4 is in it only if asked for, since transformers
leaves out, without a word, what a folder says of transforms: `load_export` puts it in."""

import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.disk import atomic
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export import card, folders
from dfrot_lab.maths.quantizers import Quantized
from dfrot_lab.model import files, loading, shapes
from dfrot_lab.model.checkpoint import quiet
from dfrot_lab.model.families import Roles, attention
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.packed import pack
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.grids import ACTIVATIONS, QuantSpec
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import build

log = logging.getLogger(__name__)
FORMATS = {
    (4, 16): "pack-quantized", (8, 16): "pack-quantized", (4, 4): "pack-quantized",
    (4, 8): "int-quantized", (8, 8): "int-quantized",
}  # fmt: skip
"""Bits of weights and activations that vLLM's code has integer kernels for (none was run here: they need a
GPU), and how each wants its weights."""
BITS = ", ".join(f"{weights}-{activations}-16" for weights, activations in FORMATS)
NO_KEEP_OUT = "None for compressed-tensors, whose kernels round every token"
NO_CLIPS = "None for compressed-tensors, whose activations have no clip ratio a site"
NO_GROUPS = "None with 8-8-16, whose kernel has a scale an output channel"
PER_TOKEN = "per_token for compressed-tensors, as this export writes them"
R4 = "R4"  # the name of its transform in a folder


def export(recipe: Recipe, folder: Path, store: Store | None = None, *, with_r4: bool = False) -> Path:
    """Write the quantized model of `recipe`, as far as the format can hold it (`adapted`), into a new
    `folder` (returned), with that recipe, R1 and a card. ValueError, before any work: what it cannot hold."""
    store = store or Store()
    recipe = adapted(folders.resolved(recipe), with_r4)
    with atomic.new_folder(folder) as temporary:
        folders.require_plain(recipe, store)
        built = build.build(recipe, store)
        page = card.of_compressed(recipe, built.loaded, store)
        folders.describe(temporary, recipe, built.transforms.R1, page)
        said = config_of(recipe, built.loaded.roles)
        folders.write(built.loaded, temporary, partial(_held, built, recipe), quantization_config=said)
    return folder


def adapted(recipe: Recipe, with_r4: bool = False) -> Recipe:
    """The resolved recipe as the format can hold it, each change said; no jitter. ValueError."""
    bits = recipe.weights.quantizer.bits, recipe.activations.bits
    fits = bits in FORMATS and min(recipe.keys.bits, recipe.values.bits) == 16
    require("--bits", recipe.bits, fits, f"one of {BITS} for compressed-tensors")
    size = recipe.weights.quantizer.group_size
    require("--group-size", size, size is None or bits != (8, 8), NO_GROUPS)
    require("Recipe.keep_out", recipe.keep_out, recipe.keep_out is None, NO_KEEP_OUT)
    require("Recipe.set_massive", recipe.set_massive, recipe.set_massive is None, NO_KEEP_OUT)
    shared = recipe.activations.granularity
    require("Recipe.activations", shared, shared == "per_token" or bits[1] == 16, PER_TOKEN)
    require("Recipe.clips", "a text", recipe.clips is None, NO_CLIPS)
    own = {"activations": grid(bits[1]), "online": "none", "mlp_block": None, "jitter": None}
    if with_r4:
        own |= {"online": None, "mlp_block": _block(recipe)}
    found = recipe.with_(**own).canonical()
    before = recipe.canonical()
    if found.activations != before.activations:
        said = "activations are %s, not %s: its kernels have no zero point, and a scale of their own"
        log.warning(said, found.activations.name, before.activations.name)
    if before.acts(R4) and not with_r4:
        log.warning("R4 is left out: transformers would not apply it. --with-r4 keeps it for what does")
    elif found.mlp_block != before.mlp_block:
        log.warning("R4 is in blocks of %d: vLLM has Hadamard matrices of powers of 2", found.mlp_block)
    return found


def grid(bits: int) -> QuantSpec:
    """The activations' quantizer of compressed-tensors: its scale is max |x| / (2^bits - 1) * 2, where ours
    has the largest code, 2^(bits-1) - 1, in the denominator."""
    if bits == 16:
        return ACTIVATIONS.with_(bits=16)
    return QuantSpec(bits=bits, clip_ratio=(2**bits - 2) / (2**bits - 1))


def _block(recipe: Recipe) -> int:
    """The largest power of 2 that divides the width of the MLP. ValueError: there is none."""
    width = shapes.shape(recipe.model).mlp
    require("--with-r4", f"an MLP of {width} channels", width % 2 == 0, "with an MLP of an even width")
    return width & -width


def _held(built: build.Built, recipe: Recipe, part: int, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a part, its quantized linears as codes and scales; R4's matrix where it acts."""
    if part < 0:
        return own
    loaded, held = built.loaded, dict(own)
    kind = FORMATS[recipe.weights.quantizer.bits, recipe.activations.bits]
    for name, quantized in built.codes[part].items():
        linear = f"{loaded.roles.layers}.{part}.{name}"
        dtype = held.pop(f"{linear}.weight").dtype
        rows = len(loading.linear(loaded.layers[part], name).weight)
        coded = _coded(quantized, rows, dtype, kind, recipe)
        held |= {f"{linear}.{each}": x for each, x in coded.items()}
    if built.transforms.r4 and recipe.is_rotated:
        held |= _matrices(loaded, part, recipe)
    return held


def _coded(
    quantized: Quantized, rows: int, dtype: torch.dtype, kind: str, recipe: Recipe
) -> dict[str, Tensor]:
    """A linear's weight (rows, in) as the format has it: scales in the model's dtype, codes a byte each or
    packed."""
    codes, scale = (part.reshape(rows, -1) for part in (quantized.codes, quantized.scale))
    said = {"weight_scale": scale.to(dtype)}
    if kind == "int-quantized":
        return said | {"weight": codes}
    return said | pack(codes, recipe.weights.quantizer.bits)


def _matrices(loaded: LoadedModel, part: int, recipe: Recipe) -> dict[str, Tensor]:
    """Each down_proj's matrix of R4, entries 1 and -1, as transforms are kept in a folder."""
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

    layer = loaded.layers[part]
    matrix = deterministic_hadamard_matrix(int(recipe.mlp_block or 0), torch.float32, torch.device("cpu"))
    names = [f"{loaded.roles.layers}.{part}.{name}.{R4}_input.weight" for name in loaded.roles.downs(layer)]
    return {name: matrix.clone() for name in names}


def config_of(recipe: Recipe, roles: Roles) -> dict[str, Any]:
    """What config.json says under `quantization_config`."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    w_bits, a_bits = recipe.weights.quantizer.bits, recipe.activations.bits
    kind = FORMATS[w_bits, a_bits]
    size = recipe.weights.quantizer.group_size
    shared: dict[str, Any] = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=w_bits, symmetric=True, **shared)
    inputs = QuantizationArgs(num_bits=a_bits, symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=None if a_bits == 16 else inputs, format=kind
    )
    found = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=kind,
        quantization_status="compressed",
        ignore=[roles.lm_head],
    ).to_dict()
    acts = recipe.acts(R4)
    return found | ({"transform_config": _transform(recipe.mlp_block, roles)} if acts else {})


def _transform(block: int | None, roles: Roles) -> dict[str, Any]:
    """R4 as compressed-tensors says it: a Hadamard matrix of `block` before every down_proj."""
    from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme

    where = TransformArgs(targets=[f"re:.*{re.escape(roles.down)}$"], location="input")
    scheme = TransformScheme(type="hadamard", apply=[where], head_dim=block, precision="float32")
    return dict(TransformConfig(config_groups={R4: scheme}).model_dump(mode="json"))


def load_export(folder: Path | str) -> Any:
    """The transformers model in an exported folder, on the CPU, R4 before its down_proj where the folder has
    it: what transformers alone leaves out. ValueError: no such folder."""
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from transformers import AutoConfig, AutoModelForCausalLM

    place = Path(folder)
    require("load_export.folder", folder, files.is_model(place), "a folder with config.json and weights")
    said = files.read_object(place / "config.json").get("quantization_config") or {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, attn_implementation="eager")
    with quiet():  # that R4 is not expected
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=False, attn_implementation=attention(config)
        )
    if told := said.get("transform_config"):
        apply_transform_config(model, TransformConfig.model_validate(told))
    return model.eval()
