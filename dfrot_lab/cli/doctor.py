"""What this machine has, what is cached and what is missing: the first thing to look at when something does
not work.
"""

import importlib.util
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from dfrot_lab.disk import downloads
from dfrot_lab.disk.artefacts import Store, cache_dir
from dfrot_lab.model import corpus, loading
from dfrot_lab.recipe.specs import DEFAULT_MODEL, CorpusSpec, ModelSpec

PACKAGES = (
    "dfrot-lab",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "compressed-tensors",
    "gguf",
    "numpy",
    "scipy",
    "pandas",
    "jupyterlab",
)
DISK_NEEDED = 3e9
"""Bytes the main job writes: the converted model 0.54 GB, a capture 0.28 GB, four sets of 4-bit weights of
0.11 GB, downloads 0.12 GB; doubled.
"""
MEMORY_NEEDED = 6e9
"""Bytes of memory the main job peaks at with the default model, rounded up."""


def checkup(model: ModelSpec, text: CorpusSpec) -> tuple[dict[str, Any], list[str]]:
    """What is here, as a table, and what is missing, each with what to do about it. Nothing is fetched or
    changed.
    """
    import psutil

    folder = cache_dir()
    memory, free = psutil.virtual_memory().total, shutil.disk_usage(folder).free
    about = {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "versions": {name: _version(name) for name in PACKAGES},
        "cores": os.cpu_count(),
        "memory": f"{memory / 1e9:.1f} GB",
        "cuda": _cuda(),
        "cache": {"folder": str(folder), "free": f"{free / 1e9:.1f} GB", **_cached(folder)},
        "model": _state(lambda: loading.resolve(model)[0]),
        "corpus": _state(lambda: corpus.resolve(text).name),
    }
    missing = [
        f"{name} is not installed: pip install -r requirements.txt"
        for name in PACKAGES
        if _version(name) is None
    ]
    if free < DISK_NEEDED:
        missing.append(
            f"{DISK_NEEDED / 1e9:.0f} GB of disk for the cache: {free / 1e9:.1f} GB are free in {folder}; set DFROT_LAB_CACHE"
        )
    if memory < MEMORY_NEEDED:
        missing.append(f"{MEMORY_NEEDED / 1e9:.0f} GB of memory; this machine has {memory / 1e9:.1f} GB")
    missing += [
        fault
        for fault in (about["model"], about["corpus"])
        if isinstance(fault, str) and fault.startswith("missing")
    ]
    return about, missing


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: everything runs on the CPU"
    kernel = (
        "installed"
        if importlib.util.find_spec("fast_hadamard_transform")
        else "not installed: the torch path is used"
    )
    return f"{torch.cuda.get_device_name()}, fast-hadamard-transform {kernel}"


def _cached(folder: Path) -> dict[str, str]:
    """What the cache holds: the default model's download, and the artefacts by kind."""
    artefacts = Store(folder / "store").list()
    kinds = sorted({a.kind for a in artefacts})
    counts = {kind: sum(a.kind == kind for a in artefacts) for kind in kinds}
    download = (
        "fetched"
        if downloads.SMOLLM2_GGUF.path().exists()
        else "not fetched yet (about 93 MB; dfrot-lab fetch)"
    )
    return {
        f"{DEFAULT_MODEL} download": download,
        "artefacts": ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "none yet",
    }


def _state(resolve: Any) -> str:
    try:
        return str(resolve())
    except (ValueError, OSError) as error:
        return f"missing: {error}"
