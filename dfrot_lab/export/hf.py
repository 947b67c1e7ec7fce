"""A rotated model as a plain Hugging Face folder: norms folded, R1 and R2 in the weights, neither R3 nor R4,
so that its logits are the original's and `AutoModelForCausalLM` loads it with no code of ours. Written a few
parts at a time, which is all that is held of a model that does not fit into memory; whole or not at all."""

import json
import logging
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.disk import atomic, rotation_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export import card
from dfrot_lab.export.card import OURS
from dfrot_lab.model import door, loading, stream
from dfrot_lab.model.checkpoint import EMBEDDING, HEAD, parameters_of
from dfrot_lab.model.families import Roles
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.public import public
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import build

log = logging.getLogger(__name__)
SHARD_BYTES = 2e9  # what the parts in one file may fill: so much is held, too
WHY = {
    "layer": "its LayerNorms subtract a mean that a rotated residual stream has elsewhere",
    "online": "its R1 acts on what its layers read while it runs, which no weight can hold",
    "experts": "its experts are kept in tensors that this export does not write yet",
}


def export(recipe: Recipe, folder: Path, store: Store | None = None) -> Path:
    """Write the rotated model of `recipe`, not quantized, in the dtype of its ModelSpec, into a new `folder`
    (returned), with the recipe, R1 and a card. ValueError: a family whose rotated form is not its own
    class's, a folder that is not free."""
    recipe, store = door.resolved(recipe).canonical(), store or Store()
    with atomic.new_folder(folder) as temporary:
        _require_plain(loading.roles_for(recipe.model, store))
        loaded, made = build.rotated(recipe.with_(jitter=None, online="none"), store)
        _write_weights(loaded, temporary)
        loaded.config.architectures = [loaded.family]
        loaded.config.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        if generation := getattr(loaded.model, "generation_config", None):
            generation.save_pretrained(temporary)
        (temporary / OURS).mkdir()
        atomic.write_text(temporary / OURS / "recipe.yaml", public(recipe).to_yaml())
        if made.R1 is not None:
            rotation_files.save(made.R1, temporary / OURS / "R1.safetensors", public(recipe.rotation))
        atomic.write_text(temporary / "README.md", card.of_hf(recipe, loaded, store))
    return folder


def _require_plain(roles: Roles) -> None:
    """Refuse a family whose rotated form its own class cannot hold; ValueError."""
    faults = {"layer": roles.norm == "layer", "online": roles.online, "experts": bool(roles.experts)}
    if why := next((WHY[name] for name, has in faults.items() if has), None):
        raise ValueError(f"to export it, a model must be one that weights alone can rotate: {why}")


def _write_weights(loaded: LoadedModel, folder: Path) -> None:
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
                    held |= {
                        own: x.detach().cpu().contiguous()
                        for own, x in parameters_of(loaded.model, loaded.roles, part)
                    }
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
