"""Evaluations on their way from one store to another: computed on a cluster or a GPU, or last week. A file of
JSON lines; each names all that its numbers hang on, and is taken in under that name alone."""

import json
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dfrot_lab.disk import row_files
from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.model import public
from dfrot_lab.recipe.base import content_key, require, require_file
from dfrot_lab.recipe.keys import FORMULAS
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import perplexity

log = logging.getLogger(__name__)
MADE = ("versions", "commit", "created")  # of the manifest: by which code, and when


def write(path: Path, keys: Iterable[str], store: Store) -> int:
    """Write the stored evaluations of `keys` into a file, by key, whole or not at all; how many there are."""
    found = [made for key in sorted(set(keys)) if (made := store.at(perplexity.KIND, key))]
    row_files.replace(path, map(_line, found))
    return len(found)


def _line(made: Artefact) -> dict[str, Any]:
    told = made.manifest
    said = {"key": made.key, "formulas": told["formulas"], "inputs": told["inputs"], "note": told["note"]}
    said["made"] = told["note"].get("made") or {name: told[name] for name in MADE}
    spec = Recipe.of(made.json("recipe"))
    said["note"] = told["note"] | {"provenance": public.origin(told["note"]["provenance"], spec.model)}
    said["recipe"] = public.public(spec).plain()
    return said | {name: made.json(name) for name in ("losses", "means")}


def read(path: Path, store: Store) -> int:
    """Put the evaluations of a file into the store, but for those of other formulas, and what it has already;
    how many were new. ValueError: a line that is none, or whose key is not that of what it says."""
    require_file("a file of evaluations", path)
    new, others = 0, 0
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        said = _checked(text, f"{path} line {number}")
        if said["formulas"] != FORMULAS:
            others += 1
        elif store.at(perplexity.KIND, said["key"]) is None:
            store.get_or_make(perplexity.KIND, said["inputs"], partial(_put, said))
            new += 1
    if others:
        log.warning("%s: %d evaluations are by other formulas than these and are left out", path, others)
    return new


def _checked(text: str, where: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be JSON; {error}, got {text[:60]!r}") from error
    parts = ("key", "formulas", "inputs", "note", "made", "losses", "means", "recipe")
    is_whole = isinstance(said, dict) and set(parts) <= set(said)
    require(where, repr(said)[:60], is_whole, f"an evaluation, with {', '.join(parts)}")
    content = {"kind": perplexity.KIND, "formulas": said["formulas"], "inputs": said["inputs"]}
    require(f"key of {where}", said["key"], said["key"] == content_key(content), "that of its inputs")
    losses = np.array(said["losses"], dtype=float)
    require(f"losses of {where}", losses, losses.ndim == 1 and np.isfinite(losses).all(), "finite numbers")
    return dict(said)


def _put(said: dict[str, Any], writer: Writer) -> None:
    for name in ("losses", "means", "recipe"):
        writer.save_json(name, said[name])
    writer.note.update(said["note"] | {"made": said["made"]})
