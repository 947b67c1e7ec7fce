"""The door: where `auto` is replaced by what is here, once, before anything is computed or keyed."""

from typing import TypeVar, cast

from dfrot_lab.disk.atomic import digest
from dfrot_lab.model import corpus, loading
from dfrot_lab.recipe.base import Spec
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec

S = TypeVar("S", bound=Spec)


def resolved(spec: S) -> S:
    """`spec` without an `auto`: every text and device in it named. ValueError for one that is not here."""
    if isinstance(spec, CorpusSpec):
        return cast(S, corpus.resolve(spec))
    if isinstance(spec, ModelSpec):
        return cast(S, loading.placed(spec))
    inner = {name: value for name, value in spec if isinstance(value, Spec)}
    changed = {name: new for name, value in inner.items() if (new := resolved(value)) is not value}
    return spec.with_(**changed) if changed else spec


def prints(of: ModelSpec | CorpusSpec | str) -> str:
    """The hash of what stands behind a name here: of a model, a text, the file at a path."""
    if isinstance(of, ModelSpec):
        return loading.fingerprint(of)
    return corpus.fingerprint(of) if isinstance(of, CorpusSpec) else digest(of)
