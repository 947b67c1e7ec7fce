"""The digest of a file's bytes, read once: later looks, in any process, compare its size, times and inode."""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock
from tqdm.auto import tqdm

from dfrot_lab.disk.atomic import cache_dir, replacing

ALGORITHMS: dict[str, Any] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
LARGE = 1 << 30  # bytes above which reading a file takes long enough to show a bar
SETTLED = 2_000_000_000  # ns: a file changed more recently may change again under the same time
ENTRIES = 10_000
_known: dict[str, list[Any]] = {}


def digest(path: Path | str, algorithm: str = "xxh3_128") -> str:
    """Hex digest of a file's bytes by one of ALGORITHMS; an unchanged file costs a look at its entry."""
    path = Path(path).resolve()
    name, stamp = f"{algorithm}:{path}", _stamp(path)
    settled = time.time_ns() - max(stamp[1:3]) > SETTLED
    if settled and _known.get(name, [])[:-1] != stamp:
        _known.update(_remembered())
    if settled and _known.get(name, [])[:-1] == stamp:
        return str(_known[name][-1])
    found = _read(path, stamp[0], algorithm)
    if settled and _stamp(path) == stamp:
        _known[name] = [*stamp, found]
        # where the cache cannot be written, the next process reads again
        with suppress(OSError), FileLock((memory := cache_dir() / "digests.json").with_suffix(".json.lock")):
            entries = {**_remembered(), name: _known[name]}
            with replacing(memory) as temp:
                temp.write_text(json.dumps(dict(list(entries.items())[-ENTRIES:])), encoding="utf-8")
    return found


def _stamp(path: Path) -> list[int]:
    """What changes when a file does: bytes, times of its content and of its inode (ns), inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read(path: Path, size: int, algorithm: str) -> str:
    found = ALGORITHMS[algorithm]()
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "disable": size < LARGE, "leave": False}
    bar = tqdm(total=size, desc=f"Reading {path.name}, once", **options)
    with path.open("rb") as file, bar:
        while block := file.read(1 << 20):
            found.update(block)
            bar.update(len(block))
    return found.hexdigest()


def _remembered() -> dict[str, list[Any]]:
    """The entries of all processes; none where the memory is missing, damaged or out of reach."""
    with suppress(OSError, ValueError, AttributeError):
        entries = json.loads((cache_dir() / "digests.json").read_bytes())
        return {name: entry for name, entry in entries.items() if isinstance(entry, list)}
    return {}
