"""Where and how the package writes: in its cache folder; each file whole, or not at all."""

import errno
import glob
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from platformdirs import user_cache_path


@contextmanager
def replacing(path: Path, wanted: int | None = None) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends, and goes if it fails, as does
    what a killed writer left. An OSError says the bytes `wanted` and free, and what to do."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        yield temp
        temp.replace(path)  # no fsync: what a power cut garbles fails its checksum and is made again
    except BaseException as error:
        with suppress(OSError):
            temp.unlink()
        hidden = re.search(r"os error (\d+)", str(error))  # safetensors raises an error of its own
        code = int(hidden[1]) if hidden else getattr(error, "errno", None)
        if code is None:
            raise
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
        room = f"{free:,} bytes free" if wanted is None else f"{wanted:,} bytes wanted, {free:,} free"
        said = f"cannot write {path.name} to {path.parent} ({os.strerror(code)}): {room}"
        hint = "free some space or write elsewhere (DFROT_LAB_CACHE names the cache's folder)"
        raise OSError(code, f"{said}; {hint}") from error


def cache_dir() -> Path:
    """The cache folder, made if missing: $DFROT_LAB_CACHE, else the user's. OSError if it cannot be made."""
    chosen = os.environ.get("DFROT_LAB_CACHE")
    return make_folder(Path(chosen).expanduser() if chosen else user_cache_path("dfrot-lab"))


def make_folder(path: Path, to_write: bool = False) -> Path:
    """The folder, made if missing: a cache that was made may be read where nothing can be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if to_write and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        said = f"cannot write to the folder {path} ({error.strerror}); set DFROT_LAB_CACHE to another one"
        raise OSError(error.errno, said) from error
    return path
