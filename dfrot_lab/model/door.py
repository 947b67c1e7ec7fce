"""The door: what a spec leaves to this machine (`auto`) is said once, before anything is keyed or made."""

from typing import TypeVar

from dfrot_lab.model import corpus, loading
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, Spec

AnySpec = TypeVar("AnySpec", bound=Spec)


def resolved(spec: AnySpec) -> AnySpec:
    """`spec` with every `auto` (a corpus's name, a model's device) replaced by what is here, nested too.

    A spec that leaves nothing open comes back as it is. ValueError: an unknown corpus or DFROT_LAB_DEVICE.
    """
    if isinstance(spec, CorpusSpec):
        name = corpus.resolve(spec).name
        return spec if name == spec.name else spec.with_(name=name)
    if isinstance(spec, ModelSpec):
        open_device = getattr(spec, "device", None) == "auto"
        return spec.with_(device=loading.device()) if open_device else spec
    nested = {name: value for name, value in vars(spec).items() if isinstance(value, Spec)}
    said = {name: resolved(value) for name, value in nested.items()}
    changed = {name: value for name, value in said.items() if value is not nested[name]}
    return spec.with_(**changed) if changed else spec
