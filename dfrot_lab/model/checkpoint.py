"""A model's weights on disk, read one part at a time into a model that has none: each decoder layer, what
comes before the layers, what comes after. Names and conversions (experts stacked, prefixes) are
transformers' own, so a part is what `from_pretrained` would have put there."""

import ctypes
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dfrot_lab.model.experts import fused
from dfrot_lab.model.families import Roles
from dfrot_lab.model.files import HARMLESS, headers
from dfrot_lab.recipe.base import require

Parts = dict[int, list[tuple[str, str, Path]]]  # of each part its tensors: name to load as, own name, file
EMBEDDING, HEAD = -1, -2  # the parts that are no layer: all before the layers; final norm and lm_head
MEMORY = "DFROT_LAB_MEMORY"  # environment variable: GB that weights may fill; a larger model is streamed
FREE_SHARE = 0.6  # of the memory that is free, what weights may fill by default: the rest is for the work


def part_of(name: str, roles: Roles) -> int:
    """The part that a parameter of the model, or a tensor so named, belongs to."""
    if name.startswith(f"{roles.layers}."):
        return int(name.removeprefix(f"{roles.layers}.").split(".")[0])
    return HEAD if name.startswith((f"{roles.final_norm}.", f"{roles.lm_head}.")) else EMBEDDING


def parameters_of(model: nn.Module, roles: Roles, part: int) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a part by name, each as often as it is there."""
    named = model.named_parameters(remove_duplicate=False)
    return ((name, x) for name, x in named if part_of(name, roles) == part)


def memory(device: str) -> float:
    """Bytes that a model's weights may fill there: as DFROT_LAB_MEMORY says, or most of what is free."""
    if said := os.environ.get(MEMORY):
        with suppress(ValueError):
            if (size := float(said)) >= 0:
                return size * 1e9
        raise ValueError(f"{MEMORY} must be a number of GB; got {said!r}")
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return FREE_SHARE * free


def check(folder: Path, missing: Collection[str], strange: Collection[str]) -> None:
    """Refuse weights that are not those of the model: a ValueError names the first that is `missing`, for
    which transformers would go on with random numbers, or `strange`, which it would leave out."""
    strange = [name for name in strange if not name.endswith(HARMLESS)]
    advice = "Copy or download config.json and the weights again."
    if missing:
        fault = f"lack {len(missing)} tensors, the first {min(missing)}"
        raise ValueError(f"the weights in {folder} {fault}. {advice}")
    if strange:
        fault = f"hold {len(strange)} tensors that its config has no place for, the first {min(strange)}"
        raise ValueError(f"the weights in {folder} {fault}. {advice}")


def check_shape(folder: Path, name: str, shape: Collection[int], wanted: Collection[int]) -> None:
    """Refuse a tensor of another shape than the model's; ValueError."""
    rule = f"of the shape {tuple(wanted)}, as its config says"
    require(f"{name} of the weights in {folder}", tuple(shape), tuple(shape) == tuple(wanted), rule)


