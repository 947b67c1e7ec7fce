"""A rotated model as a plain Hugging Face folder: norms folded, R1 and R2 in the weights, neither R3 nor R4,
so that its logits are the original's and `AutoModelForCausalLM` loads it with no code of ours."""

from pathlib import Path

from dfrot_lab.disk import atomic
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export import card, folders
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import build


def export(recipe: Recipe, folder: Path, store: Store | None = None) -> Path:
    """Write the rotated model of `recipe`, not quantized, in the dtype of its ModelSpec, into a new `folder`
    (returned), with the recipe, R1 and a card. ValueError: a family whose rotated form is not its own
    class's, a folder that is not free."""
    recipe, store = folders.resolved(recipe), store or Store()
    with atomic.new_folder(folder) as temporary:
        folders.require_plain(recipe, store)
        loaded, made = build.rotated(folders.fused(recipe), store)
        folders.describe(temporary, recipe, made.R1, card.of_hf(recipe, loaded, store))
        folders.write(loaded, temporary)
    return folder
