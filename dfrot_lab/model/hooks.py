"""Functions of one kind at named sites while a model runs: `f(site, x) -> x`, or None to leave x as it is.

| site | what it is | shape |
|---|---|---|
| `layers.12.residual` | the residual stream before layer 12 | (batch, tokens, channels) |
| `layers.12.input_norm_in`, `.post_attention_norm_in` | the residual stream as a norm reads it | the same |
| `layers.12.input_norm`, `.post_attention_norm` | a norm's output, what q, k, v (gate, up) read | the same |
| `layers.12.q`, `.k`, `.v` | queries and keys after RoPE, values | (batch, heads, tokens, head size) |
| `layers.12.o_proj_in`, `.down_proj_in` | what o_proj, down_proj read | (batch, tokens, their inputs) |
| `layers.12.experts.7.mlp_in`, `.down_proj_in` | the same of one expert, of its tokens | (tokens, inputs) |

In a layer with experts each has a `down_proj_in` of its own (`layers.12.shared.down_proj_in`: of what all
tokens share), and `post_attention_norm` is what all experts read: the router never sees what is put there."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.stream import dressed

At = Callable[[str, Tensor], Tensor | None]  # a site, what is there -> what is to be there; None leaves it
Online = Callable[..., AbstractContextManager[None]]  # `surgery.online` of a model
Call = Callable[[int, list[Tensor | None], Mapping[str, Any]], None]
"""A layer's number, the [q, k, v, mask] that its attention is about to see, to be changed in place if at all,
how it is called (scaling, softcap, ...)."""
NORMS = ("input_norm", "post_attention_norm")
NORM_INPUTS = tuple(f"{norm}_in" for norm in NORMS)
LINEAR_INPUTS = (*NORMS, "o_proj_in", "down_proj_in")  # the kinds of site that the linears of a layer read
ATTENTION = ("q", "k", "v")
KINDS = (*LINEAR_INPUTS, *ATTENTION)
INPUT = "hidden_states"  # what attention calls its input where it is not its first argument
ALL_KINDS = ("residual", *NORM_INPUTS, *KINDS, "mlp_in")


def sites_of(loaded: LoadedModel, *kinds: str) -> tuple[str, ...]:
    """The sites of some kinds, layer by layer; KeyError for a kind that is none."""
    if unknown := set(kinds) - set(ALL_KINDS):
        raise KeyError(f"a site's kind must be one of {', '.join(ALL_KINDS)}; got {sorted(unknown)}")
    found = list[str]()
    for number in range(len(loaded.layers)):
        there = (*_places(loaded, number), *ATTENTION)
        wanted = [site for kind in kinds for site in there if site.rpartition(".")[2] == kind]
        found += [f"layers.{number}.{site}" for site in wanted]
    return tuple(found)


@contextmanager
def at_sites(loaded: LoadedModel, function: At, sites: Collection[str] | None = None) -> Iterator[None]:
    """While the block runs, `function` sees, and may replace, what is at `sites` (by default all of KINDS);
    of nested blocks the inner one sees what the outer one put there."""
    known = sites_of(loaded, *KINDS)
    wanted = set(known if sites is None else sites)
    if unknown := wanted - set(sites_of(loaded, *ALL_KINDS)):
        raise KeyError(f"no site {min(unknown)!r} in this model; it has {known[0]} .. {known[-1]}")

    @contextmanager
    def hooked(number: int) -> Iterator[None]:
        with ExitStack() as stack:
            for place, (name, is_output) in _places(loaded, number).items():
                if (site := f"layers.{number}.{place}") in wanted:
                    module = loaded.layers[number].get_submodule(name)
                    stack.callback(_hooked(module, site, function, is_output).remove)
            yield

    with ExitStack() as stack:
        stack.enter_context(dressed(loaded, hooked))
        if any(site.rpartition(".")[2] in ATTENTION for site in wanted):
            stack.enter_context(at_attention(loaded, partial(_at_each, function, wanted)))
        yield


def _at_each(
    function: At, sites: Collection[str], layer: int, seen: list[Tensor | None], _how: Mapping[str, Any]
) -> None:
    for place, kind in enumerate(ATTENTION):
        x = seen[place]
        if (site := f"layers.{layer}.{kind}") in sites and x is not None:
            new = function(site, x)
            seen[place] = x if new is None else new


def _places(loaded: LoadedModel, number: int) -> dict[str, tuple[str, bool]]:
    """For each site of a layer but attention's its part (empty: the layer itself), whether as its output."""
    layer, roles = loaded.layers[number], loaded.roles
    places = {"residual": ("", False), "o_proj_in": (roles.o, False)}
    for kind, norm, linears in roles.feeds:  # without a norm what the linears read, one part's input
        part = norm or linears[0].rpartition(".")[0]
        places |= {f"{kind}_in": (part, False), kind: (part, bool(norm))}
    for (site, mlp), down in zip(roles.mlps(layer).items(), roles.downs(layer), strict=True):
        places[f"{site}down_proj_in"] = (down, False)
        if site:
            places |= {f"{site}mlp_in": (mlp, False), roles.feeds[1][0]: (f"{roles.experts}.entry", True)}
    return places


def _hooked(module: nn.Module, site: str, function: At, is_output: bool) -> Any:
    if is_output:
        return module.register_forward_hook(lambda _module, _args, output: function(site, output))

    def see(_module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any]) -> Any:
        new = function(site, args[0] if args else named[INPUT])
        if new is None:
            return None
        return ((new, *args[1:]), named) if args else (args, named | {INPUT: new})

    return module.register_forward_pre_hook(see, with_kwargs=True)


def _attend(
    module: Any, *inputs: Any, shown: tuple[Call, ...], eager: bool, **how: Any
) -> tuple[Tensor, Any]:
    """Attention of q, k, v and a mask after the functions in `shown` have seen them in turn: SDPA, or the
    family's own (`eager`) where it does what SDPA cannot (Gemma 2 bounds its logits)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = list(inputs)
    for function in shown:
        function(module.layer_idx, seen, how)
    own = sys.modules[type(module).__module__]
    attention = own.eager_attention_forward if eager else sdpa_attention_forward
    found: tuple[Tensor, Any] = attention(module, *seen, **how)
    return found


@contextmanager
def at_attention(loaded: LoadedModel, function: Call) -> Iterator[None]:
    """While the block runs, `function` sees what each layer's attention is called with; of nested blocks the
    inner one sees what the outer one put there. transformers computes attention through an entry of its own
    table, removed again at the end."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model: Any = loaded.model
    before = loaded.config._attn_implementation
    outer = getattr(ALL_ATTENTION_FUNCTIONS.get(before), "keywords", {"eager": before == "eager"})
    attend = partial(_attend, shown=(*outer.get("shown", ()), function), eager=outer["eager"])
    name = f"dfrot_lab_{id(attend)}"
    ALL_ATTENTION_FUNCTIONS[name] = attend
    mask = eager_mask if outer["eager"] else sdpa_mask
    AttentionMaskInterface.register(name, mask)  # masks are looked for among the registered ones alone
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[name]
        del AttentionMaskInterface._global_mapping[name]
