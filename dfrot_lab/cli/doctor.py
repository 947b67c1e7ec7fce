"""What this machine has, what is cached and what is missing: to be looked at first when something fails."""

import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from dfrot_lab.disk import downloads
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.disk.atomic import cache_dir
from dfrot_lab.model import corpus, loading
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec

MODEL_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "gguf")
PACKAGES = ("dfrot-lab", *MODEL_PACKAGES, "numpy", "scipy", "pandas", "jupyterlab")
DISK_NEEDED = 3e9  # bytes, twice what the main job writes: model 0.54 GB, capture 0.28, weights, downloads
MEMORY_NEEDED = 6e9  # bytes of memory the main job peaks at with the default model, rounded up


def checkup(model: ModelSpec, text: CorpusSpec) -> tuple[dict[str, Any], list[str]]:
    """What is here, as facts by name, and what is missing, each with what to do. Nothing is fetched."""
    folder = cache_dir()
    memory, free = psutil.virtual_memory().total, shutil.disk_usage(folder).free
    versions = {name: _version(name) for name in PACKAGES}
    kinds = Counter(artefact.kind for artefact in Store().list())
    cache = {"folder": str(folder), "free": f"{free / 1e9:.1f} GB"}
    for name, file in downloads.MODELS.items():
        asked = f"not fetched yet (about {file.mb:.0f} MB; dfrot-lab fetch --model {name})"
        cache[f"{name} download"] = "fetched" if file.path().exists() else asked
    cache["artefacts"] = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "none yet"
    cuda = "none: everything runs on the CPU"
    if torch.cuda.is_available():
        compiled = _version("fast-hadamard-transform")
        kernel = "installed" if compiled else "not installed: the torch path is used"
        cuda = f"{torch.cuda.get_device_name()}, fast-hadamard-transform {kernel}"
    states = {"model": _state(lambda: loading.resolve(model)[0])}
    states["corpus"] = _state(lambda: corpus.resolve(text).name)
    if Path(text.name).is_file():  # read, to see that there is a text in it
        states["corpus"] = _state(lambda: corpus.load_text(text) and text.name)
    about: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    about |= {"versions": versions, "cores": os.cpu_count(), "memory": f"{memory / 1e9:.1f} GB"}
    about |= {"cuda": cuda, "cache": cache, **states}
    told = "is not installed: pip install -r requirements.txt"
    missing = [f"{name} {told}" for name, found in versions.items() if found is None]
    if free < DISK_NEEDED:
        room = f"{free / 1e9:.1f} GB are free in {folder}; set DFROT_LAB_CACHE"
        missing.append(f"{DISK_NEEDED / 1e9:.0f} GB of disk for the cache: {room}")
    if memory < MEMORY_NEEDED:
        missing.append(f"{MEMORY_NEEDED / 1e9:.0f} GB of memory; this machine has {memory / 1e9:.1f} GB")
    missing += [state.removeprefix("missing: ") for state in states.values() if state.startswith("missing")]
    return about, missing


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _state(resolve: Callable[[], object]) -> str:
    try:
        return str(resolve())
    except (ValueError, OSError) as error:
        return f"missing: {error}"
