"""Write locks/: the exact files that `make` may install, by sha256, for every system that the index has them
for. `make lock` runs it; it needs uv and the index. No index is named in the locks: pip's own settings say.

    build.txt  what builds a package that comes as source      run.txt  requirements.txt and all it needs
    cpu.txt    torch without CUDA on Linux, where pip finds it    dev.txt  what requirements-dev.txt adds
    cuda.txt   what the index's torch needs on Linux beside run.txt
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPTIONS = "--universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet"
CUDA = re.compile(r"nvidia-|cuda-|triton$")
BUILD = ("setuptools",)
CPU = """\
# torch's own build without CUDA, for Linux on x86-64 with Python 3.11. It is on no package index: pip takes
# it where its settings (find-links, extra-index-url) lead to it, and else the index's build, with cuda.txt.
torch==2.13.0+cpu --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
"""
HEADS = {
    "build": "What builds a package that comes as source, installed first. Made by `make lock`.",
    "run": "Every package of requirements.txt and what they need, by hash. Made by `make lock`.",
    "cuda": "What the index's torch needs beside run.txt on Linux, by hash. Made by `make lock`.",
    "dev": "What requirements-dev.txt adds, by hash. Made by `make lock`.",
}


def compiled(*files: str) -> dict[str, str]:
    """The lock of some requirements: each package's lines, by its name (two versions: both)."""
    command = [sys.executable, "-m", "uv", "pip", "compile", *OPTIONS.split(), *files]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    for block in re.split(r"(?m)^(?=[a-z0-9])", text):
        if name := re.match(r"[a-z0-9-]+", block):
            found[name[0]] = found.get(name[0], "") + block.rstrip() + "\n"
    return found


def parts() -> dict[str, str]:
    """The text of each lock by its name."""
    everything, run = compiled("requirements.txt", "requirements-dev.txt"), compiled("requirements.txt")
    texts = dict.fromkeys(HEADS, "")
    for name, block in everything.items():
        part = "cuda" if CUDA.match(name) else "build" if name in BUILD else "run" if name in run else "dev"
        texts[part] += block
    return {"cpu": CPU, **{part: f"# {HEADS[part]}\n{text}" for part, text in texts.items()}}


if __name__ == "__main__":
    for part, text in parts().items():
        (ROOT / "locks" / f"{part}.txt").write_text(text, encoding="utf-8")
