"""Where a value of the residual stream comes from, and who reads it. A token's stream x before a layer is
what was embedded plus all that the layers before have added: each attention head's part of o_proj, each MLP's
down_proj. So along any direction d the parts d . (what a writer adds) sum to d . x. A neuron's gate is such a
value, too: its row of gate_proj, over the norm's length, is the direction. Sums are in float64. What comes
after a token does not change its stream, and is not run."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from dfrot_lab.model import surgery
from dfrot_lab.model.experts import Mixture
from dfrot_lab.model.families import heads_of
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.observe.inside import Seen, walked
from dfrot_lab.recipe.base import require

EMBEDDING, ATTENTION, MLP = "embedding", "attention", "mlp"
WRITERS = ("residual", "o_proj_in", "post_attention_norm", "down_proj_in")
Line = dict[str, Any]


class _Mlp(NamedTuple):
    """An MLP that a token passes: its name before its linears' (empty: a layer's only one), how much of it is
    added, and what its down_proj reads of that token (inputs,) float64."""

    name: str
    weight: float
    gated: Tensor


def require_plain(loaded: LoadedModel) -> None:
    """Refuse a model whose norms are not fused, or whose layers norm what they add; ValueError."""
    plain = not loaded.roles.online
    require("the model", loaded.family, plain, "one whose layers add what o_proj and down_proj give, no norm")
    fused = surgery.norms_are_fused(loaded)
    require("the model's norms", "norms with gains", fused, "fused (surgery.prepare) before values are split")


def one_hot(channel: int, channels: int) -> Tensor:
    """The direction (channels,) of one channel."""
    require("channel", channel, 0 <= channel < channels, f"from 0 to {channels - 1}")
    return torch.nn.functional.one_hot(torch.tensor(channel), channels).double()


def writes(
    loaded: LoadedModel, ids: Tensor, token: int, direction: Tensor, before: int | None = None
) -> pd.DataFrame:
    """What each writer adds to a token's stream along `direction` (channels,): a row a writer with its
    `layer` (-1: the embedding), `writer`, `head` (missing: the MLP, a bias), `value`. Their sum is the value
    before layer `before`, by default after the last. ValueError: a model that is not `require_plain`."""
    require_plain(loaded)
    require("token", token, 0 <= token < len(ids), f"from 0 to {len(ids) - 1}")
    last = len(loaded.layers) if before is None else before
    require("before", last, 0 < last <= len(loaded.layers), f"from 1 to {len(loaded.layers)}")
    lines: list[Line] = []
    for number, seen in walked(loaded, ids[: token + 1], *WRITERS, layers=range(last)):
        if number == 0:
            value = float(seen["residual"][token].double() @ direction.to(seen["residual"].device))
            lines.append({"layer": -1, "writer": EMBEDDING, "head": None, "value": value})
        lines += _added(loaded, number, seen, token, direction)
    return pd.DataFrame(lines).astype({"head": "Int64"})


def _added(loaded: LoadedModel, number: int, seen: Seen, token: int, direction: Tensor) -> Iterator[Line]:
    """What a layer's heads, o_proj's bias and MLPs add to a token along a direction, a line a writer."""
    layer, scale = loaded.layers[number], float(getattr(loaded.config, "residual_multiplier", 1.0))
    o, row = linear(layer, loaded.roles.o), seen["o_proj_in"][token].double()
    parts = _along(o, direction) * row
    for head, own in enumerate(parts.view(heads_of(loaded.config)[0], -1).sum(1).tolist()):
        yield {"layer": number, "writer": ATTENTION, "head": head, "value": scale * own}
    if o.bias is not None:
        yield {"layer": number, "writer": ATTENTION, "head": None, "value": scale * _bias(o, direction)}
    total = 0.0
    for mlp in _mlps(loaded, number, seen, token):
        down = linear(layer, _linears(loaded, mlp.name)[-1])
        total += mlp.weight * (float(_along(down, direction) @ mlp.gated) + _bias(down, direction))
    yield {"layer": number, "writer": MLP, "head": None, "value": scale * total}


def _along(writer: nn.Linear, direction: Tensor) -> Tensor:
    """What each input of a linear adds along a direction (inputs,) float64."""
    return direction.to(writer.weight.device) @ writer.weight.double()


def _bias(writer: nn.Linear, direction: Tensor) -> float:
    return 0.0 if writer.bias is None else float(writer.bias.double() @ direction.to(writer.bias.device))


def _linears(loaded: LoadedModel, mlp: str) -> tuple[str, ...]:
    """An MLP's linears by name, down_proj last; of a mixture's MLP `mlp`, or of the only one (empty)."""
    own = (*loaded.roles.feeds[1][2], loaded.roles.down)
    inner = f"{loaded.roles.experts}.{mlp}"
    return tuple(inner + name.removeprefix(loaded.roles.experts) for name in own) if mlp else own


def _mlps(loaded: LoadedModel, number: int, seen: Seen, token: int) -> Iterator[_Mlp]:
    """The MLPs that a token passes in a layer: one, or the experts that its router chose, the shared one."""
    block = loaded.layers[number].get_submodule(loaded.roles.experts) if loaded.roles.experts else None
    if not isinstance(block, Mixture):
        yield _Mlp("", 1.0, seen["down_proj_in"][token].double())
        return
    row = seen["post_attention_norm"][token][None]
    _, weights, chosen = block.gate(row)
    for name, weight in zip(chosen[0].tolist(), weights[0].tolist(), strict=True):
        yield _Mlp(f"experts.{name}", weight, _gated(block.experts[name], row))
    if block.shares:
        share = float(block.shared_expert_gate(row).sigmoid())
        yield _Mlp("shared_expert", share, _gated(block.shared_expert, row))


def _gated(mlp: Any, row: Tensor) -> Tensor:
    return (mlp.act_fn(mlp.gate_proj(row)) * mlp.up_proj(row))[0].double()


def neurons(
    loaded: LoadedModel, ids: Tensor, token: int, channel: int, layer: int, top: int = 8
) -> pd.DataFrame:
    """The `top` neurons of a layer's MLP by what they add to a token's channel: `mlp` (which expert; empty:
    the only one), `neuron`, `value` (down x gated), `share` of all that the MLP adds; `gate` and `up` (what
    its rows of gate_proj and up_proj give; an MLP without a gate: `up` is 1), `gated`, `down` (its weight to
    the channel); `gate_usual` and `up_usual`, the other tokens' median |value|. ValueError: see `writes`."""
    require_plain(loaded)
    direction, lines = one_hot(channel, loaded.channels), list[Line]()
    kinds = ("post_attention_norm", "down_proj_in")
    for _, seen in walked(loaded, ids, *kinds, layers=[layer]):
        rows = seen["post_attention_norm"].double()
        for mlp in _mlps(loaded, layer, seen, token):
            *readers, down = (linear(loaded.layers[layer], name) for name in _linears(loaded, mlp.name))
            weight = mlp.weight * _along(down, direction)
            value = weight * mlp.gated
            for neuron in value.abs().topk(min(top, len(value))).indices.tolist():
                gate, up = _pre(readers, neuron, len(value), rows)
                lines.append({"mlp": mlp.name, "neuron": neuron, "value": float(value[neuron])})
                lines[-1] |= {"gate": float(gate[token]), "up": float(up[token])}
                lines[-1] |= {"gated": float(mlp.gated[neuron]), "down": float(weight[neuron])}
                lines[-1] |= {"gate_usual": _usual(gate, token), "up_usual": _usual(up, token)}
                lines[-1]["share"] = float(value[neuron] / value.sum())
    table = pd.DataFrame(lines).sort_values("value", key=abs, ascending=False, ignore_index=True)
    return table.head(top)


