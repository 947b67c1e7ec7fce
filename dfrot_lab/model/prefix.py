"""Tokens put before every window whose keys and values stay as full precision makes them (PrefixQuant, arXiv
2410.05265): where one of them is what massive values gather on, no token of the window is. What else becomes
of these tokens nothing sees: other tokens read their keys and values alone, and they are not scored."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dfrot_lab.model import hooks, stream
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.surgery import hadamard, online

CACHED = ("k", "v")


def before(ids: Tensor, prefix: Tensor | None) -> Tensor:
    """Windows of token ids (windows, tokens) with those of a prefix (prefix tokens,), if any, before each."""
    return ids if prefix is None else torch.cat([prefix.to(ids).expand(len(ids), -1), ids], 1)


def tokens(prefix: Tensor | None) -> int:
    """How many tokens are before every window."""
    return 0 if prefix is None else len(prefix)


def require_no_experts(loaded: LoadedModel) -> None:
    """Refuse a model in which a prefix's rows cannot be told from a window's; ValueError."""
    if loaded.roles.experts:
        why = "the tokens that an expert reads are not told apart"
        raise ValueError(f"the model must be without experts for a prefix: {why}")


def after(x: Tensor, skip: int) -> Tensor:
    """Rows (windows, tokens, channels) without those of the first tokens of each window to `skip`."""
    return x[:, skip:] if skip else x


@dataclass(frozen=True)
class Prefix:
    """The `ids` of a prefix (tokens,), and by site what its `keys`, R3 not on them, and `values` are in full
    precision (key-value heads, tokens, head size)."""

    ids: Tensor
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]

    def holding(
        self, function: hooks.At, sites: Collection[str], *, r3: bool = False, block: int | None = None
    ) -> hooks.At:
        """`function` where it is to act, at `sites`, and in what it leaves the prefix's keys and values, as
        they are in full precision; with `r3` keys have R3 in blocks of `block` already."""
        keys = {site: hadamard(x, block) for site, x in self.keys.items()} if r3 else self.keys
        kept, chosen = {**keys, **self.values}, frozenset(sites)

        def hold(site: str, x: Tensor) -> Tensor | None:
            if (own := kept.get(site)) is None:
                return function(site, x) if site in chosen else x
            x = x[..., len(self.ids) :, :]  # what is held of a window's tokens does not hang on the prefix's
            new = function(site, x) if site in chosen else None
            return torch.cat([own.to(x).expand(len(x), -1, -1, -1), x if new is None else new], -2)

        return hold


def cached(loaded: LoadedModel) -> tuple[str, ...]:
    """The sites of a model that a prefix is kept at."""
    return hooks.sites_of(loaded, *CACHED)


def keep(loaded: LoadedModel, ids: Tensor, *, r4: bool, blocks: tuple[int | None, int | None]) -> Prefix:
    """The keys and values of a prefix of `ids` (tokens,) in a model of which nothing is quantized, R4 acting
    or not. ValueError: experts, whose tokens are not told apart."""
    require_no_experts(loaded)
    found: dict[str, Tensor] = {}

    def note(site: str, x: Tensor) -> None:
        found[site] = x[0].detach().clone()

    with online(loaded, r4=r4, blocks=blocks, function=note, sites=cached(loaded)):
        stream.through(loaded, [ids[None]])
    keys = {site: x for site, x in found.items() if site.endswith(".k")}
    return Prefix(ids, keys, {site: x for site, x in found.items() if site not in keys})
