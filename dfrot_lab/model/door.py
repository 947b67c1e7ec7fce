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


class _Prints:
    """Fingerprints by looking at the files."""

    def model(self, spec: ModelSpec) -> str:
        """Hash of the model's bytes, dtype and device."""
        return loading.fingerprint(spec)

    def text(self, spec: CorpusSpec) -> str:
        """Hash of the text."""
        return corpus.fingerprint(spec)

    def file(self, path: str) -> str:
        """Hash of a file's bytes."""
        return digest(path)


PRINTS = _Prints()
"""What stands behind names on this machine, for `recipe.keys`."""