def _row_of(readers: list[nn.Linear], neuron: int, width: int, part: int) -> tuple[Tensor, Tensor | float]:
    """The weights (channels,) and the bias of a neuron's gate (part 0) or up (1), from linears of their own
    or one for both."""
    place = neuron + (width * part if len(readers) == 1 else 0)
    one = readers[part if len(readers) > 1 else 0]
    return one.weight[place].double(), 0.0 if one.bias is None else one.bias[place].double()


def _is_gated(readers: list[nn.Linear], width: int) -> bool:
    return len(readers) > 1 or readers[0].weight.shape[0] == 2 * width


def has_gate(loaded: LoadedModel) -> bool:
    """Whether `behind` can tell a neuron's gate from its up: one MLP in each layer, and a gate in it."""
    if loaded.roles.experts:
        return False
    *readers, down = (linear(loaded.layers[0], name) for name in _linears(loaded, ""))
    return _is_gated(readers, down.weight.shape[1])


def _pre(readers: list[nn.Linear], neuron: int, width: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A neuron's gate and up of all rows (tokens,), before the activation function."""
    parts = (0, 1) if _is_gated(readers, width) else (0,)
    found = [rows @ weight + bias for weight, bias in (_row_of(readers, neuron, width, p) for p in parts)]
    return found[0], found[1] if len(found) > 1 else torch.ones_like(found[0])


def _usual(values: Tensor, token: int) -> float:
    others = torch.cat([values[:token], values[token + 1 :]]).abs()
    return float(others.median()) if len(others) else float("nan")


def behind(loaded: LoadedModel, ids: Tensor, token: int, layer: int, neuron: int, part: str) -> pd.DataFrame:
    """What makes a neuron fire: `writes` along the direction that its `gate` or `up` reads of a token's
    stream before its MLP, the layer's own attention with it: they sum to the value, a bias aside. ValueError:
    experts, an MLP without a gate, see `writes`."""
    require_plain(loaded)
    require("the model", loaded.family, has_gate(loaded), "one with a gate in its MLP, and without experts")
    require("part", repr(part), part in ("gate", "up"), "gate or up")
    kinds = ("post_attention_norm", "post_attention_norm_in")
    direction = torch.zeros(loaded.channels)
    for _, seen in walked(loaded, ids[: token + 1], *kinds, layers=[layer]):
        *readers, down = (linear(loaded.layers[layer], name) for name in _linears(loaded, ""))
        weight, _ = _row_of(readers, neuron, down.weight.shape[1], ("gate", "up").index(part))
        after, x = (seen[kind][token].double() for kind in kinds)
        direction = weight * (after @ x / (x @ x))
    table = writes(loaded, ids, token, direction, layer + 1)
    return table[(table["layer"] < layer) | (table["writer"] == ATTENTION)].reset_index(drop=True)


def reads(loaded: LoadedModel, ids: Tensor, token: int, channel: int) -> pd.DataFrame:
    """How much of what each linear behind a norm gives for a token is made of one channel: `layer`, `linear`,
    `input` (the channel's share of the row's squared length), `share`, y . y_c / |y|^2, with y the output, a
    bias aside, and y_c what the channel gives of it: over all channels these sum to 1; `size`, |y_c| / |y|,
    above 1 where the others take it back. Of experts, those of the token. ValueError: see `writes`."""
    require_plain(loaded)
    one_hot(channel, loaded.channels)
    lines: list[Line] = []
    kinds = ("input_norm", "post_attention_norm", "down_proj_in")
    for number, seen in walked(loaded, ids[: token + 1], *kinds):
        names = {"input_norm": list(loaded.roles.feeds[0][2]), "post_attention_norm": list[str]()}
        for mlp in _mlps(loaded, number, seen, token):
            names["post_attention_norm"] += _linears(loaded, mlp.name)[:-1]
        for site, own in names.items():
            x = seen[site][token].double()
            for name in own:
                weight = linear(loaded.layers[number], name).weight.double()
                y, y_c = weight @ x, weight[:, channel] * x[channel]
                short = name.removeprefix(f"{loaded.roles.experts}.") if loaded.roles.experts else name
                about = {"layer": number, "linear": short.removeprefix("self_attn.").removeprefix("mlp.")}
                about |= {"input": float(x[channel] ** 2 / (x @ x)), "share": float(y @ y_c / (y @ y))}
                lines.append(about | {"size": float(y_c.norm() / y.norm())})
    return pd.DataFrame(lines)
