"""Compute once: an artefact is a folder of safetensors and JSON, named by its inputs, never overwritten.

    <root>/<kind>/<key>/             a finished artefact: manifest.json and its data files
    <root>/<kind>/<key>.partial/     being made, or left by a killed run: finished files and their manifest
    <root>/<kind>/<key>.lock         held while one process makes it
    <root>/<kind>/<key>.corrupt-1/   one that failed its checks, set aside: yours to look at or to delete

Checked at every open: the manifest's own checksum, and every file's size and checksum."""

import itertools
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfrot_lab.disk import atomic
from dfrot_lab.disk.atomic import digest, locked, make_folder, replacing
from dfrot_lab.disk.provenance import PACKAGES, commit, version_of
from dfrot_lab.recipe.base import content_key, require
from dfrot_lab.recipe.keys import FORMULAS

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
READ_ANEW = ("model",)  # kinds that are read in each process before use: not by the store
_dumps = json.JSONEncoder(sort_keys=True, indent=1).encode
log = logging.getLogger(__name__)


class CorruptArtefact(ValueError):
    """A stored file is not what was written: missing, of another size, or of another checksum."""


class Artefact:
    """A stored artefact: `kind`, `key`, `path`, `manifest` (inputs, note, versions, commit, files, ...)."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.kind, self.key = str(manifest["kind"]), str(manifest["key"])

    @property
    def names(self) -> list[str]:
        """The stored names, sorted."""
        return sorted(Path(filename).stem for filename in self.manifest["files"])

    def tensors(self, name: str) -> "dict[str, Tensor]":
        """The tensors saved as `name`, memory-mapped: changed in place, they change in memory only."""
        from safetensors.torch import load_file

        return load_file(self._checked(f"{name}.safetensors"))

    def json(self, name: str) -> Any:
        """The JSON value saved as `name`. KeyError, CorruptArtefact."""
        return json.loads(self._checked(f"{name}.json").read_bytes())

    def _checked(self, filename: str) -> Path:
        """The file's path, once its checksum is right; a finished artefact with a wrong one is set aside."""
        path, files = self.path / filename, self.manifest["files"]
        if filename not in files:
            raise KeyError(f"{filename} is not in {self.path}, which has {', '.join(sorted(files))}")
        if fault := _fault(path, files[filename]):
            if self.path.name == self.key:  # not so in a Writer, whose other files are still good
                _open_or_set_aside(self.path)
            raise CorruptArtefact(f"{path} {fault}; run the same command again to recompute it")
        return path


