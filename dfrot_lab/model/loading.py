"""Load a language model from a folder, a GGUF file, the hub or the package, and name it by its bytes."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dfrot_lab.disk import downloads
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.disk.atomic import Changed, digest
from dfrot_lab.model import files, folder, gguf_files, packed_files
from dfrot_lab.model.checkpoint import Checkpoint, check_finite, memory
from dfrot_lab.model.experts import unfuse
from dfrot_lab.model.families import Roles, roles_of
from dfrot_lab.recipe.base import hint_of_signed, require
from dfrot_lab.recipe.keys import model_key
from dfrot_lab.recipe.specs import DTYPES, ModelSpec

log = logging.getLogger(__name__)
DEVICE = "DFROT_LAB_DEVICE"  # environment variable: what device `auto` is: cpu, cuda, or auto
_finite = set[str]()  # fingerprints of the models that were found without NaN and Inf in this process


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model (eval mode) ready for surgery, and what is known of it. One that does not fit into
    memory has a `checkpoint` in place of weights: `model.stream` reads it part by part, makes `changes` to
    each part read and has layers wear `dresses` in use; `done` names the surgery among the changes. `online`
    holds what acts on activations for good."""

    model: nn.Module
    tokenizer: Any
    roles: Roles
    spec: ModelSpec
    fingerprint: str
    provenance: str
    checkpoint: Checkpoint | None = None
    changes: list[tuple[Any, set[int]]] = field(default_factory=list)
    dresses: list[Any] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    online: ExitStack = field(default_factory=ExitStack)

    @property
    def family(self) -> str:
        """The model's class name: its entry in the table of families."""
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        """Where it computes, and token ids must go."""
        own = next(self.model.parameters()).device
        return own if self.checkpoint is None else torch.device(self.checkpoint.device)

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.model.config

    @property
    def channels(self) -> int:
        """C, the width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        return cast(nn.ModuleList, self.model.get_submodule(self.roles.layers))

    @property
    def context(self) -> int:
        """The longest window the model was made for, in tokens."""
        return int(self.config.max_position_embeddings)


def linear(parent: nn.Module, name: str) -> nn.Linear:
    """The submodule `name`: a linear, embedding or norm, whose weight and bias surgery edits."""
    return cast(nn.Linear, parent.get_submodule(name))


def body(loaded: LoadedModel) -> nn.Module:
    """The model without its head: token ids in, hidden states out."""
    return loaded.model.get_submodule(loaded.roles.layers.rpartition(".")[0])


def check_tokens(loaded: LoadedModel, window: int) -> None:
    """Refuse windows longer than the model's context."""
    check_window(window, loaded.context)


def check_window(window: int, most: int) -> None:
    """Refuse windows longer than the `most` tokens that a model was made for."""
    require("window", window, window <= most, f"at most the model's context of {most} tokens")


