"""Load a language model from a folder, a GGUF file, the hub or the package, and name it by its bytes."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dfrot_lab.disk import downloads
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.disk.atomic import digest
from dfrot_lab.model import gguf_files
from dfrot_lab.model.checkpoint import Checkpoint, check, memory, quiet, weight_bytes
from dfrot_lab.model.experts import unfuse
from dfrot_lab.model.families import CAUSAL, Roles, oddity, roles_of
from dfrot_lab.recipe.base import content_key, require
from dfrot_lab.recipe.keys import model_key
from dfrot_lab.recipe.specs import DTYPES, ModelSpec

log = logging.getLogger(__name__)
DEVICE = "DFROT_LAB_DEVICE"  # environment variable: what device `auto` is: cpu, cuda, or auto
MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")  # what makes a model, its tokenizer too


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
    most = loaded.context
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
        if (path / "config.json").exists() and list(path.glob("*.safetensors")):
            return "folder", path
        rule = "a folder with config.json and *.safetensors weights"
        raise ValueError(f"ModelSpec.source must be {rule}; got {path} without them")
    if gguf_files.is_gguf(path):
        return "gguf", path
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix.lower() != ".gguf"
    hint = f" For a model on the hub say hub:{source}." if is_hub_name else ""
    rule = f"{', '.join(downloads.MODELS)}, a folder, a .gguf file or hub:owner/name"
    raise ValueError(f"ModelSpec.source must be {rule}; got {source!r}, which is none of them.{hint}")


def fingerprint(spec: ModelSpec) -> str:
    """Key of the model's bytes, dtype and kind of device; files that did not change are not read again."""
    spec = placed(spec)
    return model_key(_bytes_key(spec), spec.dtype, spec.device)


def _bytes_key(spec: ModelSpec) -> str:
    kind, place = resolve(spec)
    if kind == "packaged":
        return downloads.MODELS[str(place)].sha256[:32]
    if kind == "hub":
        return content_key([place, _hub_commit(str(place), spec.revision)])
    if kind == "gguf":
        return gguf_files.key_of(Path(place))
    files = sorted(f for f in Path(place).iterdir() if f.suffix in MODEL_FILES)
    return content_key([[f.name, digest(f)] for f in files])


@cache
def _hub_commit(name: str, revision: str | None) -> str | None:
    """The commit of a hub model, which the path of its cached config holds; one for a whole process."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    with _hub_errors(f"hub:{name}"):
        return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)


def _hub_folder(name: str, revision: str | None) -> Path:
    """A hub model's folder in the local cache: fetched, or as it is there."""
    from huggingface_hub import snapshot_download

    with _hub_errors(f"hub:{name}"):
        wanted = [f"*{suffix}" for suffix in MODEL_FILES]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "Check the network and the name, or give a local folder."
        raise OSError(f"cannot read {source} from the hub ({error}). {advice}") from error


def load_model(
    spec: ModelSpec | None = None, store: Store | None = None, *, whole: bool = False
) -> LoadedModel:
    """Load `spec` in eval mode on its device; a GGUF file is dequantised once into the store (about 20 s).
    ValueError: an unknown source, an unsupported family, a damaged file. OSError: a hub out of reach."""
    spec = placed(spec or ModelSpec())
    if spec.device == "cuda" and not torch.cuda.is_available():
        rule = f"ModelSpec.device and {DEVICE} must be cpu or auto where torch sees no GPU; got cuda"
        raise ValueError(f"{rule}. Results stored with it can be read, but nothing computed")
    kind, place = resolve(spec)
    key, name, provenance = _bytes_key(spec), fingerprint(spec), f"{kind} {place}"
    if kind == "packaged":
        kind, place = "gguf", downloads.fetch(downloads.MODELS[str(place)])
    if kind == "gguf":
        place, provenance = gguf_files.folder(Path(place), key, store or Store())
    config = config_of(place, spec)
    if kind == "hub":
        place = _hub_folder(str(place), spec.revision)
    place = Path(place)
    size, limit = weight_bytes(place, spec.dtype), memory(spec.device)
    keeps = size <= limit
    if whole and not keeps:
        said = f"{size / 1e9:.1f} GB of weights, and room for {limit / 1e9:.1f}"
        raise ValueError(f"a model must fit into memory as a whole for this; got {said}: take a smaller one")
    model = _from_pretrained(place, spec).to(spec.device) if keeps else _without_weights(config, spec)
    tokenizer, roles = _tokenizer(str(place), spec.revision, key), roles_of(type(model).__name__)
    checkpoint = None if keeps else Checkpoint(place, model, roles, spec.device)
    if checkpoint:
        log.info("%s is read layer by layer: it does not fit into %.1f GB", spec.source, limit / 1e9)
    model = model.eval().requires_grad_(False)
    for layer in model.get_submodule(roles.layers):
        unfuse(layer, roles)
    return LoadedModel(model, tokenizer, roles, spec, name, provenance, checkpoint)


def _without_weights(config: Any, spec: ModelSpec) -> Any:
    """The model of a config, its parameters on `meta`: there is nothing in them."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype))


def config_of(place: Path | str, spec: ModelSpec) -> Any:
    """The transformers config in a folder or at the hub; a ValueError if its family cannot be rotated."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with nullcontext() if isinstance(place, Path) else _hub_errors(spec.source):
        config = AutoConfig.from_pretrained(place, revision=spec.revision)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)  # what from_pretrained will take
    said = str((config.architectures or [causal or type(config).__name__])[0])
    roles_of(causal if causal and said.endswith(CAUSAL) else said)
    if told := getattr(config, "quantization_config", None):
        method = told.get("quant_method", "a method it does not name")
        raise ValueError(f"{spec.source} is already quantized, by {method}: use the unquantized model")
    if why := oddity(config):
        raise ValueError(f"this {causal} cannot be rotated here without changing it: {why}")
    return config


def _from_pretrained(place: Path, spec: ModelSpec) -> Any:
    from safetensors import SafetensorError

    options = {"revision": spec.revision, "output_loading_info": True}
    try:
        model, found = _quietly(place, dtype=getattr(torch, spec.dtype), **options)
    except (SafetensorError, RuntimeError) as error:
        fault = f"are damaged or not this model's ({error}). Copy or download them again."
        raise ValueError(f"the weights in {place} {fault}") from error
    check(place, found["missing_keys"], found["unexpected_keys"])
    return model


@cache
def _tokenizer(place: str, revision: str | None, _bytes: str) -> Any:
    """The tokenizer of a model with these bytes; loaded once, so that a text is tokenised once."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, revision=revision)
    except (ValueError, OSError, KeyError) as error:
        said = f"no tokenizer can be loaded from {place} ({error}). Put its tokenizer.json there."
        raise ValueError(said) from error


def _quietly(place: Path | str, **options: Any) -> Any:
    """transformers' model without its own loading bars."""
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(place, **options)
