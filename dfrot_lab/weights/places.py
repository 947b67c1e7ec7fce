"""What lies between a linear and the scores of attention. A token's place turns its queries and keys: RoPE of
any kind, or none, and R3 if it acts. That is found on the model itself, by what becomes of the columns of the
identity; norms there are (Qwen3, OLMo 2) are left out of it and counted as their gains."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab.model.families import GAINS, heads_of
from dfrot_lab.model.loading import LoadedModel, linear

PLACES = 256  # whose turns are averaged over at once


def rows(loaded: LoadedModel) -> Tensor:
    """Where q's, then k's, then v's rows lie in their linears put together (all rows,), head by head."""
    heads, kv_heads, size = heads_of(loaded.config)
    every = torch.arange((heads + 2 * kv_heads) * size)
    if loaded.roles.v_rows is None:
        return every
    v = torch.tensor(loaded.roles.v_rows(loaded.config))
    rest = every[~torch.isin(every, v)]
    if v[0] < len(rest):  # head by head its query, its key, its value
        rest = rest.reshape(heads, 2, size).transpose(0, 1).flatten()
    return torch.cat([rest, v])


def gains(loaded: LoadedModel, layer: nn.Module, name: str, heads: int) -> Tensor:
    """What a norm `name` of a layer's attention, if there is one, multiplies the rows of its heads by (heads,
    1, head size)."""
    norm, size = getattr(_attention(loaded, layer), name, None), heads_of(loaded.config)[2]
    if norm is None:
        return torch.ones(heads, 1, size, device=loaded.device)
    own = norm.weight.float() + GAINS[loaded.roles.norm]
    return own.reshape(-1, 1, size).expand(heads, -1, -1)


def turns(loaded: LoadedModel, layer: nn.Module, windows: int, show: Callable[[], Tensor]) -> Tensor:
    """R (tokens, head size, head size) of each place, R q for columns. `show` passes so many `windows` and
    returns the queries (windows, heads, tokens, head size) that attention sees; in place of what their linear
    writes, each head of each window has a column of the identity. Keys pass the same, up to a factor."""
    heads, _, size = heads_of(loaded.config)
    name, where = loaded.roles.feeds[0][2][0], rows(loaded)[: heads * size]
    norm, found = getattr(_attention(loaded, layer), "q_norm", None), list[Tensor]()
    for own in torch.eye(size).split(windows * heads):
        units = torch.zeros(windows, heads, size)
        units.view(-1, size)[: len(own)] = own

        def put(_linear: nn.Module, _args: Any, out: Tensor, units: Tensor = units) -> Tensor:
            new = torch.zeros_like(out)
            new[..., where] = units.to(out).reshape(windows, 1, -1)
            return new

        with ExitStack() as stack:
            stack.callback(linear(layer, name).register_forward_hook(put).remove)
            if norm is not None:
                stack.callback(norm.register_forward_hook(lambda _norm, args, _out: args[0]).remove)
            found.append(show().float().flatten(0, 1))
    return torch.cat(found)[:size].permute(1, 2, 0)  # it was (columns, tokens, size)


def turned_back(each: Tensor, turns: Tensor) -> Tensor:
    """The mean over places of R^T G R, for G (heads, size, size) and `turns` R (tokens, size, size)."""
    total = torch.zeros_like(each)
    for part in turns.split(PLACES):
        flat = part.reshape(-1, part.shape[-1])
        for head, own in enumerate(each):
            total[head] += (own @ part).reshape_as(flat).T @ flat
    return total / len(turns)


def _attention(loaded: LoadedModel, layer: nn.Module) -> nn.Module:
    return layer.get_submodule(loaded.roles.o.rpartition(".")[0])