class Writer(Artefact):
    """An artefact in the making, `note` for its manifest. A killed run goes on from its last save."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        super().__init__(path, {**content, "key": path.stem, "files": {}})
        self.note: dict[str, Any] = {}
        self._start = time.monotonic()
        if path.is_symlink() or (os.path.lexists(path) and not path.is_dir()):
            set_aside(path, f"{path} is a link or a file, not a folder of this store")
        path.mkdir(exist_ok=True)
        if (path / MANIFEST).exists():
            self._resume()
        strays = [p for p in path.iterdir() if p.name not in (*self.manifest["files"], MANIFEST)]
        folders = [p.name for p in strays if p.is_dir() and not p.is_symlink()]
        require(str(path), f"the folder {folders[:1]}: take it away", not folders, "a folder of files alone")
        for stray in strays:
            stray.unlink()

    def has(self, name: str) -> bool:
        """Whether `name` is finished, in this run or in an earlier, killed one."""
        return name in self.names

    def reserve(self, size: int) -> None:
        """Refuse, before the work, an artefact of more bytes than the disk has free for the rest. OSError."""
        left = size - sum(record["bytes"] for record in self.manifest["files"].values())
        with atomic.told(self.path, left):
            atomic.require_room(self.path, left)

    def save_tensors(self, name: str, tensors: "Mapping[str, Tensor]") -> None:
        """Write tensors as `<name>.safetensors`, replacing what was saved so. OSError: a full disk."""
        from safetensors.torch import save_file

        plain, taken = dict[str, Any](), set[int]()
        for key, tensor in tensors.items():
            here = tensor.detach().cpu().contiguous()
            memory = here.untyped_storage().data_ptr()
            plain[key] = here.clone() if memory in taken else here  # safetensors refuses shared memory
            taken.add(memory)
        size = sum(t.nbytes for t in plain.values())
        self._save(f"{name}.safetensors", size, lambda path: save_file(plain, path))

    def save_json(self, name: str, value: Any) -> None:
        """Write a JSON value as `<name>.json`, replacing what was saved so. TypeError, OSError."""
        data = _dumps(value).encode()
        self._save(f"{name}.json", len(data), lambda path: path.write_bytes(data))

    def load_tensors(self, name: str) -> "dict[str, Tensor]":
        """The tensors saved as `name`, copied to memory: not every system can replace a mapped file."""
        return {key: tensor.clone() for key, tensor in self.tensors(name).items()}

    def drop(self, name: str) -> None:
        """Remove what was saved as `name`, such as a checkpoint; nothing happens if there is none."""
        for filename in [f for f in self.manifest["files"] if Path(f).stem == name]:
            del self.manifest["files"][filename]
            self._write_manifest()  # before the file goes: an entry without a file would count as a loss
            (self.path / filename).unlink()

    def _save(self, filename: str, size: int, put: Callable[[Path], object]) -> None:
        files, name = self.manifest["files"], filename.rpartition(".")[0]
        _require_name("name", name)
        if filename == MANIFEST or (name in self.names and filename not in files):
            said = f"{name!r} is taken by the manifest or by a file of the other format"
            raise ValueError(f"name must be free; {said}")
        with replacing(self.path / filename, size) as temp:
            put(temp)
            record = {"bytes": temp.stat().st_size, "xxh3_128": digest(temp)}
            # both records, until the next save: on either side of the rename the file matches one of them
            self._write_manifest(files={**files, filename: record}, replaced={filename: files.get(filename)})
        files[filename] = record

    def _write_manifest(self, **changes: Any) -> None:
        made: dict[str, Any] = {"note": self.note, "seconds": round(time.monotonic() - self._start, 3)}
        made |= {"created": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
        versions = {name: version_of(name) for name in PACKAGES}
        made["versions"] = {"python": platform.python_version(), **versions}
        plain = json.loads(_dumps({**self.manifest, **made, **changes}))  # as it will be read back
        data = _dumps({**plain, "check": content_key(plain)}).encode()
        with replacing(self.path / MANIFEST, len(data)) as temp:
            temp.write_bytes(data)

    def _resume(self) -> None:
        """Take over the files of a killed run whose checksums are intact."""
        try:
            journal = read_manifest(self.path, self.key)
        except CorruptArtefact as error:
            log.warning("%s; starting afresh", error)
            return
        self.note = journal["note"]
        self._start -= journal["seconds"]
        for filename, record in journal["files"].items():
            path, before = self.path / filename, journal.get("replaced", {}).get(filename)
            if intact := [r for r in (record, before) if r and not _fault(path, r)]:
                self.manifest["files"][filename] = intact[0]
            else:
                log.warning("%s %s; it will be recomputed", path, _fault(path, record))
        log.info("resuming %s %s: %d files already done", self.kind, self.key, len(self.manifest["files"]))


class Store:
    """A folder of artefacts (default: `store` in the cache folder), shared safely by many processes."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = atomic.cache_dir() / "store" if root is None else Path(root)

    def get_or_make(self, kind: str, inputs: atomic.Inputs, make: Callable[[Writer], None]) -> Artefact:
        """The artefact of `inputs` (plain JSON values): opened if it is stored, else made by `make`, once: a
        second process waits, then opens. What a killed `make` finished stays for the next call. OSError. As a
        function `inputs` are asked for again once it is made: as `still` says. ValueError."""
        ask = atomic.still(inputs) if callable(inputs) else lambda: inputs
        folder, content = self._place(kind, ask())
        if (found := _open_or_set_aside(folder)) is not None:
            return found
        make_folder(folder.parent, to_write=True)
        with locked(folder.with_name(f"{folder.name}.lock")):
            if folder.exists():  # another process made it while this one waited
                _open(folder, sizes_only=False)
            else:
                writer = Writer(folder.with_name(f"{folder.name}.partial"), content)
                try:
                    make(writer)
                    ask()
                except atomic.Changed:
                    shutil.rmtree(writer.path)
                    raise
                writer._write_manifest()
                writer.path.replace(folder)
            return Artefact(folder, read_manifest(folder, folder.name))

    def open(self, kind: str, inputs: Mapping[str, Any]) -> Artefact | None:
        """The stored artefact of `inputs`, or None; a corrupt one is set aside with a warning."""
        return _open_or_set_aside(self._place(kind, inputs)[0])

    def at(self, kind: str, key: str) -> Artefact | None:
        """The stored artefact of a key, or None."""
        return _open_or_set_aside(self.root / kind / key)

    def list(self) -> Sequence[Artefact]:
        """All artefacts by kind and key, after a check of manifests and sizes; corrupt ones are set aside."""
        folders = sorted(self.root.glob("*/" + "[0-9a-f]" * 32))
        return [found for folder in folders if (found := _open_or_set_aside(folder, sizes_only=True))]

    def _place(self, kind: str, inputs: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        """The artefact's folder and the content it is named by: JSON, so that nothing is keyed by a repr."""
        _require_name("kind", kind)
        content = {"kind": kind, "formulas": FORMULAS, "inputs": json.loads(_dumps(inputs))}
        return self.root / kind / content_key(content), content


def _open(folder: Path, sizes_only: bool) -> Artefact | None:
    """The artefact in `folder`, if there is one. CorruptArtefact."""
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise CorruptArtefact(f"{folder} is no folder")
        return None
    manifest = read_manifest(folder, folder.name)
    for filename, record in manifest["files"].items():
        if fault := _fault(folder / filename, record, sizes_only):
            raise CorruptArtefact(f"{folder / filename} {fault}")
    return Artefact(folder, manifest)


def _open_or_set_aside(folder: Path, sizes_only: bool = False) -> Artefact | None:
    """As `_open`, but a corrupt artefact is renamed, and None."""
    with suppress(CorruptArtefact):
        return _open(folder, sizes_only)
    try:
        with locked(folder.with_name(f"{folder.name}.lock")):
            try:
                return _open(folder, sizes_only)  # another process may have put a good one in its place
            except CorruptArtefact as error:
                set_aside(folder, str(error))
    except OSError as error:
        log.warning("%s is damaged and cannot be set aside: it is not used. %s", folder, error)
    return None


def set_aside(folder: Path, why: str) -> Path:
    """Rename what is not what was written, by who holds its lock; where it is now. OSError."""
    names = (folder.with_name(f"{folder.stem}.corrupt-{n}") for n in itertools.count(1))
    aside = next(path for path in names if not os.path.lexists(path))
    folder.rename(aside)
    log.warning("%s; set aside as %s, it will be recomputed", why, aside.name)
    return aside


def read_manifest(folder: Path, key: str) -> dict[str, Any]:
    """The manifest as it was written to the bit, for this key. CorruptArtefact."""
    try:
        require("it", "none, a folder or a pipe", (folder / MANIFEST).is_file(), "a file")
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest.pop("check") != content_key(manifest) or manifest["key"] != key:
            raise ValueError("it does not match its checksum or its folder")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, FileNotFoundError) as error:
        raise CorruptArtefact(f"{folder / MANIFEST} cannot be used: {error!r}") from error
    return manifest


def _fault(path: Path, record: Mapping[str, Any], sizes_only: bool = False) -> str:
    """What is wrong with a file by its record; empty if nothing is."""
    with suppress(FileNotFoundError):  # there a moment ago: another process prunes
        size = path.stat().st_size if path.is_file() else None
        if size != record["bytes"]:
            return "is missing" if size is None else f"has {size:,} bytes instead of {record['bytes']:,}"
        anew = path.parent.parent.name in READ_ANEW
        return "" if sizes_only or digest(path, here=anew) == record["xxh3_128"] else "has a wrong checksum"
    return "is missing"


def _require_name(what: str, name: str) -> None:
    rule = "letters, digits, '.', '_' and '-', and start with a letter or a digit"
    require(what, repr(name), re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name), rule)
