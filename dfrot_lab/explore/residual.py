"""One text's residual stream, layer by layer, in the forms the massive explorer shows: pooled cells, marked
tokens, tables, sentences, figures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dfrot_lab.model import corpus
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import intervene, massive, residual
from dfrot_lab.recipe.specs import WINDOW, CorpusSpec
from dfrot_lab.show import figures

from . import base
from .parts import number

CELLS, COLUMNS = 49152, 192
"""Cells of the heat map at most, and columns of channels at most: at 256 tokens and 576 channels a cell is
the largest of three channels.
"""
TOP = residual.TOP
TINY = 1e-30
FLOOR = 0.01
"""Values below this have one colour: the scale is logarithmic."""
LINES = (
    ("top 1", base.MASSIVE_COLOUR, "solid"),
    ("top 2", "#E69F00", "dash"),
    ("top 3", "#56B4E9", "dashdot"),
    ("median", "#009E73", "dot"),
)
"""Column of a profile, its colour and its dash."""


@dataclass(frozen=True)
class Layer:
    """The residual stream before one layer, x (tokens, channels) float32, and what is read from it once.

    largest, channel (tokens,): each token's largest |x| and where; median |x| of all; top: the largest three
    |x|.
    """

    x: Tensor
    largest: Tensor
    channel: Tensor
    median: float
    top: tuple[float, ...]


@dataclass(frozen=True)
class Look:
    """A text as the model sees it: token texts and the stream before each layer; `whole` is how many tokens
    the text has in all.
    """

    texts: list[str]
    layers: list[Layer]
    eps: float
    whole: int
    _masks: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def marked(self, layer: int, rule: str) -> Tensor:
        """Mask (tokens,) of the tokens `rule` calls massive before a layer; computed once."""
        if (layer, rule) not in self._masks:
            self._masks[layer, rule] = marks(self.layers[layer], rule, self.eps)
        return self._masks[layer, rule]


def layer_of(x: Tensor) -> Layer:
    """A Layer from the stream before it (tokens, channels)."""
    x = x.float()
    magnitude = x.abs()
    largest, channel = magnitude.max(1)
    flat = magnitude.flatten()
    return Layer(
        x, largest, channel, float(flat.median()), tuple(flat.topk(min(TOP, len(flat))).values.tolist())
    )


def look(
    loaded: LoadedModel,
    ids: Tensor,
    whole: int | None = None,
    step: Callable[[int], None] = lambda _layer: None,
) -> Look:
    """One forward pass of token ids (tokens,). `step` is called before each layer and may raise to stop the
    pass; ValueError for NaN or Inf.
    """
    with intervene.before_layers(loaded, lambda layer, _x: step(layer)):
        streams = residual.streams(loaded, ids)
    broken = next((i for i, x in enumerate(streams) if not torch.isfinite(x).all()), None)
    if broken is not None:
        raise ValueError(
            f"activations must be finite; got NaN or Inf before layer {broken}. The model is broken, or its dtype too small."
        )
    texts = [loaded.tokenizer.decode([i]) for i in ids.tolist()]
    eps = float(getattr(loaded.model.config, "rms_norm_eps", 0.0))
    return Look(texts, [layer_of(x) for x in streams], eps, whole or len(texts))


def typed_ids(loaded: LoadedModel, text: str, most: int) -> tuple[Tensor, int]:
    """The first `most` token ids of a typed text, and how many it has; ValueError for a text of none."""
    ids = torch.tensor(loaded.tokenizer(text, verbose=False).input_ids, dtype=torch.int64)
    if not text or not len(ids):
        raise ValueError("the text must hold at least one token; got an empty text")
    return ids[: min(most, loaded.context)], len(ids)


def block_ids(loaded: LoadedModel, spec: CorpusSpec, block: int, most: int) -> tuple[Tensor, int]:
    """The first `most` token ids of a corpus block (whole windows, from 0), and how many the block has;
    ValueError for a block that is not there.
    """
    window = min(WINDOW, loaded.context)
    ids = corpus.token_blocks(spec, loaded.tokenizer, blocks=block + 1, window=window)[block]
    return ids[:most], window


def marks(layer: Layer, rule: str, eps: float = 0.0) -> Tensor:
    """Mask (tokens,) by one of the four rules: sun and ratio on the stream, the other two on its rows over
    their root mean square (no gain).
    """
    if rule in massive.ROWS_RULES:
        return massive.rows_rule(torch.nn.functional.rms_norm(layer.x, layer.x.shape[-1:], eps=eps), rule)
    return massive.residual_rule(layer.largest[None], torch.tensor([layer.median]), rule)[0]


def rule_words(rule: str, channels: int) -> str:
    """A rule's threshold in words, for a model of so many channels."""
    root = massive.NR_ERROR_ROOT * math.sqrt(channels / massive.NR_ERROR_CHANNELS)
    return {
        "sun": f"|x| > {massive.SUN_ABSOLUTE:g} and at least {massive.SUN_RATIO:,.0f} \u00d7 the median |x| of the layer (Sun et al.)",
        "nr_error": f"root error of the normalised row, unrotated, symmetric 4-bit, below {root:.3g} (8.5 at 4096 channels; DFRot's code)",
        "ro_vs_nr": "the normalised row's symmetric 4-bit error is no smaller under RO than unrotated (DFRot's code, for Mistral)",
        "ratio": f"the token's largest |x| > {massive.PREFIX_RATIO:g} \u00d7 the median of all tokens' largest (PrefixQuant)",
    }[rule]


