"""A rotated model as a GGUF file, which llama.cpp runs: norms folded, R1 and R2 in the weights, neither R3
nor R4 (llama.cpp has none before down_proj); then rounded to a kind of block that llama.cpp has, or not at
all. A model that came out of a GGUF file takes all of its header along; of a folder the header is made
(`gguf_header`). Written part by part, which is all that is held of a model that does not fit into memory."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.disk import atomic
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export import card, folders, gguf_header
from dfrot_lab.model import stream
from dfrot_lab.model.checkpoint import EMBEDDING, HEAD, parameters_of
from dfrot_lab.model.families import heads_of
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import build

WIDE = ("F32", "F16", "BF16", "Q8_0")  # kinds that embedding and head have as well
KINDS = (*WIDE, "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4")
MORE = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "NVFP4")  # by the package libgguf
ENDS = ("token_embd.weight", "output.weight")
END_KIND = "Q8_0"  # of the embedding and the head, where the other weights have fewer bits
F16_MOST = float(np.finfo(np.float16).max)
SPLIT_BYTES = 4_000_000_000  # after which another file is begun: some file systems hold no more
Quantize = Callable[[np.ndarray, Kind], np.ndarray]


def export(recipe: Recipe, folder: Path, store: Store | None = None, *, kind: str = "F16") -> Path:
    """Write the rotated model of `recipe`, its linears rounded to `kind`, as one GGUF file (or several of 4
    GB) into a new `folder` (returned), with the recipe, R1 and a card. ValueError, before any work: a kind
    or a model that llama.cpp does not have."""
    quantize = _quantizer(kind)
    recipe, store = folders.resolved(recipe), store or Store()
    header = gguf_header.of(recipe.model, store)
    with atomic.new_folder(folder) as temporary:
        folders.require_plain(recipe, store)
        loaded, made = build.rotated(folders.fused(recipe), store)
        file = temporary / f"{_plain_name(recipe)}-{kind}.gguf"
        counts = _write(loaded, header, file, kind, quantize)
        names = sorted(path.name for path in temporary.glob("*.gguf"))
        page = card.of_gguf(recipe, loaded, store, kind, counts, names)
        folders.describe(temporary, recipe, made.R1, page)
    return folder


def _quantizer(kind: str) -> Quantize:
    """What rounds values (float32) to a kind's blocks; ValueError: no such kind, or it needs a package."""
    require("--kind", kind, kind in (*KINDS, *MORE), f"one of {', '.join((*KINDS, *MORE))}")
    if kind in KINDS:
        return lambda values, to: np.asarray(gguf.quants.quantize(values, to))
    try:
        import libgguf
    except ImportError as error:
        said = f"the package libgguf, which is not installed: pip install libgguf, or take {', '.join(KINDS)}"
        raise ValueError(f"--kind {kind} needs {said}") from error
    return lambda values, to: np.asarray(libgguf.quantize_rows(values, int(to)))


def _plain_name(recipe: Recipe) -> str:
    """The model's name and its rotation's, as a file may be called."""
    source = recipe.model.source.removeprefix("hub:")
    place = Path(source).resolve() if Path(source).exists() else Path(source)
    model = place.stem if place.suffix == ".gguf" else place.name
    return re.sub(r"[^\w.-]+", "-", f"{model}-{recipe.rotation.name}").lstrip("-.")  # no option of a command