def device() -> str:
    """What device `auto` is here, as DFROT_LAB_DEVICE says: `cpu` or `cuda`; else a ValueError."""
    name = os.environ.get(DEVICE, "auto")
    require(DEVICE, repr(name), name in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def placed(spec: ModelSpec) -> ModelSpec:
    """`spec` with its device and dtype named: its own, or what `auto` is here."""
    spec = spec.with_(device=device()) if spec.device == "auto" else spec
    return spec.with_(dtype=_own_dtype(spec)) if spec.dtype == "auto" else spec


def _own_dtype(spec: ModelSpec) -> str:
    """On a GPU what the weights are in; on a CPU, where 16 bits are slower and no better, float32."""
    kind, place = ("", "") if spec.device == "cpu" else resolve(spec)
    if kind not in ("folder", "hub"):
        return "float32"
    own = str(config_of(place, spec).dtype).removeprefix("torch.")
    return own if own in DTYPES else "float32"


def device_name() -> str:
    """`cpu`, or the GPU's own name."""
    return torch.cuda.get_device_name() if device() == "cuda" else "cpu"


def resolve(spec: ModelSpec) -> tuple[str, Path | str]:
    """(kind, place) of a spec, nothing read: `packaged`, `gguf`, `folder` or `hub`; a ValueError if none."""
    source = spec.source
    if source in downloads.MODELS:
        return "packaged", source
    if source.startswith("hub:"):
        return "hub", source.removeprefix("hub:")
    path = Path(source).expanduser()
    if path.is_dir():
        if files.is_model(path):
            return "folder", path
        rule = "a folder with config.json and *.safetensors weights"
        other = next((f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth")), "")
        how = f". Convert {other}: save the model anew with transformers' save_pretrained" if other else ""
        raise ValueError(f"ModelSpec.source must be {rule}; got {path} without them{how}")
    if gguf_files.is_gguf(path):
        return "gguf", path
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix.lower() != ".gguf"
    hint = f" For a model on the hub say hub:{source}." if is_hub_name else hint_of_signed(source)
    rule = f"{', '.join(downloads.MODELS)}, a folder, a .gguf file or hub:owner/name"
    raise ValueError(f"ModelSpec.source must be {rule}; got {source!r}, which is none of them.{hint}")


def fingerprint(spec: ModelSpec) -> str:
    """Key of the model's bytes, dtype and kind of device; files that did not change are not read again."""
    spec = placed(spec)
    return model_key(_bytes_key(spec), spec.dtype, spec.device)


def _sha256_key(file: downloads.WheelFile) -> str:
    return digest(file.path(), "sha256")[:32]


def _bytes_key(spec: ModelSpec) -> str:
    kind, place = resolve(spec)
    if kind == "packaged":
        return downloads.MODELS[str(place)].sha256[:32]
    if kind == "gguf":
        return gguf_files.key_of(Path(place))
    return files.key_of(Path(place) if kind == "folder" else _hub_folder(str(place), spec.revision))


@cache
def _hub_folder(name: str, revision: str | None, *, whole: bool = True) -> Path:
    """The folder of a hub model's commit in the local cache, fetched if it is not there: all that is read to
    load it, or its config alone. The commit is the same for a whole process."""
    from huggingface_hub import snapshot_download

    if whole:
        revision = _hub_folder(name, revision, whole=False).name
    wanted = [f"*{ending}" for ending in (*files.TEXTS, ".safetensors")] if whole else ["config.json"]
    with _hub_errors(f"hub:{name}"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "Check the network and the name, or give a local folder."
        raise OSError(f"cannot read {source} from the hub ({error}). {advice}") from error


def _folder(spec: ModelSpec, key: str, store: Store) -> tuple[Path, str]:
    """The folder of a model whose bytes have this key, and words that say where it is from."""
    kind, place = resolve(spec)
    if kind == "packaged":
        file = downloads.MODELS[str(place)]
        key_now = partial(_sha256_key, file)
        return gguf_files.folder(partial(downloads.fetch, file), key, key_now, store)
    if kind == "gguf":
        return gguf_files.folder(lambda: Path(place), key, partial(_bytes_key, spec), store)
    found = Path(place) if kind == "folder" else _hub_folder(str(place), spec.revision)
    if packed_files.told(found):
        return packed_files.plain(found, spec.source, key, partial(_bytes_key, spec), store)
    return found, f"{kind} {place}"


def config_of(place: Path | str, spec: ModelSpec) -> Any:
    """The transformers config in a folder or at the hub; ValueErrors as of `folder.config_of`."""
    at = place if isinstance(place, Path) else _hub_folder(place, spec.revision, whole=False)
    return folder.config_of(at, spec.source)


def folder_of(spec: ModelSpec, store: Store | None = None) -> Path:
    """The folder of plain weights that a model is loaded from."""
    spec = placed(spec)
    return _folder(spec, _bytes_key(spec), store or Store())[0]


def words_of(spec: ModelSpec, store: Store | None = None) -> tuple[Any, int]:
    """The tokenizer of a model and its context in tokens, without its weights."""
    spec = placed(spec)
    key = _bytes_key(spec)
    place, _ = _folder(spec, key, store or Store())
    config = config_of(place, spec)
    return folder.tokenizer_of(str(place), config.vocab_size, key), int(config.max_position_embeddings)


def roles_for(spec: ModelSpec, store: Store | None = None) -> Roles:
    """The roles of a model's family, without its weights."""
    return roles_of(folder.class_name(config_of(folder_of(spec, store), spec)))


def load_model(
    spec: ModelSpec | None = None, store: Store | None = None, *, whole: bool = False
) -> LoadedModel:
    """Load `spec` in eval mode on its device; a GGUF file is dequantised once into the store (about 20 s).
    ValueError: an unknown source, an unsupported family, a damaged file. OSError: a hub out of reach."""
    spec = placed(spec or ModelSpec())
    if spec.device == "cuda" and not torch.cuda.is_available():
        rule = f"ModelSpec.device and {DEVICE} must be cpu or auto where torch sees no GPU; got cuda"
        raise ValueError(f"{rule}. Results stored with it can be read, but nothing computed")
    key, name = _bytes_key(spec), fingerprint(spec)
    place, provenance = _folder(spec, key, store or Store())
    config, found = config_of(place, spec), files.headers(place)
    roles, shapes = roles_of(folder.class_name(config)), {each: shape for each, (_, shape) in found.items()}
    files.check_sizes(place / "config.json", config, roles, shapes)
    size, limit = files.weight_bytes(found, spec.dtype), memory(spec.device)
    keeps = size <= limit
    if whole and not keeps:
        said = f"{size / 1e9:.1f} GB of weights, and room for {limit / 1e9:.1f}"
        raise ValueError(f"a model must fit into memory as a whole for this; got {said}: take a smaller one")
    tokenizer = folder.tokenizer_of(str(place), config.vocab_size, key)
    model = folder.model_of(config, spec.dtype, place, keeps=keeps)
    model = model.to(spec.device) if keeps else model
    for weight in model.parameters() if keeps and spec.device == "cpu" else ():  # a GPU has its own copy
        weight.data = weight.data.clone()  # else the file's own pages, which change with the file
    if keeps and name not in _finite:
        check_finite(spec.source, model.named_parameters())
        _finite.add(name)
    checkpoint = None if keeps else Checkpoint(place, model, roles, spec.device)
    if checkpoint:
        log.info("%s is read layer by layer: it does not fit into %.1f GB", spec.source, limit / 1e9)
    model = model.eval().requires_grad_(False)
    for layer in model.get_submodule(roles.layers):
        unfuse(layer, roles)
    if key != _bytes_key(spec):
        raise Changed(f"{spec.source} was changed while it was read: run the same command again")
    return LoadedModel(model, tokenizer, roles, spec, name, provenance, checkpoint)
