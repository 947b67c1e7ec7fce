"""What a layer has inside for one text: what o_proj and down_proj read, each head's q, k and v, the norms,
the stream, at any sites of `model.hooks`, handed over layer by layer while the layer is there to be used."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from dfrot_lab.model import hooks
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.stream import Walk
from dfrot_lab.recipe.base import require

Seen = dict[str, Tensor]  # by the site's name in its layer, such as `q`, `down_proj_in`, `experts.7.mlp_in`


def layers_of(loaded: LoadedModel, layers: Collection[int] | None) -> list[int]:
    """The chosen layers of a model in rising order, by default all. ValueError: one that it has not."""
    count = len(loaded.layers)
    chosen = sorted(range(count) if layers is None else set(layers))
    wrong = [number for number in chosen if not 0 <= number < count]
    require("layers", wrong, not wrong, f"numbers from 0 to {count - 1}")
    return chosen


@torch.inference_mode()
def walked(
    loaded: LoadedModel, ids: Tensor, *kinds: str, layers: Collection[int] | None = None
) -> Iterator[tuple[int, Seen]]:
    """One window of ids (tokens,) on its way: of each of `layers`, while it is there to be used, what was at
    its sites of `kinds` (of hooks.ALL_KINDS) without the first dimension: (tokens, channels), or of q, k, v
    (heads, tokens, head size). Of an expert, the tokens that it was given. A layer's is dropped as the next
    begins. KeyError: no such kind; ValueError: no such layer, or ids that are not one window."""
    require("ids.shape", tuple(ids.shape), ids.ndim == 1 and len(ids) > 0, "that of one window (tokens,)")
    chosen, seen = layers_of(loaded, layers), Seen()

    def note(site: str, x: Tensor) -> None:
        seen[site.split(".", 2)[2]] = (x if x.ndim == 2 else x[0]).detach()

    at = [site for site in hooks.sites_of(loaded, *kinds) if int(site.split(".")[1]) in chosen]
    with hooks.at_sites(loaded, note, at):
        walk = Walk(loaded, [ids[None]])
        for number in walk.layers(chosen[-1] + 1 if chosen else 0):
            walk.step(number)
            if number in chosen:
                yield number, dict(seen)
            seen.clear()
