"""What this machine has, what is cached and what is missing: to be looked at first when something fails."""

import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from dfrot_lab.disk import downloads
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.disk.atomic import cache_dir
from dfrot_lab.model import corpus, loading
from dfrot_lab.recipe.specs import DEFAULT_MODEL, CorpusSpec, ModelSpec

PACKAGES = "dfrot-lab torch transformers tokenizers safetensors compressed-tensors gguf numpy scipy pandas"
DISK_NEEDED = 3e9
"""Bytes the main job writes, doubled: model 0.54 GB, capture 0.28, weights 4 x 0.11, downloads 0.12."""
MEMORY_NEEDED = 6e9
"""Bytes of memory the main job peaks at with the default model, rounded up."""


def checkup(model: ModelSpec, text: CorpusSpec) -> tuple[dict[str, Any], list[str]]:
    """What is here, as facts by name, and what is missing, each with what to do. Nothing is fetched."""
    import psutil

    folder = cache_dir()
    memory, free = psutil.virtual_memory().total, shutil.disk_usage(folder).free
    versions = {name: _version(name) for name in (*PACKAGES.split(), "jupyterlab")}
    about = {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "versions": versions,
        "cores": os.cpu_count(),
        "memory": f"{memory / 1e9:.1f} GB",
        "cuda": _cuda(),
        "cache": {"folder": str(folder), "free": f"{free / 1e9:.1f} GB", **_cached(folder)},
        "model": _state(lambda: loading.resolve(model)[0]),
        "corpus": _state(lambda: corpus.resolve(text).name),
    }
    missing = [
        f"{name} is not installed: pip install -r requirements.txt" for name in versions if not versions[name]
    ]
    if free < DISK_NEEDED:
        room = f"{free / 1e9:.1f} GB are free in {folder}; set DFROT_LAB_CACHE"
        missing.append(f"{DISK_NEEDED / 1e9:.0f} GB of disk for the cache: {room}")
    if memory < MEMORY_NEEDED:
        missing.append(f"{MEMORY_NEEDED / 1e9:.0f} GB of memory; this machine has {memory / 1e9:.1f} GB")
    states = (str(about[name]) for name in ("model", "corpus"))
    return about, missing + [state for state in states if state.startswith("missing")]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: everything runs on the CPU"
    kernel = _version("fast-hadamard-transform") or "not installed: the torch path is used"
    return f"{torch.cuda.get_device_name()}, fast-hadamard-transform {kernel}"


def _cached(folder: Path) -> dict[str, str]:
    """What the cache holds: the default model's download, and the artefacts by kind."""
    kinds = Counter(artefact.kind for artefact in Store(folder / "store").list())
    here = downloads.SMOLLM2_GGUF.path().exists()
    return {
        f"{DEFAULT_MODEL} download": "fetched" if here else "not fetched yet (about 93 MB; dfrot-lab fetch)",
        "artefacts": ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "none yet",
    }


def _state(resolve: Callable[[], object]) -> str:
    try:
        return str(resolve())
    except (ValueError, OSError) as error:
        return f"missing: {error}"
