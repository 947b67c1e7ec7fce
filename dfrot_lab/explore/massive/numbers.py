"""One text's residual stream, layer by layer: pooled cells, marked tokens, tables, sentences."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.explore.page import number
from dfrot_lab.model import corpus
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import massive, residual
from dfrot_lab.recipe.specs import ROW_RULES, WINDOW, CorpusSpec
from dfrot_lab.show import theme

CELLS, COLUMNS = 49152, 192  # of the heat map at most: of 256 tokens, 576 channels, three channels a cell
FLOOR = 0.01  # values below this have one colour: the scale is logarithmic
CODES = 65535  # a cell of the film is one of so many even steps of log10 |x|
Step = Callable[[int], None]


@dataclass(frozen=True)
class Look:
    """A text as the model sees it: token texts, the stream x (tokens, channels) float32 before each layer,
    how many tokens it has in all. `profile`, a row a layer: layer, top 1, top 2, top 3 (of |x|), median."""

    texts: list[str]
    streams: list[Tensor]
    profile: pd.DataFrame
    eps: float
    whole: int
    masks: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def median(self, layer: int) -> float:
        """Median |x| before a layer."""
        return max(float(self.profile["median"].iloc[layer]), 1e-30)


def look(loaded: LoadedModel, ids: Tensor, whole: int = 0, step: Step = lambda _layer: None) -> Look:
    """One forward pass of ids (tokens,); `step` is called before each layer. ValueError for NaN or Inf."""
    with residual.before_layers(loaded, lambda layer, _x: step(layer)):
        streams = residual.streams(loaded, ids)
    profile = []
    for layer, x in enumerate(streams):
        if not torch.isfinite(x).all():
            found = f"activations must be finite; got NaN or Inf before layer {layer}"
            raise ValueError(f"{found}. The model is broken, or its dtype too small.")
        profile.append({"layer": layer, **residual.profile(x.float())})
    texts = [loaded.tokenizer.decode([i]) for i in ids.tolist()]
    eps = float(getattr(loaded.model.config, "rms_norm_eps", 0.0))
    return Look(texts, [x.float() for x in streams], pd.DataFrame(profile), eps, whole or len(texts))


def typed_ids(loaded: LoadedModel, text: str, most: int) -> tuple[Tensor, int]:
    """The first `most` token ids of a typed text, and how many it has; ValueError for a text of none."""
    ids = torch.tensor(loaded.tokenizer(text, verbose=False).input_ids, dtype=torch.int64)
    if not text or not len(ids):
        raise ValueError("the text must hold at least one token; got an empty text")
    return ids[: min(most, loaded.context)], len(ids)


def block_ids(loaded: LoadedModel, spec: CorpusSpec, block: int, most: int) -> tuple[Tensor, int]:
    """The first `most` token ids of a corpus block (whole windows, from 0), and how many the block has."""
    window = min(WINDOW, loaded.context)
    return corpus.token_blocks(spec, loaded.tokenizer, blocks=block + 1, window=window)[block][:most], window


def marks(seen: Look, layer: int, rule: str) -> Tensor:
    """Mask (tokens,) of what `rule` calls massive, kept; rules of rows see normalised ones (no gain)."""
    if (layer, rule) not in seen.masks:
        x = seen.streams[layer]
        rows = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=seen.eps)
        largest, median = x.abs().amax(1)[None], torch.tensor([seen.median(layer)])
        by_rows = rule in ROW_RULES
        mask = massive.rows_rule(rows, rule) if by_rows else massive.residual_rule(largest, median, rule)[0]
        seen.masks[layer, rule] = mask
    return seen.masks[layer, rule]


def rule_words(rule: str, channels: int) -> str:
    """A rule's threshold in words, for a model of so many channels."""
    if rule == "sun":
        least = f"|x| > {massive.SUN_ABSOLUTE:g} and at least {massive.SUN_RATIO:,.0f}"
        return f"{least} \u00d7 the median |x| of the layer (Sun et al.)"
    if rule == "ro_vs_nr":
        return "the row's symmetric 4-bit error is no smaller under RO than unrotated (DFRot's, for Mistral)"
    limit = massive.threshold(rule)
    if rule in ROW_RULES:
        root = limit * math.sqrt(channels / massive.NR_ERROR_CHANNELS)
        return f"root error of the row, unrotated, symmetric 4-bit, below {root:.3g} ({limit:g} at C = 4096)"
    return f"the token's largest |x| > {limit:g} \u00d7 the median of all tokens' largest"


