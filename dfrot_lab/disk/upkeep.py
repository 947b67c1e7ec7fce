"""Keeping a store: what lies in it, checked and removed. What a process holds the lock of is left alone."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import Timeout

from dfrot_lab.disk.artefacts import CorruptArtefact, read_manifest, set_aside
from dfrot_lab.disk.atomic import locked, read

DONE, PARTIAL, ASIDE, LOCK = "artefact", "partial", "set aside", "lock"
RESULTS = ("evaluation", "zero-shot", "site-losses")  # small and dear: what rows and reports are made of
DAY = 86_400


@dataclass(frozen=True)
class Entry:
    """A thing in a store: state, folder (or lock file), manifest ({}: none, or damaged), bytes, last change
    in seconds since 1970."""

    state: str
    path: Path
    manifest: dict[str, Any]
    bytes: int
    changed: float

    @property
    def kind(self) -> str:
        """What it is an artefact of: the folder it lies in."""
        return self.path.parent.name

    @property
    def key(self) -> str:
        """The key of the artefact it is or belongs to."""
        return self.path.name.partition(".")[0]

    @property
    def lock(self) -> Path:
        """The lock of whoever makes it."""
        return self.path.with_name(f"{self.key}.lock")

    @property
    def seconds(self) -> float | None:
        """What it took to make, for a partial so far; None where that was not written down."""
        return self.manifest.get("seconds")

    @property
    def days(self) -> float:
        """How long ago it was last changed."""
        return max(0.0, time.time() - self.changed) / DAY


def entries(root: Path) -> Iterator[Entry]:
    """All that lies in a store, by kind and key. A look: nothing is locked, written or set aside."""
    for path in sorted(root.glob("*/*")):
        name, _, end = path.name.partition(".")
        states = {"": DONE, "partial": PARTIAL, "lock": LOCK}
        state = ASIDE if end.startswith("corrupt-") else states.get(end, "")
        with suppress(OSError):  # gone since, to its place or by a prune
            if re.fullmatch("[0-9a-f]{32}", name) and state and path.is_dir() == (state != LOCK):
                yield _entry(path, state)


def _entry(path: Path, state: str) -> Entry:
    stats = [file.stat() for file in ([path] if state == LOCK else path.iterdir())]
    manifest: dict[str, Any] = {}
    with suppress(CorruptArtefact):
        manifest = {} if state == LOCK else read_manifest(path, path.name.partition(".")[0])
    changed = max((stat.st_mtime for stat in stats), default=path.stat().st_mtime)
    with suppress(KeyError, ValueError):
        changed = datetime.fromisoformat(manifest["created"]).timestamp()
    return Entry(state, path, manifest, sum(stat.st_size for stat in stats), changed)


def note(entry: Entry, name: str) -> Any:
    """The JSON saved as `name` in it, unchecked, for what can be said of it; {} where there is none."""
    with suppress(OSError, ValueError):
        return json.loads((entry.path / f"{name}.json").read_bytes())
    return {}


def faults(entry: Entry, seen: Callable[[int], object]) -> list[str]:
    """What is wrong with an artefact, all its bytes read now; `seen` is told how many, part by part."""
    if not entry.manifest:
        return ["manifest.json is missing or damaged"]
    found = []
    for name, record in entry.manifest["files"].items():
        file = entry.path / name
        size = file.stat().st_size if file.is_file() else None
        if size != record["bytes"]:
            found.append(f"{name} " + ("is missing" if size is None else f"has {size:,} bytes"))
        elif read(file, size, seen=seen) != record["xxh3_128"]:
            found.append(f"{name} has a wrong checksum")
    return found


def repair(entry: Entry, why: str) -> bool:
    """Set a damaged artefact aside; False: a process holds its lock."""
    with suppress(Timeout), locked(entry.lock, 0):
        set_aside(entry.path, why)
        return True
    return False


def remove(what: Iterable[Entry]) -> Iterator[tuple[Entry, bool]]:
    """Remove entries: each, and whether it went; False: a process holds its lock. A folder is renamed first,
    so that none is ever seen half gone."""
    for entry in what:
        gone = False
        with suppress(Timeout), locked(entry.lock, 0):
            if entry.state != LOCK and entry.path.exists():
                doomed = entry.path.with_name(f"{entry.key}.corrupt-0")
                if entry.path != doomed:
                    shutil.rmtree(doomed, ignore_errors=True)  # what a killed prune left
                    entry.path.rename(doomed)
                shutil.rmtree(doomed)
            with suppress(PermissionError):  # Windows removes no open file
                entry.lock.unlink(missing_ok=True)  # who waits for it sees that and makes another
            gone = True
        yield entry, gone
