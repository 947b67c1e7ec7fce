"""The model card of an export: what was done to which model, what it measures, how to load it."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dfrot_lab import __version__
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import tables
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.public import origin, public
from dfrot_lab.recipe.specs import PACKAGED, Recipe
from dfrot_lab.score import perplexity, rows

OURS = "dfrot_lab"  # the folder in an export with what made it: recipe and R1
LICENCE = "Apache-2.0"  # of the packaged models


def of_hf(recipe: Recipe, loaded: LoadedModel, store: Store) -> str:
    """The card of a plain rotated folder, as Markdown."""
    return _page("hf.md.j2", recipe, loaded, store)


def of_compressed(recipe: Recipe, loaded: LoadedModel, store: Store) -> str:
    """The card of a folder in the compressed-tensors format, as Markdown."""
    grids = {name: getattr(recipe, name) for name in ("weights", "activations")}
    r4 = {"r4": recipe.acts("R4"), "block": recipe.mlp_block}
    return _page("compressed.md.j2", recipe, loaded, store, **grids, **r4)


def of_gguf(
    recipe: Recipe, loaded: LoadedModel, store: Store, kind: str, counts: Mapping[str, int], names: list[str]
) -> str:
    """The card of a GGUF file, or of its parts by name, with so many matrices of each kind, as Markdown."""
    each = ", ".join(f"{count} {name}" for name, count in counts.items())
    more = {"kind": kind, "counts": each, "file": names[0], "parts": len(names)}
    return _page("gguf.md.j2", recipe, loaded, store, **more)


def _page(template: str, recipe: Recipe, loaded: LoadedModel, store: Store, **more: Any) -> str:
    about: dict[str, Any] = {"name": public(recipe.model).source, "family": loaded.family, "ours": OURS}
    about |= {"dtype": loaded.spec.dtype, "rotation": recipe.rotation.name, "bits": recipe.bits}
    about |= {"is_rotated": recipe.is_rotated, "is_scaled": recipe.scales is not None}
    about |= {"origin": origin(loaded.provenance, recipe.model)}
    about |= {"licence": LICENCE if recipe.model.source in PACKAGED else "", "version": __version__}
    about |= measured(recipe, store) | {"is_scored": template == "compressed.md.j2"} | more
    loader = PackageLoader("dfrot_lab", "export")
    pages = Environment(loader=loader, undefined=StrictUndefined, autoescape=False)  # Markdown, not HTML
    return pages.get_template(template).render(about) + "\n"


def measured(recipe: Recipe, store: Store) -> dict[str, Any]:
    """What the quantized model of a recipe was found to score, and on what; no rows where it was not."""
    found = perplexity.stored(recipe, store)
    lines = rows.rows([found]) if found else []
    where = {"corpus": public(recipe).corpus.name, "windows": recipe.windows, "window": recipe.window}
    return where | {"rows": [(line["metric"], tables.cell(line)) for line in lines]}
