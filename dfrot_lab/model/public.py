"""What may be sent away: a file or folder of one's own becomes its name and the start of its bytes' hash; and
how such a name is given a place again."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from dfrot_lab.model import corpus, door
from dfrot_lab.recipe.base import HASH_DIGITS, SIGNED, Spec, require
from dfrot_lab.recipe.specs import PACKAGED, CorpusSpec, ModelSpec, Recipe

S = TypeVar("S", bound=Spec)
PATHS = ("source", "path", "name", "corpus", "calibration")  # fields of specs that may hold a path
FIELDS = {"model": "source", "corpus": "name", "calibration": "name", "rotation": "path"}


def public(spec: S) -> S:
    """`spec` without a path in it: `/home/me/tiny` is `tiny@f96e104cfc96`, whatever the device and
    the dtype; `tiny` where there is no such file any more. What is no such path stays as it is."""
    changed: dict[str, Any] = {name: public(value) for name, value in spec if isinstance(value, Spec)}
    for field in PATHS:
        said = getattr(spec, field) if field in type(spec).model_fields else None
        if isinstance(said, str) and _is_place(said):
            changed[field] = _name(said)
            with suppress(OSError, ValueError):
                changed[field] += f"@{_hash(spec, said)}"
    return spec.with_(**changed) if changed else spec


def found(recipe: Recipe, places: Mapping[str, str]) -> Recipe:
    """`recipe` with its "model", "corpus" (the text that is scored), "calibration" (another text) or
    "rotation" (a file) at these places, wherever it names them. ValueError: it has none, or a name ends in
    the hash of other bytes than lie there, as those that `public` gave do."""
    texts = {text.name for text in _texts(recipe)} - {recipe.corpus.name}
    named = {
        "model": [recipe.model.source],
        "corpus": [recipe.corpus.name],
        "calibration": sorted(texts),
        "rotation": [path for path in [getattr(recipe.rotation, "path", None)] if path],
    }
    moved = dict[tuple[str, str], str]()
    for what, place in places.items():
        rule = f"left out: the recipe names no {what} that could lie elsewhere"
        require(f"--{what}", place, len(named[what]) == 1, rule)
        moved[FIELDS[what], named[what][0]] = place
    return _moved(recipe, moved)


def _texts(spec: Spec) -> list[CorpusSpec]:
    """Every text that is named in a spec."""
    if isinstance(spec, CorpusSpec):
        return [spec]
    return [text for _, value in spec if isinstance(value, Spec) for text in _texts(value)]


def _moved(spec: S, moved: Mapping[tuple[str, str], str]) -> S:
    """`spec` with fields of some names and values changed; ValueError: to the place of other bytes."""
    changed: dict[str, Any] = {name: _moved(value, moved) for name, value in spec if isinstance(value, Spec)}
    for (field, name), place in moved.items():
        if getattr(spec, field, None) == name:
            changed[field] = place
            signed = SIGNED.fullmatch(name)
            is_here = Path(place).expanduser().exists()
            here = _hash(spec, place) if signed and is_here else ""
            said = f"one with {here}" if is_here else "no file or folder that is here"
            require(place, said, not signed or here == signed[1], f"what {name} names")
    return spec.with_(**changed) if changed else spec


def _hash(spec: Spec, place: str) -> str:
    """The start of the hash of what lies at a place that `spec` names, whatever the device and the dtype."""
    of = ModelSpec(source=place, dtype="float32", device="cpu") if isinstance(spec, ModelSpec) else place
    return door.prints(of)[:HASH_DIGITS]


def origin(provenance: str, spec: ModelSpec) -> str:
    """What a model was made from, such as `folder /home/me/tiny`, without its place."""
    return provenance.replace(str(Path(spec.source).expanduser()), public(spec).source)


def _is_place(said: str) -> bool:
    """Whether a name is that of a file or folder: by its form, or because one is there and nothing else is
    called so."""
    is_absolute = said.startswith("~") or Path(said).is_absolute() or PureWindowsPath(said).is_absolute()
    return is_absolute or (said not in (*PACKAGED, "auto", *corpus.NAMED) and Path(said).exists())


def _name(place: str) -> str:
    """What a place is called in the folder that it is in."""
    return PureWindowsPath(place).name or Path(place).resolve().name
