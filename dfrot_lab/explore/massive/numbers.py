"""One text's residual stream, layer by layer, in the forms the massive explorer shows: pooled cells, marked
tokens, tables, sentences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.explore.shell.words import number
from dfrot_lab.model import corpus
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import intervene, massive, residual
from dfrot_lab.recipe.specs import WINDOW, CorpusSpec
from dfrot_lab.show.figures import MASSIVE_COLOUR
from dfrot_lab.show.markup import span

CELLS, COLUMNS = 49152, 192
"""Cells of the heat map at most, and columns of channels at most: at 256 tokens and 576 channels a cell is
the largest of three channels.
"""
TINY = 1e-30


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

    @property
    def channels(self) -> int:
        """Width of the stream."""
        return self.layers[0].x.shape[1]

    def marked(self, layer: int, rule: str) -> Tensor:
        """Mask (tokens,) of the tokens `rule` calls massive before a layer; computed once. Rules of rows see
        the stream's rows over their root mean square (no gain).
        """
        if (layer, rule) not in self._masks:
            here = self.layers[layer]
            if rule in massive.ROWS_RULES:
                rows = torch.nn.functional.rms_norm(here.x, here.x.shape[-1:], eps=self.eps)
                mask = massive.rows_rule(rows, rule)
            else:
                mask = massive.residual_rule(here.largest[None], torch.tensor([here.median]), rule)[0]
            self._masks[layer, rule] = mask
        return self._masks[layer, rule]


def layer_of(x: Tensor) -> Layer:
    """A Layer from the stream before it (tokens, channels)."""
    x = x.float()
    magnitude = x.abs()
    largest, channel = magnitude.max(1)
    flat = magnitude.flatten()
    top = flat.topk(min(residual.TOP, len(flat))).values.tolist()
    return Layer(x, largest, channel, float(flat.median()), tuple(top))


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
        found = f"activations must be finite; got NaN or Inf before layer {broken}"
        raise ValueError(f"{found}. The model is broken, or its dtype too small.")
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


def rule_words(rule: str, channels: int) -> str:
    """A rule's threshold in words, for a model of so many channels."""
    root = massive.NR_ERROR_ROOT * math.sqrt(channels / massive.NR_ERROR_CHANNELS)
    return {
        "sun": f"|x| > {massive.SUN_ABSOLUTE:g} and at least {massive.SUN_RATIO:,.0f} \u00d7 the median |x| "
        "of the layer (Sun et al.)",
        "nr_error": f"root error of the normalised row, unrotated, symmetric 4-bit, below {root:.3g} "
        "(8.5 at 4096 channels; DFRot's code)",
        "ro_vs_nr": "the normalised row's symmetric 4-bit error is no smaller under RO than unrotated "
        "(DFRot's code, for Mistral)",
        "ratio": f"the token's largest |x| > {massive.PREFIX_RATIO:g} \u00d7 the median of all tokens' "
        "largest (PrefixQuant)",
    }[rule]


def pooled(x: Tensor) -> tuple[Tensor, Tensor]:
    """The stream (tokens, channels) as at most CELLS cells: the value of largest |x| among neighbouring
    channels, and the channel it sits in. Both (tokens, columns): tokens are never pooled.
    """
    tokens, channels = x.shape
    first = torch.from_numpy(starts(tokens, channels)).long()
    size = _pool(tokens, channels)
    padded = torch.nn.functional.pad(x, (0, len(first) * size - channels)).view(tokens, -1, size)
    place = padded.abs().argmax(2, keepdim=True)
    return padded.gather(2, place)[..., 0], (place[..., 0] + first).clamp_(max=channels - 1)


def _pool(tokens: int, channels: int) -> int:
    """Channels pooled to one cell."""
    return math.ceil(channels / max(1, min(COLUMNS, channels, CELLS // tokens)))


def starts(tokens: int, channels: int) -> np.ndarray:
    """The first channel of each pooled column (columns,)."""
    return np.arange(0, channels, _pool(tokens, channels), dtype=np.float32)


def cells(seen: Look, layer: int) -> np.ndarray:
    """What is drawn of a layer, (columns, tokens, 3) float32: value (signed), its channel, its ratio to the
    median.
    """
    value, channel = pooled(seen.layers[layer].x)
    ratio = value.abs() / max(seen.layers[layer].median, TINY)
    return np.stack([x.T.float().numpy() for x in (value, channel, ratio)], axis=-1)


def _largest_first(seen: Look, layer: int, dim: int) -> pd.DataFrame:
    """Of every token (dim 1) or channel (dim 0) at a layer the largest entry: token, text, channel, value
    (signed), ratio (|value| to the median).
    """
    here = seen.layers[layer]
    magnitude, place = here.x.abs().max(dim)
    own, other = np.arange(len(place)), place.numpy()
    token, channel = (own, other) if dim else (other, own)
    value = here.x[token, channel].numpy()
    columns = {"token": token, "text": [seen.texts[i] for i in token], "channel": channel, "value": value}
    table = pd.DataFrame({**columns, "ratio": magnitude.numpy() / max(here.median, TINY)})
    return table.sort_values("ratio", ascending=False, kind="stable")


def token_table(seen: Look, layer: int, rule: str) -> pd.DataFrame:
    """Every token at a layer, largest first: token, text, channel, value (signed), ratio (|value| to the
    median), massive (by `rule`).
    """
    table = _largest_first(seen, layer, dim=1)
    return table.assign(massive=seen.marked(layer, rule).numpy()[table["token"]]).reset_index(drop=True)


def channel_table(seen: Look, layer: int) -> pd.DataFrame:
    """Every channel at a layer, largest first: channel, value (signed), ratio, and the token and text it is
    largest at.
    """
    table = _largest_first(seen, layer, dim=0).reset_index(drop=True)
    return table[["channel", "value", "ratio", "token", "text"]]


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
    where = f"in channel {token['channel']} at layer {layer}: {number(token['ratio'])} \u00d7 the median."
    named = f"oken {token['token']} \u2018{span(token['text'])}\u2019"
    what = f"{named} reaches {number(abs(token['value']))} {where}"
    if not len(marked):
        return f"No token is massive here by rule {rule}. The largest, t{what}"
    return f"<b>T{what}</b> Rule {rule} marks {len(marked)} of {len(table)} tokens."


def text_spans(seen: Look, layer: int, rule: str) -> str:
    """The text itself as HTML, a span a token, those the rule marks in colour, their value as tooltip."""
    here, spans = seen.layers[layer], []
    for i, (text, marked) in enumerate(zip(seen.texts, seen.marked(layer, rule).tolist(), strict=True)):
        about = f", channel {int(here.channel[i])}: {number(float(here.largest[i]))}" if marked else ""
        spans.append(span(text, MASSIVE_COLOUR if marked else None, f"token {i}{about}"))
        spans.append("<br>" if "\n" in text else "<wbr>")
    return f'<div class="dfrot-text" style="line-height:1.5;overflow-wrap:anywhere">{"".join(spans)}</div>'
