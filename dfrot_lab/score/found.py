"""What a recipe asks to be found on calibration text beside its rotation, from the store or now: a prefix, of
the model itself; channel scales, of the model with R1; clips and static scales, of the rotated model. All but
the first are found with the prefix before every window, and without its rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.disk.atomic import still
from dfrot_lab.maths.quantizers import Fixed
from dfrot_lab.model import corpus, door, loading, prefix as prefixes, scales, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import clips, prefix, static
from dfrot_lab.observe.capture import token_blocks
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.specs import PrefixSpec, Recipe, StaticSpec
from dfrot_lab.rotate.transforms import Transforms


def prefix_of(recipe: Recipe, store: Store) -> Tensor | None:
    """The ids (tokens,) of a recipe's prefix; None where it has none. ValueError: experts; a window that is
    too long with it."""
    spec = recipe.prefix
    if spec is None:
        return None

    def make(writer: Writer) -> None:
        loaded = loading.load_model(recipe.model, store)
        found = prefix.find(loaded, _windows(spec, loaded), spec.ratio)
        writer.save_json("prefix", {"ids": found, "texts": [loaded.tokenizer.decode([i]) for i in found]})

    ids = torch.tensor(_stored(prefix.KIND, keys.prefix, recipe, store, make).json("prefix")["ids"])
    longest = max(recipe.window, recipe.weights.window if recipe.weights.corpus else 0)
    loading.check_window(longest + len(ids), loading.words_of(recipe.model, store)[1])
    return ids


def scales_of(recipe: Recipe, loaded: LoadedModel, made: Transforms, store: Store) -> dict[str, Tensor]:
    """Each site's channel scales, of the model with R1 alone."""
    text = recipe.scales
    assert text is not None

    def make(writer: Writer) -> None:
        ids, skip = _before(recipe, token_blocks(text, loaded), store)
        how: dict[str, Any] = {"r4": made.r4, "blocks": recipe.blocks, "skip": skip}
        writer.save_tensors("scales", scales.find(loaded, ids, recipe.activations, **how))

    return _stored(scales.KIND, keys.scales, recipe, store, make).tensors("scales")


def clips_of(recipe: Recipe, loaded: LoadedModel, made: Transforms, store: Store) -> dict[str, float]:
    """Each site's clip ratio, of the rotated model."""
    text = recipe.clips
    assert text is not None

    def make(writer: Writer) -> None:
        ids, skip = _before(recipe, token_blocks(text, loaded), store)
        online = partial(surgery.online, loaded, r4=made.r4, blocks=recipe.blocks)
        writer.save_json("clips", clips.find(loaded, ids, recipe.activations, online, skip))

    found: dict[str, float] = _stored(clips.KIND, keys.clips, recipe, store, make).json("clips")
    return found


def static_of(recipe: Recipe, loaded: LoadedModel, made: Transforms, store: Store) -> dict[str, Fixed]:
    """Each site's scale and zero point, of the rotated model."""
    text = recipe.static
    assert text is not None

    def make(writer: Writer) -> None:
        ids, skip = _before(recipe, _windows(text, loaded), store)
        online = partial(surgery.online, loaded, r4=made.r4, blocks=recipe.blocks)
        writer.save_json("static", static.find(loaded, ids, recipe.activations, online, skip))

    found = _stored(static.KIND, keys.static, recipe, store, make).json("static")
    return {site: Fixed(*both) for site, both in found.items()}


def _stored(
    kind: str,
    key: Callable[..., dict[str, Any]],
    recipe: Recipe,
    store: Store,
    make: Callable[[Writer], None],
) -> Artefact:
    """What is named by a `key` of keys.py, from the store or made now."""
    return store.get_or_make(kind, still(lambda: key(recipe, door.prints)), make)


def _before(recipe: Recipe, ids: Tensor, store: Store) -> tuple[Tensor, int]:
    """Windows with the recipe's prefix, if any, before each; its length."""
    own = prefix_of(recipe, store)
    return prefixes.before(ids, own), prefixes.tokens(own)


def _windows(text: StaticSpec | PrefixSpec, loaded: LoadedModel) -> Tensor:
    """The token ids (windows, window) of a text."""
    of: dict[str, Any] = {"blocks": text.windows, "window": text.window}
    of["sample"] = getattr(text, "sample", None)
    return corpus.sampled_blocks(text.corpus, loaded.tokenizer, **of)
