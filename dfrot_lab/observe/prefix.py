"""Which tokens are put before every window, as PrefixQuant finds them (arXiv 2410.05265, its release): a
token is an outlier where its largest value at a down_proj's input is more than 64 times the median token's of
its window. As many as a window has of them, on average in the layer with most, of those that are outliers
most often when they are not first, go before the token that texts begin with."""

import logging
import math
from collections import Counter

import torch
from torch import Tensor

from dfrot_lab.model import hooks, stream
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.prefix import require_no_experts

log = logging.getLogger(__name__)
KIND = "prefix"
RARE = 0.1  # of the windows: a token, the only one, that is an outlier less often is left out


def find(loaded: LoadedModel, ids: Tensor, ratio: float) -> list[int]:
    """The ids of a model's prefix, from a text `ids` (windows, window), of which a token is an outlier above
    `ratio` times the median; where none is, that is said, and a prefix is what texts begin with alone.
    ValueError: experts."""
    require_no_experts(loaded)
    counts: dict[str, list[int]] = {}
    later: Counter[int] = Counter()

    def see(site: str, x: Tensor) -> None:
        own = counts.setdefault(site, [])
        largest = x[0].abs().amax(-1).float()
        heavy = (largest > ratio * largest.median()).nonzero().flatten().tolist()
        later.update(int(ids[len(own), place]) for place in heavy if place)
        own.append(len(heavy))

    with hooks.at_sites(loaded, see, hooks.sites_of(loaded, "down_proj_in")):
        stream.through(loaded, ids.split(1), "prefix")
    many = math.ceil(max(sum(own) / len(own) for own in counts.values()))
    if not many:
        said = "no token of %d has a value above %g times the median token's at a down_proj's input: a prefix"
        log.warning(f"{said} of one token is put before windows, with nothing to gather", ids.numel(), ratio)
    often = sorted(later.items(), key=lambda one: (-one[1], one[0]))
    if len(often) == 1 and often[0][1] < RARE * len(ids):
        often = []
    return [*(token for token, _ in often[:many]), first_of(loaded, ids)]


def first_of(loaded: LoadedModel, ids: Tensor) -> int:
    """The token that a text begins with: the tokenizer's, or the one that ends texts, or, where it has
    neither, the most frequent one of `ids`."""
    names = ("bos_token_id", "eos_token_id")
    named = [token for name in names if (token := getattr(loaded.tokenizer, name, None)) is not None]
    return int(named[0]) if named else int(torch.mode(ids.flatten()).values)
