"""Where and how the package writes: in its cache folder, each file whole or not at all; and the digest of a
file's bytes, read once: later looks, in any process, compare its size, times and inode."""

import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import xxhash
from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from tqdm.auto import tqdm

from dfrot_lab.recipe.base import require_file

ALGORITHMS: dict[str, Any] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
SMALL = 1 << 20  # bytes below which reading a file costs less than remembering it
LARGE = 1 << 30  # bytes above which reading a file takes long enough to show a bar
SETTLED = 2_000_000_000  # ns: a file changed more recently may change again under the same time
ENTRIES = 10_000
STALE = 3600  # seconds after which what a writer left is nobody's any more
LONG_NAME = 200  # bytes of a name; file systems take 255
PATIENCE = 2  # seconds to wait for a lock before saying so
_known: dict[str, list[Any]] = {}
_read_here: dict[str, list[Any]] = {}  # what of it this process has read
log = logging.getLogger(__name__)
Asked = Callable[[], Mapping[str, Any]]
Inputs = Mapping[str, Any] | Asked  # what an artefact is named by, or what says so anew


@contextmanager
def replacing(path: Path, wanted: int | None = None) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends, and goes if it fails, as does
    what a killed writer left. OSError, before a byte is written where the bytes `wanted` are not free."""
    temp = _temporary(path)
    with told(path, wanted):
        try:
            _clear(path)
            require_room(path.parent, wanted or 0)
            temp.unlink(missing_ok=True)  # were it a link, what it leads to would be written
            yield temp
            temp.replace(path)  # no fsync: what a power cut garbles fails its checksum and is made again
        except BaseException:
            with suppress(OSError):
                temp.unlink()
            raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that becomes it when the block ends, readable by whom that may be
    read, and goes if it fails, as does what a killed writer left. ValueError: the name is taken by more than
    an empty folder."""
    folder = folder.resolve() if ".." in folder.parts else folder
    with told(folder):
        taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if taken or folder.is_symlink():
        raise ValueError(f"--out must be a name that is free or an empty folder; got {folder}")
    if folder.is_mount():  # nothing can be renamed to it
        raise ValueError(f"--out must be a name in {folder}, which is a mount point; got {folder} itself")
    temp = _temporary(folder)
    try:
        with told(folder):
            _clear(folder)
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir()
        yield temp
        with told(folder):
            for file in temp.rglob("*"):  # safetensors writes for its owner alone
                file.chmod(file.stat().st_mode | temp.stat().st_mode & 0o444)
            try:
                if folder.exists():
                    folder.rmdir()
                temp.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                kept = "another process has made it meanwhile, and this one's is given up"
                raise ValueError(f"--out must be a name that is free; {kept}; got {folder}") from None
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


def _temporary(path: Path) -> Path:
    """What this process writes before it takes the place of `path`."""
    return path.with_name(f".{_stem(path)}.{os.getpid()}.tmp")


def _stem(path: Path) -> str:
    """The name of `path`, or its hash where it leaves no room for what is put around it."""
    name = os.fsencode(path.name)
    return path.name if len(name) <= LONG_NAME else hashlib.sha256(name).hexdigest()


def _clear(path: Path) -> None:
    """Make the folder that `path` is in; remove what killed writers of `path` have left there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.exists()  # an OSError before any work, where a name is too long
    for left in path.parent.glob(f".{glob.escape(_stem(path))}.*.tmp"):
        writer = left.name[len(_stem(path)) + 2 : -len(".tmp")]  # of `x` also .x.y.PID.tmp would fit
        if not writer.isdecimal() or psutil.pid_exists(int(writer)):
            continue
        with suppress(FileNotFoundError):  # it may be another writer's, done meanwhile
            if time.time() - _changed(left) <= STALE:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()


def _changed(path: Path) -> float:
    """When a file, or anything in a folder, was last written: what another machine writes has no pid here."""
    return max(each.stat().st_mtime for each in (path, *path.rglob("*")))


@contextmanager
def told(path: Path, wanted: int | None = None) -> Iterator[None]:
    """An OSError of the block in one line: what cannot be written where, how much is free, what to do."""
    try:
        yield
    except Exception as error:
        hidden = re.search(r"os error (\d+)", str(error))  # safetensors raises an error of its own
        code = int(hidden[1]) if hidden else getattr(error, "errno", None)
        if code is None:
            raise
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
        room = f"{free:,} bytes free" if wanted is None else f"{wanted:,} bytes wanted, {free:,} free"
        said = f"cannot write {path.name} to {path.parent} ({os.strerror(code)}): {room}"
        if code == errno.ENAMETOOLONG:
            raise OSError(code, f"{path.name} must be a shorter name ({os.strerror(code)})") from error
        full = "free some space or " if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise OSError(code, f"{said}; {full}write elsewhere (DFROT_LAB_CACHE moves the cache)") from error


def require_room(folder: Path, wanted: int) -> None:
    """Refuse to write more bytes than are free where `folder` is; OSError. Some systems do not say."""
    disk = shutil.disk_usage(folder)
    if wanted > disk.free and disk.total:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def locked(path: Path, wait: float = -1) -> Iterator[None]:
    """Hold the lock file `path`, once its holder is done; `wait` sets seconds after which it is a Timeout.
    OSError, at once: no lock can be made there, where FileLock alone would try for ever."""
    lock = FileLock(path)
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise OSError(errno.EEXIST, "a link or a folder, no file, has its name: take that away")
        path.open("ab").close()
        lock.acquire(timeout=PATIENCE if wait < 0 else wait)
    except Timeout:
        if wait >= 0:
            raise
        log.info("waiting for another process, which holds %s", path)
        lock.acquire()
    except OSError as error:
        said = f"cannot make the lock file {path} ({error.strerror or error})"
        raise OSError(error.errno, f"{said}; write elsewhere (DFROT_LAB_CACHE moves the cache)") from error
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Put `text` into `path`, whole or not at all: until it is complete, what was there stays. OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_dir() -> Path:
    """The cache folder, made if missing: $DFROT_LAB_CACHE, else the user's. OSError if it cannot be made."""
    chosen = os.environ.get("DFROT_LAB_CACHE")
    return make_folder(Path(chosen).expanduser() if chosen else user_cache_path("dfrot-lab"), mode=0o700)