def _write(
    loaded: LoadedModel, header: gguf_header.Header, file: Path, kind: str, quantize: Quantize
) -> dict[str, int]:
    """Write the file, or its parts: first what lies where, then the tensors in that order. How many matrices
    are of each kind."""
    writer = gguf.GGUFWriter(file, header.arch, split_max_size=SPLIT_BYTES)
    header.fill(writer, loaded)
    writer.add_file_type(_file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names, total, counts = _names(loaded, header.arch), 0, Counter[str]()
    for name, values in header.tensors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for part in _parts(loaded):
        for own, x in parameters_of(loaded.model, loaded.roles, part):
            to = _kind_of(names[own], tuple(x.shape), kind)
            block, size = gguf.GGML_QUANT_SIZES[to]
            count = x.numel() // block * size
            writer.add_tensor_info(names[own], tuple(x.shape), np.dtype(np.float32), count, to)
            total += count
            counts.update([to.name] if x.ndim > 1 else [])
    with atomic.told(file, total), closing(writer):
        atomic.require_room(file.parent, total)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        made = _values(loaded, header.arch, names, kind, quantize)  # one at a time
        for values in chain(header.tensors.values(), made):
            writer.write_tensor_data(values)
    return dict(counts.most_common())


def _parts(loaded: LoadedModel) -> tuple[int, ...]:
    return EMBEDDING, *range(len(loaded.layers)), HEAD


def _names(loaded: LoadedModel, arch: str) -> dict[str, str]:
    """llama.cpp's name of each parameter by the model's. ValueError: one that it has no place for."""
    known = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(known, len(loaded.layers))
    own = [name for part in _parts(loaded) for name, _ in parameters_of(loaded.model, loaded.roles, part)]
    found = {name: table.get_name(name, (".weight", ".bias")) for name in own}
    if lost := next((name for name, other in found.items() if other is None), None):
        raise ValueError(f"to be a GGUF file, a model must have tensors of llama.cpp's {arch}; got {lost}")
    return {name: str(other) for name, other in found.items()}


def _kind_of(name: str, shape: tuple[int, ...], kind: str) -> Kind:
    """What a tensor is written as: vectors in full, the two ends in 8 bits at least; a matrix whose rows no
    block divides in 8 bits, whose blocks are the smallest, or in 16."""
    if len(shape) == 1:
        return Kind.F32
    wanted = kind if kind in WIDE or name not in ENDS else END_KIND
    blocks = ((Kind[each], gguf.GGML_QUANT_SIZES[Kind[each]][0]) for each in (wanted, END_KIND, "F16"))
    return next(each for each, block in blocks if shape[-1] % block == 0)


def _values(
    loaded: LoadedModel, arch: str, names: dict[str, str], kind: str, quantize: Quantize
) -> Iterator[np.ndarray]:
    """The tensors as the file has them, in the order of their places."""
    for part in tqdm(_parts(loaded), desc=f"Writing {kind}", unit="part", leave=False):
        with stream.part(loaded, part):
            for own, x in parameters_of(loaded.model, loaded.roles, part):
                values = _arranged(loaded, arch, names[own], x.detach().cpu().float()).numpy()
                to = _kind_of(names[own], values.shape, kind)
                if to == Kind.F16:
                    most = float(np.abs(values).max(initial=0))
                    rule = f"F32 or BF16, where a weight is larger than {F16_MOST:,.0f}, the most of F16"
                    require("--kind", f"{kind}, and {most:,.0f} in {own}", most <= F16_MOST, rule)
                if to in (Kind.F32, Kind.F16):
                    yield values.astype(np.float32 if to == Kind.F32 else np.float16)
                else:
                    yield quantize(values, to) if to.name == kind else gguf.quants.quantize(values, to)


def _arranged(loaded: LoadedModel, arch: str, name: str, x: Tensor) -> Tensor:
    """A tensor as llama.cpp has it: rows of a llama's q and k are interleaved, for another form of RoPE."""
    if arch != "llama" or not re.search(r"attn_[qk]\.(weight|bias)$", name):
        return x.contiguous()
    half = heads_of(loaded.config)[2] // 2
    pairs = x.reshape(-1, 2, half, *x.shape[1:]).transpose(1, 2)
    return pairs.reshape(x.shape).contiguous()


def _file_type(kind: str) -> int:
    """The number by which llama.cpp names what most tensors of a file are."""
    names = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}
    names |= {"Q3_K": "MOSTLY_Q3_K_M"}
    found = getattr(gguf.LlamaFileType, names.get(kind, f"MOSTLY_{kind}"), gguf.LlamaFileType.GUESSED)
    return int(found)
