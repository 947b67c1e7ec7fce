"""What may be sent away: a file or folder of one's own becomes its name and the start of its bytes' hash."""

from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from dfrot_lab.model import door
from dfrot_lab.recipe.base import Spec
from dfrot_lab.recipe.specs import ModelSpec

S = TypeVar("S", bound=Spec)
PATHS = ("source", "path", "name", "corpus", "calibration")  # fields of specs that may hold a path
DIGITS = 12


def public(spec: S) -> S:
    """`spec` without a path in it: `/home/me/tiny` is `tiny@f96e104cfc96`, whatever the device and
    the dtype; `tiny` where there is no such file any more. What is no such path stays as it is."""
    changed: dict[str, Any] = {name: public(value) for name, value in spec if isinstance(value, Spec)}
    for field in PATHS:
        said = getattr(spec, field) if field in type(spec).model_fields else None
        if isinstance(said, str) and _is_place(said):
            changed[field] = PureWindowsPath(said).name
            with suppress(OSError, ValueError):
                of = spec.with_(dtype="float32", device="cpu") if isinstance(spec, ModelSpec) else said
                changed[field] += f"@{door.prints(of)[:DIGITS]}"
    return spec.with_(**changed) if changed else spec


def origin(provenance: str, spec: ModelSpec) -> str:
    """What a model was made from, such as `folder /home/me/tiny`, without its place."""
    return provenance.replace(str(Path(spec.source).expanduser()), public(spec).source)


def _is_place(said: str) -> bool:
    is_absolute = said.startswith("~") or Path(said).is_absolute() or PureWindowsPath(said).is_absolute()
    return is_absolute or (len(Path(said).parts) > 1 and Path(said).exists())
