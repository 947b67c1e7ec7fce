"""What is taken away from an explorer, as its foot offers it; and a token that several look at together."""

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import anywidget
from traitlets import Unicode

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.base import Spec


def said(value: Any, name: str = "") -> str:
    """A value in Python, what is usual left out; `name`, where it cannot be said, as matrices cannot."""
    if isinstance(value, Spec):
        fields = type(value).model_fields
        own = {n: v for n, v in value if v != fields[n].get_default(call_default_factory=True)}
        return f"{type(value).__name__}({', '.join(f'{n}={said(v, n)}' for n, v in own.items())})"
    if isinstance(value, Capture):
        return f"capture({said(value.spec)})"
    if isinstance(value, Store):
        return "Store()" if value.root == Store().root else f"Store({str(value.root)!r})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    return repr(value) if value is None or isinstance(value, bool | int | float | str | tuple) else name


class Take(anywidget.AnyWidget):
    """The foot of an explorer: its view as a line of Python, its table, a picture of it. With it comes the
    style sheet of all the explorer."""

    _esm, _css = Path(__file__).with_name("take.js"), Path(__file__).with_name("look.css")
    line, name = Unicode().tag(sync=True), Unicode().tag(sync=True)


def together(*explorers: Any) -> None:
    """A token that is picked in one of these is picked in all that show the same text, as far as they do."""

    def follow(one: Any, other: Any, change: Any) -> None:
        shared = min(len(one.texts), len(other.texts))
        if 0 <= change["new"] < shared and list(one.texts[:shared]) == list(other.texts[:shared]):
            other.state.token = change["new"]

    for one, other in itertools.permutations(explorers, 2):
        one.state.observe(partial(follow, one, other), "token")
