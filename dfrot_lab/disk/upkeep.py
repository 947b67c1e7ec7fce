"""Keeping a store: what lies in it, checked and removed. What a process holds the lock of is left alone."""

import json
import os
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
from dfrot_lab.recipe.base import require

DONE, PARTIAL, ASIDE, LOCK = "artefact", "partial", "set aside", "lock"
RESULTS = ("evaluation", "zero-shot", "site-losses")  # small and dear: what rows and reports are made of
DAY = 86_400
HELD = "in use: stays"  # of what a process is making


@dataclass(frozen=True)
class Entry:
    """A thing in a store: state, folder (or lock file), manifest ({}: none, or damaged), bytes, last change
    in seconds since 1970, whether it is a link to another place."""

    state: str
    path: Path
    manifest: dict[str, Any]
    bytes: int
    changed: float
    is_link: bool = False

    @property
    def words(self) -> str:
        """Its state, and what is odd about it."""
        is_bare = self.state == DONE and not self.manifest
        return self.state + ", damaged" * is_bare + ", a link" * self.is_link

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
        with suppress(FileNotFoundError):  # gone since, to its place or by a prune
            if re.fullmatch("[0-9a-f]{32}", name) and state:
                yield _entry(path, state)


def _entry(path: Path, state: str) -> Entry:
    stats, manifest = [path.lstat()], dict[str, Any]()
    if state != LOCK:
        with suppress(CorruptArtefact, OSError):
            manifest = read_manifest(path, path.name.partition(".")[0])
        if path.is_dir():
            stats = list(_stats(path)) or stats
    changed = max(stat.st_mtime for stat in stats)
    with suppress(KeyError, ValueError):
        changed = datetime.fromisoformat(manifest["created"]).timestamp()
    return Entry(state, path, manifest, sum(stat.st_size for stat in stats), changed, path.is_symlink())


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """Of the files in it, of a link to nothing its own; of what is gone since or out of reach none."""
    files = list[Path]()
    with suppress(PermissionError):
        files = list(folder.iterdir())
    for file in files:
        with suppress(FileNotFoundError):
            yield file.stat() if file.exists() else file.lstat()


def note(entry: Entry, name: str) -> Any:
    """The JSON saved as `name` in it, unchecked, for what can be said of it; {} where there is none."""
    with suppress(OSError, ValueError, RecursionError):
        require(name, "a pipe", (entry.path / f"{name}.json").is_file(), "a file")
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


def remove(what: Iterable[Entry]) -> Iterator[tuple[Entry, str]]:
    """Remove entries, of a link itself alone: each, and why it stays, such as that a process holds its lock.
    A folder is renamed first, so that none is ever seen half gone."""
    for entry in what:
        stays = HELD
        try:
            with locked(entry.lock, 0):
                if entry.state != LOCK and os.path.lexists(entry.path):
                    doomed = entry.path.with_name(f"{entry.key}.corrupt-0")
                    if entry.path != doomed:
                        _clear(doomed)  # what a killed prune left
                        entry.path.rename(doomed)
                    _clear(doomed)
                with suppress(PermissionError):  # Windows removes no open file
                    entry.lock.unlink(missing_ok=True)  # who waits for it sees that and makes another
                stays = ""
        except Timeout:
            pass
        except OSError as error:
            stays = f"stays: {error}"
        yield entry, stays


def _clear(path: Path) -> None:
    """Remove a folder with all in it, a file, or a link and nothing of what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