def check_finite(source: str, named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights with a NaN or Inf in the dtype that is computed in: a ValueError names the first."""
    for name, x in named:
        if x.numel() and not bool(torch.stack(x.detach().aminmax()).isfinite().all()):
            dtype = str(x.dtype).removeprefix("torch.")
            fault = f"must be finite in {dtype}; {name} has NaN or Inf: it is broken, or takes a wider dtype"
            raise ValueError(f"the weights of {source} {fault}")


@contextmanager
def quiet() -> Iterator[None]:
    """While the block runs transformers shows no loading bars and warns of nothing: what it would is refused
    by name, or set right."""
    from transformers.utils import logging

    was_on, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if was_on:
            logging.enable_progress_bar()


def _trim() -> None:
    """Give what is free of the heap back to the system: where glibc was told to keep it (`cli.options`), half
    a layer of a 7B stayed each time."""
    with suppress(OSError, AttributeError, TypeError):  # another C library, another system
        ctypes.CDLL(None).malloc_trim(0)


def places_of(folder: Path, model: nn.Module, roles: Roles) -> tuple[Any, Parts]:
    """transformers' conversions for `model`, which has no weights (on `meta`), and of each of its parts the
    tensors in a `folder`. ValueError: one that is missing, strange, there twice, or of another size."""
    from transformers import conversion_mapping, core_model_loading as core

    own: Any = model
    mapping: Any = conversion_mapping.get_model_conversion_mapping(own)
    renamings = [each for each in mapping if isinstance(each, core.WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, core.WeightConverter)]
    wanted, found = dict(model.state_dict()), headers(folder)
    parts: Parts = defaultdict(list)
    patterns = {source: each for each in converters for source in each.source_patterns}
    strange, at = list[str](), dict[str, tuple[str, Path]]()
    held, filled = defaultdict[tuple[str, ...], int](int), set[str]()
    for name, (path, shape) in found.items():
        target, pattern = core.rename_source_key(name, renamings, converters, own.base_model_prefix, wanted)
        ends = patterns[pattern].target_patterns if pattern else [""]
        made = tuple(target.replace(ends[0], end) for end in ends) if pattern else (target,)
        if target not in wanted or (target in at and not pattern):  # or it is there under another name
            strange.append(at[target][0] if name == target and target in at else name)
            continue
        if not pattern:
            check_shape(folder, name, shape, wanted[target].shape)
        parts[part_of(target, roles)].append((name, name, path))
        at[target] = (name, path)
        held[made] += math.prod(shape)
        filled |= {*made}
    ends = [f"{name}.weight" for name in (roles.embedding, roles.lm_head)]
    for end, other in (ends, ends[::-1]):  # each stands for the other, where it is alone
        if own.config.tie_word_embeddings and end not in filled and other in at:
            parts[part_of(end, roles)].append((end, *at[other]))
            filled.add(end)
    check(folder, set(wanted) - filled, strange)
    for made, size in held.items():
        room = sum(wanted[name].numel() for name in made)
        what = f"the tensors of {made[0]} of the weights in {folder}"
        require(what, f"{size:,}", size == room, f"of {room:,} values together, as its config says")
    return mapping, parts


class Checkpoint:
    """The weights in a `folder` for `model`, a transformers model without weights (on `meta`), of `roles`."""

    def __init__(self, folder: Path, model: nn.Module, roles: Roles, device: str) -> None:
        self.model, self.roles, self.device, self.folder = model, roles, device, folder
        self._finite = set[int]()
        self._reader = ThreadPoolExecutor(1)
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}
        self.mapping, self.parts = places_of(folder, model, roles)

    def read(self, part: int) -> None:
        """Fill one part of the model with its weights. ValueError: a tensor missing, or of another shape."""
        from transformers import core_model_loading as core
        from transformers.modeling_utils import LoadStateDictConfig

        own: Any = self.model
        options: dict[str, Any] = {"device_map": {"": self.device}, "weight_mapping": self.mapping}
        config = LoadStateDictConfig(**options, dtype=own.dtype)
        coming = self._coming.pop(part, None)
        tensors = coming.result() if coming else self._tensors(part)
        with quiet(), self._fused(part):
            info, _ = core.convert_and_load_state_dict_in_model(own, tensors, config)
        for _, x in self._parameters(part):
            x.requires_grad_(False)
        faults = [*info.mismatched_keys, *info.conversion_errors]
        faults += [name for name, x in self._parameters(part) if x.is_meta]
        if faults:
            fault = f"lack {len(faults)} tensors, the first {faults[0]}. Copy or download them again."
            raise ValueError(f"the weights {fault}")
        if part not in self._finite:  # else it was looked at when it was read before
            check_finite(str(self.folder), self._parameters(part))
            self._finite.add(part)

    def ahead(self, part: int) -> None:
        """On a GPU, begin to read a layer into pinned memory, while the one before it computes."""
        if self.device == "cuda" and part in self.parts and part not in self._coming:
            self._coming[part] = self._reader.submit(self._tensors, part, pinned=True)

    def _tensors(self, part: int, *, pinned: bool = False) -> dict[str, Tensor]:
        """A part's tensors as the file holds them, by the name to load as; unless `pinned` still on disk."""
        from safetensors import safe_open

        found = dict[str, Tensor]()
        for path in {path for _, _, path in self.parts[part]}:
            with safe_open(path, framework="pt") as file:
                found |= {to: file.get_tensor(name) for to, name, where in self.parts[part] if where == path}
        return {name: x.pin_memory() for name, x in found.items()} if pinned else found

    def drop(self, part: int) -> None:
        """Forget one part's weights."""
        with self._fused(part):
            for name, x in list(self._parameters(part)):
                owner, _, last = name.rpartition(".")
                empty = torch.empty(x.shape, dtype=x.dtype, device="meta")
                module = self.model.get_submodule(owner)
                module.register_parameter(last, nn.Parameter(empty, requires_grad=False))
        _trim()

    def _fused(self, part: int) -> AbstractContextManager[None]:
        if part < 0:
            return nullcontext()
        return fused(self.model.get_submodule(f"{self.roles.layers}.{part}"), self.roles)

    def _parameters(self, part: int) -> Iterator[tuple[str, nn.Parameter]]:
        return parameters_of(self.model, self.roles, part)
