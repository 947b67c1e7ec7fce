"""Why a token is massive, as experiments: where its value comes from and who reads it; what attention does
with the token; whose rounding costs which words. All of the first tokens of one window, and of its most
massive token."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import loading, stream, surgery
from dfrot_lab.model.checkpoint import HEAD
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import attention, residual, writers
from dfrot_lab.observe.capture import capture, token_blocks
from dfrot_lab.observe.inside import walked
from dfrot_lab.score import costs
from dfrot_lab.study.main import named
from dfrot_lab.study.setting import Setting

TOKENS, QUICK_TOKENS = 512, 128  # of a window that are looked at
WORDS, QUICK_WORDS = 64, 16  # of a window, each rounded alone
NEURONS = 8
LEFT = "left alone"
ROTATIONS = ("NR", "RO", "RH")
SHARE, VALUE, LOSS = "sink share", "length of v against the others'", "loss"
WRITTEN, DIVERGENCE = "written", "KL divergence"


class Spot(NamedTuple):
    """The most massive `token` of the first tokens `ids` (tokens,) of a window, its `text`, the `channel`."""

    ids: Tensor
    token: int
    text: str
    channel: int

    @property
    def named(self) -> dict[str, Any]:
        """What a table says of it."""
        return {"tokens": len(self.ids), "token": self.token, "text": self.text, "channel": self.channel}


def opened(setting: Setting, store: Store) -> tuple[LoadedModel, Spot]:
    """The setting's model, norms fused, and the spot to look at: where its stream is largest."""
    recorded, loaded = capture(setting.capture, store), loading.load_model(setting.model, store)
    ids = token_blocks(setting.capture, loaded)[0][: QUICK_TOKENS if setting.quick else TOKENS]
    surgery.prepare(loaded)
    sizes = recorded.residual_max[:, : len(ids) - 1]  # nothing comes after the last token
    site, token = divmod(int(sizes.argmax()), sizes.shape[1])
    return loaded, Spot(ids, token, recorded.texts[token], int(recorded.residual_channel[site, token]))


def attention_sink(setting: Setting, store: Store) -> pd.DataFrame:
    """What later tokens give of their attention to the most massive token, by layer and head, as the model is
    and with its massive values removed in three ways; how long its values are; the window's loss."""
    loaded, spot = opened(setting, store)
    lines: list[dict[str, Any]] = []
    for how in (LEFT, *residual.REMOVED):
        with nullcontext() if how == LEFT else residual.massive_removed(loaded, how):
            shares, hidden = attention.shares(loaded, spot.ids)
        with stream.part(loaded, HEAD), torch.inference_mode():
            lost = float(stream.loss(loaded, hidden, spot.ids))
        lines.append({"massive": how, "metric": LOSS, "value": lost})
        for layer, own in enumerate(shares[:, :, spot.token].tolist()):
            about = {"massive": how, "layer": layer, "metric": SHARE}
            lines += [{**about, "head": head, "value": value} for head, value in enumerate(own)]
    for layer, seen in walked(loaded, spot.ids, "v"):
        length = seen["v"].norm(dim=-1)
        others = torch.cat([length[:, : spot.token], length[:, spot.token + 1 :]], 1).median(1).values
        for head, value in enumerate((length[:, spot.token] / others).tolist()):
            about = {"massive": LEFT, "layer": layer, "metric": VALUE}
            lines.append({**about, "head": head, "value": value})
    return _table(lines, setting, spot)


def spike_writers(setting: Setting, store: Store) -> pd.DataFrame:
    """Who writes the most massive value: each writer's part; of the layer that writes most, which neurons,
    and what makes the first of them fire; how much of what each linear gives is that channel's."""
    loaded, spot = opened(setting, store)
    at = loaded, spot.ids, spot.token
    written = writers.writes(*at, writers.one_hot(spot.channel, loaded.channels))
    lines = list(_parts("writes", written, WRITTEN))
    layer = written_at(written)
    found = writers.neurons(*at, spot.channel, layer, NEURONS)
    for each in found.to_dict("records"):
        about = {"part": "neurons", "layer": layer, "writer": each["mlp"], "neuron": each["neuron"]}
        metrics = [name for name in each if name not in ("mlp", "neuron")]
        lines += [{**about, "metric": name, "value": each[name]} for name in metrics]
    if writers.has_gate(loaded):
        neuron = int(found["neuron"].iloc[0])
        for part in ("gate", "up"):
            lines += _parts(part, writers.behind(*at, layer, neuron, part), WRITTEN, neuron=neuron)
    for each in writers.reads(*at, spot.channel).to_dict("records"):
        about = {"part": "reads", "layer": each["layer"], "writer": each["linear"]}
        lines += [{**about, "metric": name, "value": each[name]} for name in ("input", "share", "size")]
    return _table(lines, setting, spot)


def written_at(written: pd.DataFrame) -> int:
    """The layer whose MLP writes most of a value at its height, of the table of `writers.writes`."""
    height = written.groupby("layer")["value"].sum().cumsum()
    sign = 1 if height.max() > -height.min() else -1
    by_mlp = written[written["writer"] == writers.MLP].set_index("layer")["value"]
    return int((sign * by_mlp).to_numpy().argmax()) + int(by_mlp.index[0])


def _parts(part: str, table: pd.DataFrame, metric: str, **more: Any) -> Iterator[dict[str, Any]]:
    for each in table.to_dict("records"):
        yield {"part": part, "metric": metric, **more, **{str(name): value for name, value in each.items()}}


def _table(lines: list[dict[str, Any]], setting: Setting, spot: Spot) -> pd.DataFrame:
    table = pd.DataFrame(lines).assign(**named(setting), **spot.named)
    return table.astype({name: "Int64" for name in ("layer", "head", "neuron") if name in table})


def token_costs(setting: Setting, store: Store) -> pd.DataFrame:
    """What rounding one token alone, one layer, one kind of site, or all, costs each word: divergence of what
    follows it from full precision, activations at 4 bits, under NR, RO and RH."""
    loaded, spot = opened(setting, store)
    ids = spot.ids[: QUICK_WORDS if setting.quick else WORDS]
    texts = [loaded.tokenizer.decode([i]) for i in ids.tolist()]
    del loaded  # another is built for each rotation
    lines: list[dict[str, Any]] = []
    for kind in setting.few(ROTATIONS):
        recipe = setting.row("16-4-16", setting.rotation(kind), window=len(ids), windows=1)
        found = costs.of_window(recipe, ids, store)
        said = {"rotation": kind, "activations": recipe.activations.name}
        lines += (said | line for way, own in found.items() for line in _costs(way, *own, texts))
    return pd.DataFrame(lines).assign(**named(setting), tokens=len(ids))


def _costs(way: str, names: list[str], values: Tensor, texts: list[str]) -> Iterator[dict[str, Any]]:
    for name, row in zip(names, values.tolist(), strict=True):
        for word, value in enumerate(row):
            said: Mapping[str, Any] = {"rounded": way, "place": name, "word": word, "text": texts[word]}
            yield {**said, "metric": DIVERGENCE, "value": value}


EXPERIMENTS = {
    "spike-writers": ("asked here", "Who writes a massive value, and who reads it?", spike_writers),
    "attention-sink": ("Xiao et al.", "Who looks at the massive token, and without?", attention_sink),
    "token-costs": ("asked here", "Which token's rounding costs which words?", token_costs),
}
"""As in `study.experiments`."""
