"""R1 alone, as a safetensors file: tensor `R1` (channels, channels) float64; metadata say what made it."""

from pathlib import Path

from dfrot_lab.disk import rotation_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import door
from dfrot_lab.model.public import public
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.rotate import transforms


def export(recipe: Recipe, path: Path, store: Store | None = None) -> Path:
    """Write R1 of `recipe` to `path` (returned), for `--rotation FILE` and other programs. ValueError: NR, a
    name that is taken."""
    require("--out", path, path.suffix == ".safetensors", "a file ending in .safetensors")
    require("--out", path, not path.exists() and not path.is_symlink(), "a name that is free")
    recipe, store = door.resolved(recipe).canonical(), store or Store()
    acts_online = recipe.rotation.acts_online  # none of these has an R1: that is known before it is fitted
    R = None if acts_online else transforms.fit(recipe, transforms.Context(recipe, store)).R1
    if R is None:
        raise ValueError(f"--rotation must be one with a matrix R1 to export; got {recipe.rotation.name}")
    rotation_files.save(R, path, public(recipe.rotation), model=public(recipe.model).source)
    return path
