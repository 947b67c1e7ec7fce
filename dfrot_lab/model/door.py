"""The door: where `auto` is replaced by what is here, once, before anything is computed or keyed."""

from typing import TypeVar, cast

from dfrot_lab.disk.digests import digest
from dfrot_lab.model import corpus, loading
from dfrot_lab.recipe.base import Spec
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec

S = TypeVar("S", bound=Spec)


def resolved(spec: S) -> S:
    """`spec` with the text and the device of every nested spec named: no `auto` is left. ValueError for a
    text or a device that is not here."""
    if isinstance(spec, CorpusSpec):
        return cast(S, corpus.resolve(spec))
    if isinstance(spec, ModelSpec):
        return spec.with_(device=loading.device()) if spec.device == "auto" else spec
    inner = {name: value for name, value in spec if isinstance(value, Spec)}
    changed = {name: new for name, value in inner.items() if (new := resolved(value)) is not value}
    return spec.with_(**changed) if changed else spec


def prints(of: ModelSpec | CorpusSpec | str) -> str:
    """The hash of what stands behind a name here: of a model, a text, the file at a path."""
    if isinstance(of, ModelSpec):
        return loading.fingerprint(of)
    return corpus.fingerprint(of) if isinstance(of, CorpusSpec) else digest(of)
