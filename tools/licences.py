"""Write docs/licences.md: every package of locks/ with its licence, as its own metadata says it here."""

import re
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
PARTS = {"run": "to run", "cuda": "with CUDA", "build": "to build", "dev": "to test"}
NOT_HERE = "not installed where this page was made: see its page on the index"
HEAD = """\
# Licences of the dependencies

Made by `make lock` from `locks/` and the metadata of what is installed; the lab itself is Apache-2.0. A package of other systems only, or of CUDA,
has no metadata here and is said to have none. Nothing is bundled: pip fetches each package from the index, and `make` compares it with the sha256
in `locks/`.

What the locks cover: the files that the package index had for every system and for Python 3.11 and later when they were made. Three packages
(rouge-score, sqlitedict, word2number, all of lm-eval) come as source and are built by the setuptools of `locks/build.txt`, without a build
environment of their own. torch's build without CUDA is locked for Linux on x86-64 with Python 3.11 alone; elsewhere on Linux the index's build is
taken. pip itself, Python and conda are not locked. Known vulnerabilities are not looked up: that needs a database from the network.

| package | version | needed | licence |
|---|---|---|---|
"""


def locked() -> list[tuple[str, str, str]]:
    """(name, version, what for) of every package in the locks, sorted; one may be there in two versions."""
    found = []
    for part, why in PARTS.items():
        text = (ROOT / "locks" / f"{part}.txt").read_text(encoding="utf-8")
        found += [
            (name, version, why) for name, version in re.findall(r"(?m)^([a-z0-9-]+)==([^ ;\\]+)", text)
        ]
    return sorted(found)


def licence(name: str, version: str) -> str:
    """What the installed package says: its expression, its short licence field, or its classifiers."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return NOT_HERE
    if about["Version"].split("+")[0] != version:
        return NOT_HERE
    field = (about.get("License") or "").strip()
    classes = [
        c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License ::")
    ]
    short = field if field and "\n" not in field and len(field) < 60 and field != "UNKNOWN" else ""
    return (
        about.get("License-Expression")
        or short
        or ", ".join(classes)
        or field.split("\n")[0][:60]
        or "not said"
    )


def page() -> str:
    """The page."""
    lines = (f"| {name} | {version} | {why} | {licence(name, version)} |" for name, version, why in locked())
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
