"""The residual stream, layer by layer: how large its massive values are (Sun et al., arXiv 2402.17762, Fig. 1
to 4), and what a model does without them (Sec. 3.3): by rule `sun` those > 100 and >= 1000 x the median."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import hooks, loading
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.public import public
from dfrot_lab.model.stream import through
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import token_blocks
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import CaptureSpec

TOP = 3
See = Callable[[int, Tensor], Tensor | None]  # a layer's number, its input -> a new one, or None to leave it


@contextmanager
def before_layers(loaded: LoadedModel, function: See) -> Iterator[None]:
    """While the block runs, `function` sees, and may replace, what enters every layer."""
    sites = {site: int(site.split(".")[1]) for site in hooks.sites_of(loaded, "residual")}
    with hooks.at_sites(loaded, lambda site, x: function(sites[site], x), sites):
        yield


@torch.inference_mode()
def streams(loaded: LoadedModel, ids: Tensor) -> list[Tensor]:
    """The residual stream before each layer (tokens, channels) for one window of token ids (window,)."""
    seen: list[Tensor] = []
    with before_layers(loaded, lambda _layer, x: seen.append(x[0].to("cpu", copy=True))):
        through(loaded, [ids[None]])
    return seen


def profile(x: Tensor) -> dict[str, float]:
    """The TOP largest |values| of a residual stream (tokens, channels), `top 1` first, and their `median`."""
    magnitude = x.abs().flatten()
    largest = magnitude.topk(min(TOP, len(magnitude))).values.tolist()
    return {f"top {n}": value for n, value in enumerate(largest, 1)} | {"median": float(magnitude.median())}


def residual_profile(spec: CaptureSpec, store: Store | None = None) -> pd.DataFrame:
    """The largest three |values| and the median before each layer: model, corpus, layer, metric, value."""
    loaded, lines, said = loading.load_model(spec.model, store), [], public(spec)
    for layer, x in enumerate(streams(loaded, token_blocks(spec, loaded)[0])):
        lines += [(said.model.source, said.corpus.name, layer, *metric) for metric in profile(x).items()]
    return pd.DataFrame(lines, columns=["model", "corpus", "layer", "metric", "value"])


def magnitudes(spec: CaptureSpec, layer: int, tokens: int = 32, store: Store | None = None) -> pd.DataFrame:
    """|residual stream| before one layer of a capture's first tokens: token, channel, magnitude, text."""
    loaded = loading.load_model(spec.model, store)
    ids = token_blocks(spec, loaded)[0]
    x = streams(loaded, ids)[layer][:tokens].abs().float()
    index = pd.MultiIndex.from_product([range(len(x)), range(x.shape[1])], names=["token", "channel"])
    table = pd.DataFrame({"magnitude": x.flatten().numpy()}, index=index).reset_index()
    texts = [loaded.tokenizer.decode([i]) for i in ids[:tokens].tolist()]
    return table.assign(text=table["token"].map(dict(enumerate(texts))))


def massive_mask(x: Tensor) -> Tensor:
    """Which values of a residual stream `x` (..., tokens, channels) are massive by rule `sun`, as a mask."""
    magnitude = x.abs()
    return (magnitude > massive.SUN_ABSOLUTE) & (magnitude >= massive.SUN_RATIO * magnitude.median())


@torch.inference_mode()
def mean_massive(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Mean massive value before each layer in each channel (layers, channels) over ids (windows, window)."""
    total = torch.zeros(len(loaded.layers), loaded.channels, dtype=torch.float64)
    count = torch.zeros_like(total)

    def add(layer: int, x: Tensor) -> None:
        mask = massive_mask(x)
        total[layer] += torch.where(mask, x, 0).double().sum((0, 1)).cpu()
        count[layer] += mask.sum((0, 1)).cpu()

    with before_layers(loaded, add):
        through(loaded, ids.split(1))
    return total / count.clamp(min=1)


@contextmanager
def massive_set(loaded: LoadedModel, to: str, ids: Tensor) -> Iterator[None]:
    """While the block runs, massive values are 0 (`to` = zero) or their mean over `ids` (windows, window)."""
    value = torch.zeros(len(loaded.layers), loaded.channels) if to == "zero" else mean_massive(loaded, ids)
    with before_layers(loaded, lambda layer, x: torch.where(massive_mask(x), value[layer].to(x), x)):
        yield


REMOVED = ("zero", "mean of the others", "zero after the norm")
"""What may become of massive values: 0, as in `massive_set`, or the mean of their channel over the window's
other tokens: then the norm makes the rest of the row longer. Or the stream is left alone, and what reads
the norms has 0 there: then the rest of the row stays as short as it was."""


@contextmanager
def massive_removed(loaded: LoadedModel, how: str) -> Iterator[None]:
    """While the block runs, massive values before every layer are removed in one of the ways REMOVED.
    ValueError: another one."""
    require("how", repr(how), how in REMOVED, f"one of {', '.join(REMOVED)}")
    if how == "zero after the norm":
        with _hidden_after_norms(loaded):
            yield
        return
    zero = how == "zero"
    with before_layers(loaded, lambda _, x: torch.where(massive_mask(x), 0 if zero else _others(x), x)):
        yield


def _others(x: Tensor) -> Tensor:
    """Each channel's mean over the tokens of x (windows, tokens, channels) with no massive value in it."""
    mask = massive_mask(x)
    count = (~mask).sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask, 0, x).sum(1, keepdim=True) / count


@contextmanager
def _hidden_after_norms(loaded: LoadedModel) -> Iterator[None]:
    """While the block runs, a norm's output is 0 where what it reads is massive."""
    masks: dict[str, Tensor] = {}

    def hide(site: str, x: Tensor) -> Tensor | None:
        if site.endswith("_in"):
            masks[site.removesuffix("_in")] = massive_mask(x)
            return None
        return torch.where(masks.pop(site), 0, x)

    with hooks.at_sites(loaded, hide, hooks.sites_of(loaded, *hooks.NORM_INPUTS, *hooks.NORMS)):
        yield
