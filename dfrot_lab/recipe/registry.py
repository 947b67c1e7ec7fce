"""The tables of what can be chosen by name: rotation methods, quantizers of weights and of the KV cache.
A choice's module is imported when asked for. A new method or quantizer: one file, one line here."""

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """Where a choice lives; of a method also the names of the rows it offers, as tables show them; of a KV
    quantizer the fields of QuantSpec that it takes, as they usually are, and what it `holds`."""

    module: str
    rows: tuple[str, ...] = ()
    fields: Mapping[str, Any] = MappingProxyType({})
    holds: tuple[str, ...] = ("keys", "values")


METHODS = {
    "random": Choice("dfrot_lab.rotate.random", ("NR", "RO", "RH", "RHT2", "GSR")),
    "dfrot": Choice("dfrot_lab.rotate.dfrot", ("DFRot",)),
    "offset": Choice("dfrot_lab.rotate.offset", ("Offset",)),
    "offset_plus": Choice("dfrot_lab.rotate.offset_plus", ("Offset+",)),
    "klt": Choice("dfrot_lab.rotate.klt", ("KLT",)),
    "proxy": Choice(
        "dfrot_lab.rotate.proxy", ("DartQuant", "DartQuant + massive", "KurTail", "KurTail + massive")
    ),
    "task": Choice("dfrot_lab.rotate.task", ("SpinQuant", "OSTQuant R1")),
    "smoothquant": Choice("dfrot_lab.rotate.smoothquant", ("SmoothQuant",)),
    "optrot": Choice("dfrot_lab.rotate.optrot", ("OptRot",)),
    "duquant": Choice("dfrot_lab.rotate.duquant", ("DuQuant R1",)),
    "duquant_online": Choice("dfrot_lab.rotate.duquant_blocks", ("DuQuant",)),
    "flatquant": Choice("dfrot_lab.rotate.flatquant", ("FlatQuant",)),
    "scale_search": Choice("dfrot_lab.rotate.scale_search", ("AWQ", "OS+")),
}
"""Rotation methods: modules with `SPEC`, `spec(row, seed=, capture=)`, `fit(recipe, context)`; `VERSION`,
`NEEDS` (what it looks at, in a few words)."""
WEIGHTS = {
    "rtn": Choice("dfrot_lab.weights.rtn"),
    "gptq": Choice("dfrot_lab.weights.gptq"),
    "gptaq": Choice("dfrot_lab.weights.gptaq"),
    "qep": Choice("dfrot_lab.weights.qep"),
    "foem": Choice("dfrot_lab.weights.foem"),
    "lwc": Choice("dfrot_lab.weights.lwc"),
    "rsq": Choice("dfrot_lab.weights.rsq"),
    "aespa": Choice("dfrot_lab.weights.aespa"),
}
"""Weight quantizers: `quantize(weight, seen, spec)`, `CALIBRATED` (needs the Hessian), `DRIFT` (and what the
full-precision model has in its inputs' place), `Look` (what of a layer's attention), `CORRECTION` (its usual
`correction`); `VERSION`."""
KIVI = {"scheme": "free", "group_size": 32, "residual": 128}  # its release's
CACHES = {
    "kivi": Choice("dfrot_lab.caches.kivi", fields=KIVI),
    "qjl": Choice("dfrot_lab.caches.qjl", fields={"seed": 0}, holds=("keys",)),
    "turboquant": Choice("dfrot_lab.caches.turboquant", fields={"seed": 0}),
}
"""Quantizers of keys and values beside the grids: `keys(x, spec)` and `values(x, spec)`, what is read of
x (batch, heads, tokens, head size) once it is held; `VERSION`."""

EXPORTS = {
    "hf": Choice("dfrot_lab.export.hf"),
    "compressed-tensors": Choice("dfrot_lab.export.compressed"),
    "gguf": Choice("dfrot_lab.export.gguf"),
    "r1": Choice("dfrot_lab.export.r1"),
}
"""Formats to take a model away in: `export(recipe, out, store)` writes it and returns where it is."""


def load(table: dict[str, Choice], name: str, what: str = "choice") -> Any:
    """The module of a choice; a ValueError says `what` was to be chosen and what there is."""
    if name not in list(table):  # a list: what a file says may not be hashable
        raise ValueError(f"{what} must be one of {', '.join(table)}; got {name!r}")
    return importlib.import_module(table[name].module)


def code(table: dict[str, Choice], name: str) -> int | str:
    """What of a choice's code its results are keyed by: its VERSION, or, while it has none, its file."""
    module = load(table, name)
    return getattr(module, "VERSION", None) or hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()


def drifts(weights: str) -> bool:
    """Whether a weight quantizer asks for what the full-precision model has in its inputs' place."""
    return bool(getattr(load(WEIGHTS, weights), "DRIFT", False))


def rows() -> list[str]:
    """The rows of all methods by name: NR, RO, RH, DFRot, ..."""
    return [row for choice in METHODS.values() for row in choice.rows]


def spec_of(row: str, **options: Any) -> Any:
    """The MethodSpec of a row by its name; options `seed` and `capture` as its method's `spec` takes them."""
    method = next((name for name, choice in METHODS.items() if row in choice.rows), None)
    if method is None:
        raise ValueError(f"a rotation must be one of {', '.join(rows())}; got {row!r}")
    return load(METHODS, method).spec(row, **options)
