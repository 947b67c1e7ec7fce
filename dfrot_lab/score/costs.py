"""Which rounding costs which words: the divergence of a window's next-token distributions, word by word, from
the full-precision model's, where the linears' inputs of one token, one layer or one kind of site are rounded
and all else is left alone. Rotations are on throughout; keys, values and weights are as full precision has
them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.model import door, hooks, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import divergence
from dfrot_lab.score.build import Built, build, rounded

KIND = "costs"
WAYS = ("all", "token", "layer", "site")
DIVERGENCE = divergence.MEASURES.index("divergence")


class Place(NamedTuple):
    """What alone is rounded: some `sites` of all tokens, or of one `token`; `name` says which."""

    name: str
    sites: frozenset[str]
    token: int | None = None


def places(loaded: LoadedModel, way: str, tokens: int) -> list[Place]:
    """The places of a window of `tokens` by one of WAYS: all at once, each token but the last, which no word
    follows, each layer, each kind of site. ValueError: another way; single tokens of a model with experts,
    which are not told apart."""
    require("way", repr(way), way in WAYS, f"one of {', '.join(WAYS)}")
    sites = hooks.sites_of(loaded, *hooks.LINEAR_INPUTS)
    if way == "token":
        plain = not loaded.roles.experts
        require("the model", loaded.family, plain, "one without experts, whose tokens are not told apart")
        return [Place(str(token), frozenset(sites), token) for token in range(tokens - 1)]
    of: dict[str, Callable[[str], str]] = {
        "all": lambda _: "all",
        "layer": lambda site: site.split(".")[1],
        "site": lambda site: site.rpartition(".")[2].replace("mlp_in", hooks.NORMS[1]),
    }
    names = dict.fromkeys(map(of[way], sites))
    return [Place(name, frozenset(site for site in sites if of[way](site) == name)) for name in names]


@torch.inference_mode()
def divergences(
    built: Built, recipe: Recipe, ids: Tensor, reference: Artefact, chosen: Iterable[Place]
) -> Tensor:
    """KL(full precision || rounded in one place alone) in nats of what follows each token of a window `ids`
    (tokens,) but the last: (places, tokens - 1) float32, beside its `reference`. Causal: a token's rounding
    costs no word before it."""
    found = []
    for place in chosen:
        with surgery.online(
            built.loaded, r4=built.transforms.r4, blocks=recipe.blocks,
            function=_only(rounded(recipe, built.transforms, None), place.token), sites=place.sites,
        ):  # fmt: skip
            found.append(divergence.window_measures(built, ids, reference)[:, DIVERGENCE])
    return torch.stack(found)


def _only(function: hooks.At, token: int | None) -> hooks.At:
    """`function` on one token's rows alone, by default on all."""
    if token is None:
        return function

    def one(site: str, x: Tensor) -> Tensor:
        out, row = x.clone(), x[..., token : token + 1, :]
        new = function(site, row)
        out[..., token : token + 1, :] = row if new is None else new
        return out

    return one


def of_window(recipe: Recipe, ids: Tensor, store: Store | None = None) -> dict[str, tuple[list[str], Tensor]]:
    """`divergences` of a window of ids (tokens,) by each of WAYS, stored or computed now: the places' names
    and (places, tokens - 1); of a model with experts not by token. ValueError: a recipe that changes more
    than activations; no word that follows another."""
    store, recipe = store or Store(), door.resolved(recipe).canonical()
    grids = (recipe.weights.quantizer, recipe.keys, recipe.values)
    plain = all(grid.bits == 16 for grid in grids) and recipe.activations.bits < 16
    require("Recipe.bits", recipe.bits, plain, "of rounded activations alone, such as 16-4-16")
    for name in ("keep_out", "set_massive", "prefix"):
        require(f"Recipe.{name}", own := getattr(recipe, name), own is None, "None: rounding alone counts")
    require("ids", f"{len(ids)} tokens", len(ids) > 1, "of two tokens or more")

    def make(writer: Writer) -> None:
        [reference] = divergence.references(recipe, ids[None], store)
        built = build(recipe, store)
        ways = [way for way in WAYS if way != "token" or not built.loaded.roles.experts]
        found = {way: places(built.loaded, way, len(ids)) for way in ways}
        for way, chosen in found.items():
            if not writer.has(way):
                shown = tqdm(chosen, f"{recipe.rotation.name}, each {way} rounded", unit="place", leave=False)
                writer.save_tensors(way, {way: divergences(built, recipe, ids, reference, shown)})
        names = {way: [place.name for place in chosen] for way, chosen in found.items()}
        writer.save_json("names", names)

    made = store.get_or_make(KIND, lambda: keys.costs(recipe, ids.tolist(), door.prints), make)
    return {way: (names, made.tensors(way)[way]) for way, names in made.json("names").items()}