def make_folder(path: Path, to_write: bool = False, mode: int = 0o777) -> Path:
    """The folder, made if missing, for whom `mode` and the umask say: one that is there may be read where
    nothing can be written. The cache folder is its owner's alone: the texts one studies lie in it."""
    try:
        path.mkdir(mode, parents=True, exist_ok=True)
        if to_write and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        said = f"cannot write to the folder {path} ({error.strerror}); set DFROT_LAB_CACHE to another one"
        raise OSError(error.errno, said) from error
    return path


def digest(path: Path | str, algorithm: str = "xxh3_128", *, here: bool = False) -> str:
    """Hex digest of a file's bytes by one of ALGORITHMS; an unchanged file that is not SMALL costs a look at
    its entry. `here`: what this process has not read itself is read, whatever others found in it."""
    path = Path(path).resolve()
    require_file("what is read", path, or_none=True)
    name, stamp = f"{algorithm}:{path}", _stamp(path)
    kept = stamp[0] >= SMALL and time.time_ns() - max(stamp[1:3]) > SETTLED
    if kept and not here and _known.get(name, [])[:-1] != stamp:
        _known.update(_remembered())
    known = (_read_here if here else _known).get(name, [])
    if kept and known[:-1] == stamp:
        return str(known[-1])
    found = read(path, stamp[0], algorithm)
    if kept and _stamp(path) == stamp:
        _known[name] = _read_here[name] = [*stamp, found]
        # where the cache cannot be written, the next process reads again
        with suppress(OSError), locked((memory := cache_dir() / "digests.json").with_suffix(".json.lock")):
            entries = {**_remembered(), name: _known[name]}
            write_text(memory, json.dumps(dict(list(entries.items())[-ENTRIES:])))
    return found


def _stamp(path: Path) -> list[int]:
    """What changes when a file does: bytes, times of its content and of its inode (ns), inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def read(path: Path, size: int, algorithm: str = "xxh3_128", seen: Callable[[int], object] = int) -> str:
    """Hex digest of the bytes, all read now, of a file of `size`; `seen` is told how many, part by part."""
    found = ALGORITHMS[algorithm]()
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False}
    options["disable"] = size < LARGE or seen is not int
    bar = tqdm(total=size, desc=f"Reading {path.name}, once", **options)
    with path.open("rb") as file, bar:
        while block := file.read(1 << 20):
            found.update(block)
            bar.update(len(block))
            seen(len(block))
    return found.hexdigest()


def _remembered() -> dict[str, list[Any]]:
    """The entries of all processes; none where the memory is missing, damaged or out of reach."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        require_file("the memory", memory := cache_dir() / "digests.json")
        entries = json.loads(memory.read_bytes())
        return {name: entry for name, entry in entries.items() if isinstance(entry, list)}
    return {}


class Changed(ValueError):
    """Files were changed while they were used: what was read is of nobody knows which."""


def still(inputs: Asked) -> Asked:
    """`inputs`, that are hashes of files, asked for now; whoever asks again gets the same, or Changed."""
    first = inputs()

    def again() -> Mapping[str, Any]:
        if inputs() != first:
            said = "a model's files, a text or a rotation were changed while they were used"
            raise Changed(f"{said}: nothing made from them was kept, run the same command again")
        return first

    return again
