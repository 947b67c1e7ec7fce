"""Where an export goes: a new folder, there as a whole or not at all."""

import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dfrot_lab.disk.atomic import told

STALE = 3600  # seconds after which what a killed export left is nobody's


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that becomes it when the block ends, and goes if it fails, as does
    what a killed export left. ValueError: the name is taken by more than an empty folder."""
    taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if taken or folder.is_symlink():
        raise ValueError(f"--out must be a name that is free or an empty folder; got {folder}")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with told(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
                if time.time() - left.stat().st_mtime > STALE:
                    shutil.rmtree(left, ignore_errors=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        yield temporary
        with told(folder):
            for file in temporary.rglob("*"):  # safetensors writes for its owner alone
                file.chmod(file.stat().st_mode | temporary.stat().st_mode & 0o444)
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
