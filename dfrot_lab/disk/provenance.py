"""What made a file: the commit of the code, versions of packages."""

import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

COMMIT = "git describe --always --abbrev=12 --dirty=+ --exclude=*"
PACKAGES = ("dfrot_lab", "torch", "transformers")  # that a result hangs on


@cache
def commit() -> str | None:
    """The git commit of the code, `+` behind it where files differ from it; None outside a checkout."""
    try:
        options: dict[str, Any] = {"cwd": Path(__file__).parent, "stderr": subprocess.DEVNULL, "text": True}
        return str(subprocess.check_output(COMMIT.split(), **options)).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def version_of(package: str) -> str:
    """An installed package's version, its metadata parsed once. PackageNotFoundError."""
    return metadata.version(package)
