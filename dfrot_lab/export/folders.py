"""A model's folder as Hugging Face has it: safetensors, config, tokenizer, and beside them what made it.
Written a few parts at a time, which is all that is held of a model that does not fit into memory."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.disk import atomic, rotation_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export.card import OURS
from dfrot_lab.model import door, loading, stream
from dfrot_lab.model.checkpoint import EMBEDDING, HEAD, parameters_of
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.public import public
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import Recipe

log = logging.getLogger(__name__)
GENERATION = "generation_config.json"
NO_PREFIX = (
    "None to export: keys and values before every window are no weights, and nothing would put them there"
)
NO_TURNS = "one that weights can hold to export: what acts before every linear is no weight"
SHARD_BYTES = 2e9  # what the parts in one file may fill: so much is held, too
WHY = {
    "layer": "its LayerNorms subtract a mean that a rotated residual stream has elsewhere",
    "online": "its R1 acts on what its layers read while it runs, which no weight can hold",
    "experts": "its experts are kept in tensors that this export does not write yet",
}
As = Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""From a part's number and its parameters by name: the tensors that are written of it."""


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with every `auto` named and what has no effect at its default; scales that then fall away
    are said. ValueError: a prefix, a rotation that acts online."""
    require("Recipe.prefix", "one", recipe.prefix is None, NO_PREFIX)
    require("Recipe.rotation", recipe.rotation.name, not recipe.rotation.acts_online, NO_TURNS)
    recipe = door.resolved(recipe)
    found = recipe.canonical()
    if recipe.scales is not None and found.scales is None:
        log.warning("channel scales are left out: with activations of 16 bits there is nothing they help")
    return found


def fused(recipe: Recipe) -> Recipe:
    """The recipe with all of it in the weights, and no jitter."""
    return recipe.with_(online="none", jitter=None).canonical()


def require_plain(recipe: Recipe, store: Store) -> None:
    """Refuse a family whose rotated form its own class cannot hold; ValueError."""
    roles = loading.roles_for(recipe.model, store)
    faults = {"layer": roles.norm == "layer", "online": roles.online, "experts": bool(roles.experts)}
    if why := next((WHY[name] for name, has in faults.items() if has), None):
        raise ValueError(f"to export it, a model must be one that weights alone can rotate: {why}")


def write(loaded: LoadedModel, folder: Path, held_as: As = lambda _, held: held, **config: Any) -> None:
    """The weights, a part's tensors `held_as` it says, the tokenizer, how the source generates; last the
    config, with `config` in it: without one nothing loads the folder."""
    _write_weights(loaded, folder, held_as)
    with atomic.told(folder):
        loaded.tokenizer.save_pretrained(folder)
    source = loading.folder_of(loaded.spec) / GENERATION
    if source.is_file():
        atomic.write_text(folder / GENERATION, source.read_text(encoding="utf-8"))
    elif generation := getattr(loaded.model, "generation_config", None):
        generation.save_pretrained(folder)
    _write_config(loaded, folder, config)


def _write_config(loaded: LoadedModel, folder: Path, more: Mapping[str, Any]) -> None:
    loaded.config.architectures = [loaded.family]
    said = json.loads(loaded.config.to_json_string(use_diff=True)) | dict(more)
    atomic.write_text(folder / "config.json", json.dumps(said, indent=2) + "\n")


def describe(folder: Path, recipe: Recipe, R1: Tensor | None, card: str) -> None:
    """What made it: the recipe, R1 and the `card`."""
    (folder / OURS).mkdir()
    atomic.write_text(folder / OURS / "recipe.yaml", public(recipe).to_yaml())
    if R1 is not None:
        rotation_files.save(R1, folder / OURS / "R1.safetensors", public(recipe.rotation))
    atomic.write_text(folder / "README.md", card)


def _write_weights(loaded: LoadedModel, folder: Path, held_as: As) -> None:
    """The weights as one safetensors file, or as several with an index."""
    shards = _shards(loaded)
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    places, total = dict[str, str](), 0
    bar = tqdm(total=sum(map(len, shards)), desc="Writing", unit="part", leave=False)
    with bar:
        for name, parts in zip(names, shards, strict=True):
            held = dict[str, Tensor]()
            for part in parts:
                with stream.part(loaded, part):
                    own = held_as(part, dict(parameters_of(loaded.model, loaded.roles, part)))
                    held |= {each: x.detach().cpu().contiguous() for each, x in own.items()}
                bar.update()
            size = sum(x.nbytes for x in held.values())
            with atomic.told(folder / name, size):
                atomic.require_room(folder, size)
                save_file(held, folder / name, {"format": "pt"})
            places |= dict.fromkeys(held, name)
            total += size
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        atomic.write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _shards(loaded: LoadedModel) -> list[list[int]]:
    """The parts of the model, in order, in lots of at most SHARD_BYTES or of one part."""
    found, size = list[list[int]](), 0
    for part in (EMBEDDING, *range(len(loaded.layers)), HEAD):
        own = sum(x.nbytes for _, x in parameters_of(loaded.model, loaded.roles, part))
        if not found or size + own > SHARD_BYTES:
            found.append([])
            size = 0
        found[-1].append(part)
        size += own
    return found
