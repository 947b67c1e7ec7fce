"""Evaluations on their way from one store to another: computed on a cluster or a GPU, or last week. As JSON,
in a file or in a folder's; each names all that its numbers hang on, and is taken in under that name alone."""

import json
import logging
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dfrot_lab.disk import row_files
from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.model import public
from dfrot_lab.recipe.base import content_key, require, require_file, strict_json
from dfrot_lab.recipe.keys import FORMULAS
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import perplexity

log = logging.getLogger(__name__)
DIGITS = "0123456789abcdef"  # that a key may start with
MADE = ("versions", "commit", "created")  # of the manifest: by which code, and when


def write(place: Path, keys: Iterable[str], store: Store) -> int:
    """Write the stored evaluations of `keys`, by key, each file whole or not at all; how many there are. In a
    folder that is there, a file for each first digit of a key: of few new evaluations few lines change."""
    found = [made for key in sorted(set(keys)) if (made := store.at(perplexity.KIND, key))]
    files = {place / f"{digit}.jsonl": digit for digit in DIGITS} if place.is_dir() else {place: ""}
    for file, start in files.items():
        row_files.replace(file, (_line(made) for made in found if made.key.startswith(start)))
    return len(found)


def _line(made: Artefact) -> dict[str, Any]:
    told, spec = made.manifest, Recipe.of(made.json("recipe"))
    note = told["note"] | {"provenance": public.origin(told["note"]["provenance"], spec.model)}
    by = note.pop("made", None) or {name: told[name] for name in MADE}
    said = {"key": made.key, "formulas": told["formulas"], "inputs": told["inputs"], "note": note, "made": by}
    results = {name: made.json(name) for name in ("losses", "means")}
    line = said | {"recipe": public.public(spec).plain()} | results
    return dict(json.loads(strict_json(line)))  # an infinite gamma is the word inf


def read(place: Path, store: Store) -> int:
    """Put the evaluations of a file, or of a folder's, into the store, but for those of other formulas, and
    what it has already; how many were new. ValueError: a line that is none, or whose key is not that of what
    it says."""
    if not place.is_dir():
        require_file("a file of evaluations", place)
    new, others = 0, 0
    for file in sorted(place.glob("*.jsonl")) if place.is_dir() else [place]:
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            said = _checked(text, f"{file} line {number}")
            if said["formulas"] != FORMULAS:
                others += 1
            elif store.at(perplexity.KIND, said["key"]) is None:
                store.get_or_make(perplexity.KIND, said["inputs"], partial(_put, said))
                new += 1
    if others:
        log.warning("%s: %d evaluations are by other formulas than these and are left out", place, others)
    return new


def _checked(text: str, where: str) -> dict[str, Any]:
    try:
        said = json.loads(text, object_hook=_gamma)
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


def _gamma(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a line, the word inf for a gamma taken as the number that its key was made of."""
    return {name: math.inf if (name, value) == ("gamma", "inf") else value for name, value in part.items()}


def _put(said: dict[str, Any], writer: Writer) -> None:
    for name in ("losses", "means", "recipe"):
        writer.save_json(name, said[name])
    writer.note.update(said["note"] | {"made": said["made"]})
