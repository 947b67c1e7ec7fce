"""Load a language model; which of its parts plays which role is said in `families`."""

import json
import logging
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dfrot_lab.disk import downloads
from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.model.families import FAMILIES, Roles, roles_of
from dfrot_lab.recipe.keys import content_key, file_digest, model_key
from dfrot_lab.recipe.specs import DEFAULT_MODEL, ModelSpec

log = logging.getLogger(__name__)


DEVICE = "DFROT_LAB_DEVICE"
"""The environment variable that says where models run: `cpu`, `cuda`, or `auto` (default): a GPU where torch
sees one.
"""

ROLES = FAMILIES

MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Endings of the files that make a model folder what it is."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for surgery: the transformers module (eval mode), its tokenizer, roles, spec, content
    hash and where it came from.
    """

    model: nn.Module
    tokenizer: Any
    roles: Roles
    spec: ModelSpec
    fingerprint: str
    provenance: str

    @property
    def family(self) -> str:
        """The model's class name: its entry in the table of families."""
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        """Where its weights are, and token ids must go."""
        return next(self.model.parameters()).device

    @property
    def channels(self) -> int:
        """C, the width of the residual stream."""
        return int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        return self.model.get_submodule(self.roles.layers)  # type: ignore[return-value]

    @property
    def context(self) -> int:
        """The longest window the model was made for, in tokens."""
        return int(self.model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]


def linear(parent: nn.Module, name: str) -> nn.Linear:
    """The submodule `name` of `parent`: a linear, embedding or norm, with the weight and perhaps the bias
    that surgery edits.
    """
    return cast(nn.Linear, parent.get_submodule(name))


def body(loaded: "LoadedModel") -> nn.Module:
    """The model without its head: token ids in, hidden states out."""
    return loaded.model.get_submodule(loaded.roles.layers.rsplit(".", 1)[0])


def check_tokens(loaded: LoadedModel, window: int) -> None:
    """Refuse windows longer than the model's context."""
    if window > loaded.context:
        raise ValueError(
            f"window must be at most the model's context of {loaded.context} tokens; got {window}"
        )


def resolve(spec: ModelSpec) -> tuple[str, Path | str, str]:
    """(kind, place, fingerprint) of a spec without loading the model: kind is `packaged`, `gguf`, `folder` or
    `hub`.
    """
    source = spec.source
    if source == DEFAULT_MODEL:
        return "packaged", source, downloads.SMOLLM2_GGUF.member_sha256[:32]
    if source.startswith("hub:"):
        name = source.removeprefix("hub:")
        return "hub", name, content_key([name, _config(name, spec)._commit_hash])
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() or not list(path.glob("*.safetensors")):
            raise ValueError(
                f"ModelSpec.source must be a folder with config.json and *.safetensors weights; got {path} without them"
            )
        parts = sorted(
            f for f in path.iterdir() if f.suffix in MODEL_FILES
        )  # the tokenizer's too: it decides what text the model sees
        return "folder", path, content_key([[f.name, file_digest(f)] for f in parts])
    if path.suffix == ".gguf" and path.is_file():
        return "gguf", path, file_digest(path)
    hint = (
        f" For a model on the hub say hub:{source}."
        if re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.gguf)", source)
        else ""
    )
    raise ValueError(
        f"ModelSpec.source must be {DEFAULT_MODEL}, a folder, a .gguf file or hub:owner/name; got {source!r}, which is none of them.{hint}"
    )


def device() -> str:
    """`cpu` or `cuda`, as DFROT_LAB_DEVICE says; a ValueError for anything else."""
    name = os.environ.get(DEVICE, "auto")
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{DEVICE} must be auto, cpu or cuda; got {name!r}")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """`cpu`, or the GPU's own name."""
    return torch.cuda.get_device_name() if device() == "cuda" else "cpu"


def fingerprint(spec: ModelSpec) -> str:
    """Content hash of the model's bytes, the dtype it is loaded in and the kind of device: part of the key of
    every artefact made with it.

    The device, since rounding differs between kinds, and at 4 bits a rounding can turn a code: rows of two
    kinds are not to be compared.
    """
    return _fingerprint(resolve(spec)[2], spec)


def _fingerprint(digest: str, spec: ModelSpec) -> str:
    return model_key(digest, spec.dtype, _device_of(spec))


def _device_of(spec: ModelSpec) -> str:
    return device() if spec.device == "auto" else spec.device