def pooled(x: Tensor) -> tuple[Tensor, Tensor]:
    """The stream (tokens, channels) as at most CELLS cells: the value of largest |x| among neighbouring
    channels, and the channel it sits in.

    Tokens are never pooled, so that each cell has one token. Both (tokens, columns).
    """
    tokens, channels = x.shape
    size = _pool(tokens, channels)
    columns = math.ceil(channels / size)
    padded = torch.nn.functional.pad(x, (0, columns * size - channels)).view(tokens, columns, size)
    place = padded.abs().argmax(2, keepdim=True)
    channel = place[..., 0] + torch.arange(columns) * size
    return padded.gather(2, place)[..., 0], channel.clamp_(max=channels - 1)


def _pool(tokens: int, channels: int) -> int:
    """Channels pooled to one cell."""
    return math.ceil(channels / max(1, min(COLUMNS, channels, CELLS // tokens)))


def starts(tokens: int, channels: int) -> np.ndarray:
    """The first channel of each pooled column (columns,)."""
    return np.arange(0, channels, _pool(tokens, channels), dtype=np.float32)


def token_table(seen: Look, layer: int, rule: str) -> pd.DataFrame:
    """Every token at a layer, largest first: token, text, channel, value (signed), ratio (|value| to the
    median), massive (by `rule`).
    """
    here = seen.layers[layer]
    value = here.x.gather(1, here.channel[:, None])[:, 0]
    columns = {
        "channel": here.channel.numpy(),
        "value": value.numpy(),
        "ratio": here.largest.numpy() / max(here.median, TINY),
    }
    table = pd.DataFrame(
        {
            "token": np.arange(len(seen.texts)),
            "text": seen.texts,
            **columns,
            "massive": seen.marked(layer, rule).numpy(),
        }
    )
    return table.sort_values("ratio", ascending=False, kind="stable", ignore_index=True)


def channel_table(seen: Look, layer: int) -> pd.DataFrame:
    """Every channel at a layer, largest first: channel, value (signed), ratio, and the token and text it is
    largest at.
    """
    here = seen.layers[layer]
    magnitude, token = here.x.abs().max(0)
    value = here.x.gather(0, token[None])[0]
    columns = {
        "channel": np.arange(len(value)),
        "value": value.numpy(),
        "ratio": magnitude.numpy() / max(here.median, TINY),
        "token": token.numpy(),
    }
    table = pd.DataFrame(columns).assign(text=[seen.texts[i] for i in token.tolist()])
    return table.sort_values("ratio", ascending=False, kind="stable", ignore_index=True)


def profile(seen: Look) -> pd.DataFrame:
    """The largest three |x| and the median before each layer: layer, top 1, top 2, top 3, median."""
    rows = [
        {"layer": i, **{f"top {n + 1}": v for n, v in enumerate(here.top)}, "median": here.median}
        for i, here in enumerate(seen.layers)
    ]
    return pd.DataFrame(rows)


def sentence(table: pd.DataFrame, layer: int, rule: str) -> str:
    """What is there to see at a layer, as HTML: the largest of the marked tokens, or the largest of all.
    `table` is a `token_table`.
    """
    marked = table[table["massive"]]
    token = (marked if len(marked) else table).iloc[0]
    what = (
        f"oken {token['token']} \u2018{base.span(token['text'])}\u2019 reaches {number(abs(token['value']))} in channel {token['channel']} "
        f"at layer {layer}: {number(token['ratio'])} \u00d7 the median."
    )
    if not len(marked):
        return f"No token is massive here by rule {rule}. The largest, t{what}"
    others = f" Rule {rule} marks {len(marked)} of {len(table)} tokens."
    return f"<b>T{what}</b>{others}"


def text_spans(seen: Look, layer: int, rule: str) -> str:
    """The text itself as HTML, one span a token, those the rule marks in colour with their value as tooltip."""
    here, marked = seen.layers[layer], seen.marked(layer, rule).tolist()
    spans = []
    for i, text in enumerate(seen.texts):
        title = (
            f"token {i}, channel {int(here.channel[i])}: {number(float(here.largest[i]))}"
            if marked[i]
            else f"token {i}"
        )
        spans.append(
            base.span(text, base.MASSIVE_COLOUR if marked[i] else None, title)
            + ("<br>" if "\n" in text else "<wbr>")
        )
    return f'<div class="dfrot-text" style="line-height:1.5;overflow-wrap:anywhere">{"".join(spans)}</div>'


def static(seen: Look, layer: int, rule: str) -> Figure:
    """The same view as a matplotlib figure: log10 |x| over tokens and channels with the marked tokens, and
    the profile by layer.
    """
    with figures.theme():
        fig = Figure(figsize=(11, 4), layout="constrained")
        left, right = fig.subplots(1, 2, width_ratios=(2, 1))
        here, channels = seen.layers[layer], seen.layers[layer].x.shape[1]
        cells = pooled(here.x)[0].abs().clamp(min=FLOOR).log10().T
        image = left.imshow(
            cells.numpy(),
            aspect="auto",
            cmap="cividis",
            extent=(-0.5, len(seen.texts) - 0.5, channels - 0.5, -0.5),
        )
        left.grid(visible=False)
        left.set(xlabel="token", ylabel="channel", title=f"log10 |residual stream| before layer {layer}")
        marked = seen.marked(layer, rule).nonzero().flatten()
        left.scatter(
            marked,
            here.channel[marked],
            marker="D",
            facecolors="none",
            edgecolors=base.MASSIVE_COLOUR,
            label=f"massive by {rule}",
        )
        left.legend(loc="upper right", fontsize=8)
        fig.colorbar(image, ax=left)
        lines = profile(seen)
        for name, colour, dash in LINES:
            right.plot(
                lines["layer"],
                lines[name],
                c=colour,
                ls={"dash": "dashed", "dot": "dotted"}.get(dash, dash),
                label=name,
            )
        right.axvline(layer, c=base.GREY, lw=1)
        right.set(yscale="log", xlabel="layer", ylabel="|residual stream|")
        right.legend(fontsize=8)
    return fig