def pooled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of at most CELLS cells (tokens, columns) the value of largest |x|, and the channel it sits in."""
    tokens, channels = x.shape
    first, size = torch.from_numpy(starts(tokens, channels)).long(), per_column(tokens, channels)
    padded = torch.nn.functional.pad(x, (0, len(first) * size - channels)).view(tokens, -1, size)
    place = padded.abs().argmax(2, keepdim=True)
    return padded.gather(2, place)[..., 0], (place[..., 0] + first).clamp_(max=channels - 1)


def per_column(tokens: int, channels: int) -> int:
    """How many channels are pooled in a column, so that there are at most CELLS cells."""
    return math.ceil(channels / max(1, min(COLUMNS, channels, CELLS // tokens)))


def starts(tokens: int, channels: int) -> np.ndarray:
    """The first channel of each pooled column (columns,)."""
    return np.arange(0, channels, per_column(tokens, channels), dtype=np.float32)


def cells(seen: Look, layer: int) -> np.ndarray:
    """What is drawn of a layer (columns, tokens, 3) float32: value (signed), channel, ratio to median."""
    value, channel = pooled(seen.streams[layer])
    ratio = value.abs() / seen.median(layer)
    return np.stack([x.T.float().numpy() for x in (value, channel, ratio)], axis=-1)


def ends(seen: Look) -> tuple[int, int]:
    """The powers of ten between which a text's |x| has colours, in all layers."""
    return round(math.log10(FLOOR)), math.ceil(math.log10(max(seen.profile["top 1"].max(), 1)))


def frames(seen: Look) -> np.ndarray:
    """The cells of all layers (layers, columns, tokens) uint16: where log10 |x| lies between `ends`."""
    low, high = ends(seen)
    power = torch.stack([pooled(x)[0].T.abs().clamp(min=FLOOR).log10() for x in seen.streams])
    return ((power - low) / (high - low) * CODES).round().numpy().astype(np.uint16)


def token_table(seen: Look, layer: int, rule: str) -> pd.DataFrame:
    """Every token at a layer, largest first: token, text, channel, value (signed), ratio, massive."""
    table = _largest_first(seen, layer, 1)
    return table.assign(massive=marks(seen, layer, rule).numpy()[table["token"]])


def channel_table(seen: Look, layer: int) -> pd.DataFrame:
    """Every channel at a layer, largest first: channel, value (signed), ratio, its token and text."""
    return _largest_first(seen, layer, 0)[["channel", "value", "ratio", "token", "text"]]


def _largest_first(seen: Look, layer: int, across: int) -> pd.DataFrame:
    """A layer's largest |x| of each token (across: 1) or channel (0): token, text, channel, value, ratio."""
    largest = seen.streams[layer].abs().argmax(across).numpy()
    every = np.arange(len(largest))
    token, channel = (every, largest) if across else (largest, every)
    value = seen.streams[layer][token, channel].numpy()
    place = {"token": token, "text": [seen.texts[i] for i in token], "channel": channel}
    table = pd.DataFrame({**place, "value": value, "ratio": np.abs(value) / seen.median(layer)})
    return table.sort_values("ratio", ascending=False, kind="stable", ignore_index=True)


def sentence(table: pd.DataFrame, layer: int, rule: str, picked: int = -1) -> str:
    """What there is to see in a `token_table`, as HTML: the largest marked token, or the largest of all; and
    the one that is picked, where it is another."""
    marked = table[table["massive"]]
    token = (marked if len(marked) else table).iloc[0]
    others = table[(table["token"] == picked) & (picked != token["token"])].to_dict("records")
    more = "".join(f"<br>T{_reaches(other, layer)}" for other in others)
    if not len(marked):
        return f"No token is massive here by rule {rule}. The largest, t{_reaches(token, layer)}{more}"
    return f"<b>T{_reaches(token, layer)}</b> Rule {rule} marks {len(marked)} of {len(table)} tokens.{more}"


def _reaches(token: Any, layer: int) -> str:
    where = f"in channel {token['channel']} at layer {layer}: {number(token['ratio'])} \u00d7 the median."
    named = f"oken {token['token']} \u2018{theme.span(token['text'])}\u2019"
    return f"{named} reaches {number(abs(token['value']))} {where}"