def load_model(spec: ModelSpec | None = None, store: Store | None = None) -> LoadedModel:
    """Load `spec` in eval mode with a known architecture, or refuse it with the reason; on the device that
    DFROT_LAB_DEVICE says.

    A GGUF file is dequantised once into the store (about 20 s for the default model, under 1 s from then on).
    Raises ValueError for an unknown source, an unsupported architecture or a damaged file; OSError for a hub
    that cannot be reached.
    """
    spec = spec or ModelSpec()
    where = _device_of(spec)
    spec = spec.with_(device=where)
    if where == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{DEVICE} must be cpu or auto where torch sees no GPU; got cuda. Results stored with it can be read, but nothing computed"
        )
    kind, place, digest = resolve(spec)
    if kind == "packaged":
        place, kind = downloads.fetch(downloads.SMOLLM2_GGUF), "gguf"
    folder: Path | str
    if kind == "gguf":
        folder, provenance = _dequantised(Path(place), digest, store or Store())
    else:
        folder, provenance = place, f"{kind} {place}"
    roles = roles_of(_architecture(folder, spec))
    model = _from_pretrained(folder, spec)
    tokenizer = _tokenizer(str(folder), spec.revision, digest)
    return LoadedModel(model.eval().to(where), tokenizer, roles, spec, _fingerprint(digest, spec), provenance)


def _architecture(folder: Path | str, spec: ModelSpec) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = _config(folder, spec)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, type(config).__name__)
    return str((config.architectures or [causal])[0])


def _config(folder: Path | str, spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, revision=spec.revision)
    except OSError as error:
        if isinstance(folder, Path):
            raise
        raise OSError(
            f"cannot read {spec.source} from the hub ({error}). Check the network and the name, or give a local folder."
        ) from error


def _from_pretrained(folder: Path | str, spec: ModelSpec) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "dtype": getattr(torch, spec.dtype),
        "revision": spec.revision,
        "output_loading_info": True,
    }
    try:
        with _quiet_loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"the weights in {folder} are damaged or not this model's ({error}). Copy or download them again."
        ) from error
    model, found = loaded
    if missing := sorted(
        found["missing_keys"]
    ):  # transformers would go on with random numbers in their place
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} tensors, the first {missing[0]}. Copy or download them again."
        )
    return model


@cache
def _tokenizer(folder: str, revision: str | None, digest: str) -> Any:
    """The tokenizer of a model whose bytes are `digest`; loaded once, so that a text is tokenised once and
    not for every load of the model.
    """
    from transformers import AutoTokenizer

    del digest  # only told by the cache: a folder whose files were changed has another
    try:
        return AutoTokenizer.from_pretrained(folder, revision=revision)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"no tokenizer can be loaded from {folder} ({error}). Put its tokenizer.json there."
        ) from error


class _quiet_loading:
    """Turn transformers' own loading bars off for a block: ours says what is being done."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf_logging

        self.was_on = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as hf_logging

        if self.was_on:
            hf_logging.enable_progress_bar()


def _dequantised(path: Path, digest: str, store: Store) -> tuple[Path, str]:
    """A GGUF file as a folder of float32 safetensors in the store, and words that say what it is."""

    def convert(writer: Writer) -> None:
        log.info("dequantising %s to float32, once (about 20 s)", path.name)
        model, tokenizer, types = _read_gguf(path)
        shared = (
            set(getattr(model, "_tied_weights_keys", None) or {})
            if model.config.tie_word_embeddings
            else set()
        )
        writer.save_tensors(
            "model", {name: x for name, x in model.state_dict().items() if name not in shared}
        )
        with tempfile.TemporaryDirectory() as scratch:
            model.config.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch, save_jinja_files=False)
            for file in Path(scratch).glob("*.json"):
                writer.save_json(file.stem, json.loads(file.read_text()))
        writer.note["provenance"] = f"dequantised {types} of {path.name}"

    artefact = store.get_or_make("model", {"gguf": digest}, convert)
    return artefact.path, str(artefact.manifest["note"]["provenance"])


def _read_gguf(path: Path) -> tuple[Any, Any, str]:
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tensors = gguf.GGUFReader(path).tensors
        kinds = sorted({t.tensor_type.name for t in tensors} - {"F32"}) or ["F32"]
        with _quiet_loading():
            options: dict[str, Any] = {
                "gguf_file": path.name,
                "dtype": torch.float32,
                "quantization_config": GgufConfig(dequantize=True),
            }
            model = AutoModelForCausalLM.from_pretrained(path.parent, **options)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, OSError, RuntimeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{path} is not a whole GGUF file ({type(error).__name__}: {error}). Copy or download it again."
        ) from error
    model.config.architectures = [
        type(model).__name__
    ]  # written by save_pretrained only, and our table of roles is keyed by it
    return model, tokenizer, "/".join(kinds)
