"""What every spec is: immutable, validated field by field, the same in any process, to and from plain values.
A field carries its rule in words, and an error is that rule: `RefineSpec.gamma must be > 0; got -3`."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dfrot_lab.recipe import registry

HASH_DIGITS = 12
SIGNED = re.compile(rf".*@([0-9a-f]{{{HASH_DIGITS}}})", re.DOTALL)
"""A file or folder of one's own without its path, as `public` names it: `tiny@f96e104cfc96`."""


def content_key(value: Any) -> str:
    """The first 32 hex digits of the sha256 of a JSON-able value: the same in any process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def strict_json(value: Any, indent: int | None = 1) -> str:
    """A value as JSON that any reader takes: NaN is null, infinity the word inf."""

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {str(name): plain(inner) for name, inner in part.items()}
        if isinstance(part, list | tuple):
            return [plain(inner) for inner in part]
        is_odd = isinstance(part, float) and not math.isfinite(part)
        return (None if math.isnan(part) else str(part)) if is_odd else part

    return json.dumps(plain(value), indent=indent, default=str, allow_nan=False)


class Once(yaml.SafeLoader):
    """Plain values alone, no key of a mapping twice: of two lines for one field YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a YAML node. ValueError: a key that is there twice."""
        seen = set[str]()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise ValueError(f"{name} is said twice{key.start_mark}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def require(name: str, value: object, ok: object, rule: str) -> None:
    """A ValueError that names what is wrong, the rule and the value, unless `ok`."""
    if not ok:
        raise ValueError(f"{name} must be {rule}; got {value}")


def hint_of_signed(name: str) -> str:
    """What to do where a place is wanted and `name` is what `public` makes of one; else nothing."""
    said = " A name with @ and a hash stands for a file or folder of one's own: say where it lies."
    return said if SIGNED.fullmatch(name) else ""


def require_file(name: str, path: Path, *, or_none: bool = False, most: int | None = None) -> None:
    """Refuse what is no regular file before it is opened: a pipe may wait for ever, a device have no end;
    or one of more than `most` bytes. ValueError."""
    rule = "a regular file, or a name that is free" if or_none else "a regular file that is there"
    require(name, path, path.is_file() or (or_none and not path.exists()), rule)
    if most is not None and (size := path.stat().st_size) > most:
        raise ValueError(f"{name} must have at most {most:,} bytes; got {path} of {size:,}")


def ruled(default: Any, rule: str, **limits: Any) -> Any:
    """A field: its default, its rule in words ("a whole number >= 1"), and pydantic's limits (ge, gt, le)."""
    return Field(default, description=rule, **limits)


def one_of(default: Any, choices: tuple[Any, ...]) -> Any:
    """A field that takes one of a few words."""
    rule = f"one of {', '.join(map(str, choices))}"
    return Field(default, description=rule, json_schema_extra={"of": list(choices)})


class Spec(BaseModel):
    """Base of all specs: frozen, keyword-only. An unknown or wrong field is a ValueError that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    LATER: ClassVar[tuple[str, ...]] = ()
    """Fields that came later: while one is None it adds nothing to a key, so what is kept is still found."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ValueError(self._said(error)) from None

    @classmethod
    def _said(cls, error: ValidationError) -> str:
        first = error.errors()[0]
        if first["type"] == "value_error":  # a rule about several fields, which said it already
            return str(first["ctx"]["error"])
        name = str(first["loc"][0])
        if name not in cls.model_fields:
            return f"{cls.__name__} has no field {name!r}; it has {', '.join(cls.model_fields)}"
        kinds = [kind.__name__ for kind in cls._kinds(name) if kind is not type(None)]
        rule = cls.model_fields[name].description or f"a {' or '.join(kinds)}"
        rule = "text in UTF-8: rename what it names" if first["type"] == "string_unicode" else rule
        return f"{cls.__name__}.{name} must be {rule}; got {first['input']!r}"

    @classmethod
    def _kinds(cls, name: str) -> tuple[Any, ...]:
        """The classes a field may be of."""
        kind = cls.model_fields[name].annotation
        return get_args(kind) or (kind,)

    def model_post_init(self, _context: Any) -> None:
        """Check words against their choices, then the rules that several fields share."""
        for name, field in type(self).model_fields.items():
            extra: Any = field.json_schema_extra
            if extra is not None:
                self._require(name, getattr(self, name) in extra["of"], str(field.description))
        self._check()

    def _check(self) -> None:
        """Rules about several fields at once: ValueError through `_require`."""

    def _require(self, name: str, ok: bool, rule: str) -> None:
        require(f"{type(self).__name__}.{name}", repr(getattr(self, name)), ok, rule)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain values, nested specs included, with the class name under `spec`."""
        return {"spec": type(self).__name__, **self.plain()}

    def plain(self) -> dict[str, Any]:
        """The fields as plain values, nested specs as mappings: what a YAML file holds."""
        return {name: value.plain() if isinstance(value, Spec) else value for name, value in self}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """The spec that plain values describe, the reverse of `plain` and `to_dict`; ValueError."""
        if not isinstance(said, Mapping):
            raise ValueError(f"{cls.__name__} must be a mapping of its fields; got {said!r}")
        return cls(**{str(name): cls._read(str(name), said[name]) for name in said if name != "spec"})

    @classmethod
    def _read(cls, name: str, value: Any) -> Any:
        """A field of plain values: of a spec in it, what is left out is as it is by default in this place."""
        for kind in cls._kinds(name) if name in cls.model_fields else ():
            if kind is float and isinstance(value, str):  # YAML reads 1e-3 and inf as words
                with suppress(ValueError):
                    return float(value)
            if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, Spec):
                default = cls.model_fields[name].default
                own = default.plain() if isinstance(default, Spec) else {}
                others = issubclass(kind, MethodSpec) and value.get("method") not in (None, own.get("method"))
                return kind.of(value if others else {**own, **value})
        return value

    @property
    def unkeyed(self) -> set[str]:
        """The fields that add nothing to its key."""
        return {name for name in self.LATER if getattr(self, name) is None}

    @property
    def key(self) -> str:
        """Content hash of the spec (32 hex digits)."""
        return content_key({"spec": type(self).__name__, **self._keyed()})

    def _keyed(self) -> dict[str, Any]:
        """`plain` without what adds nothing to a key, at any depth."""
        own = {name: value for name, value in self.plain().items() if name not in self.unkeyed}
        return own | {name: value._keyed() for name, value in self if isinstance(value, Spec)}

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self)(**{**dict(iter(self)), **changes})


class MethodSpec(Spec):
    """Base of the specs of rotation methods: which, with its parameters. Each has a `name` for tables.
    `acts_online`: on what each linear reads while the model runs, so no weights hold all of it."""

    method: ClassVar[str] = ""
    acts_online: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Short name for tables and figures."""
        raise NotImplementedError

    @property
    def first_seed(self) -> int | None:
        """The seed of what is random in it; None where nothing is."""
        return getattr(self, "seed", None)

    def canonical(self) -> Self:
        """The same with what has no effect set to defaults, so that equal work has one key."""
        return self

    def plain(self) -> dict[str, Any]:
        """As of any spec, with the method's name first."""
        return {"method": self.method, **super().plain()}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Self:
        """The spec of the method that `said` names under `method`; without it a random rotation."""
        values = dict(said)
        name = values.pop("method", cls.method or "random")
        if name and name == cls.method:
            return super().of(values)
        found: Any = next((kind for kind in MethodSpec.__subclasses__() if kind.method == name), None)
        found = found or registry.load(registry.METHODS, name, "rotation method").SPEC
        return found.of(values)
