"""Change a model without changing its function: untie, fuse norms, rotate R1 and R2, hook in R3 and R4.

With x the residual stream and R orthogonal, RMSNorm(x R) = RMSNorm(x) R once the gain is in the linears. So
    embedding E -> E R;  q, k, v, gate, up, lm_head: W -> W R  (their input is x R, and x R (W R)^T = x W^T);
    o, down: W -> R^T W, b -> b R,
leaves every logit as it was (QuaRot, arXiv 2404.00456, Sec. 3; DFRot, arXiv 2412.00648, Sec. 3.1). The
embedding is not centred: RMSNorm does not subtract a mean. Products run in float64 and are cast once."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab.maths.hadamard import factors, hadamard_transform
from dfrot_lab.maths.rotations import check, fast_product
from dfrot_lab.model.checkpoint import EMBEDDING, HEAD
from dfrot_lab.model.experts import widths
from dfrot_lab.model.families import GAINS, heads_of
from dfrot_lab.model.hooks import NORMS, At, at_sites, sites_of
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.model.stream import change

Transform = Callable[[Tensor], Tensor]  # of one activation (..., channels), to another of the same shape
EDIT_ROWS = 1024  # rows of a weight worked on at once
FUSED = "norms fused"
LAYER_NORM_EPS = 1e-5  # of a LayerNorm that does not say its own (OLMo)


def untie(loaded: LoadedModel) -> None:
    """Give lm_head its own copy of a tied embedding: the two are about to be changed differently."""
    if is_tied(loaded):
        head, embedding = _ends(loaded)
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    loaded.config.tie_word_embeddings = False


def is_tied(loaded: LoadedModel) -> bool:
    """Whether lm_head and the embedding are one tensor."""
    head, embedding = _ends(loaded)
    return head.weight is embedding.weight


def _ends(loaded: LoadedModel) -> tuple[nn.Linear, nn.Linear]:
    """lm_head and the embedding."""
    return linear(loaded.model, loaded.roles.lm_head), linear(loaded.model, loaded.roles.embedding)


def _tables(loaded: LoadedModel) -> list[nn.Linear]:
    """The embedding, and the table of positions where there is one."""
    names = (loaded.roles.embedding, loaded.roles.positions)
    return [linear(loaded.model, name) for name in names if name]


def _feeds(loaded: LoadedModel, number: int) -> dict[str, tuple[nn.Linear, list[nn.Linear]]]:
    """A layer's norms and what alone reads each one's output (linears, routers), by site."""
    layer = loaded.layers[number]
    return {
        f"layers.{number}.{site}": (linear(layer, norm), [linear(layer, name) for name in readers])
        for site, (norm, readers) in loaded.roles.readers(layer).items()
    }


def _writers(loaded: LoadedModel, number: int) -> list[nn.Linear]:
    """A layer's linears that write into the residual stream: o, down."""
    layer = loaded.layers[number]
    return [linear(layer, name) for name in (loaded.roles.o, *loaded.roles.downs(layer))]


def prepare(loaded: LoadedModel) -> None:
    """Untie, make RMSNorms of LayerNorms, fuse the norms: what both capture and rotation start from."""
    untie(loaded)
    centre(loaded)
    fuse_norms(loaded)


def centre(loaded: LoadedModel) -> None:
    """Make RMSNorms of LayerNorms: what writes into the residual stream is centred over channels, so that
    there is no mean to subtract, and the norms stop to do it (SliceGPT, arXiv 2401.15024, Sec. 3.2)."""
    if loaded.roles.norm != "layer":
        return

    def edit(part: int) -> None:
        if part == EMBEDDING:
            _edit_rows(_tables(loaded), lambda w: w - w.mean(-1, keepdim=True))
            return
        for writer in _writers(loaded, part):
            _edit(writer, lambda w: w - w.mean(0), lambda b: b - b.mean())

    change(loaded, edit, {EMBEDDING, *range(len(loaded.layers))})
    names = [name for _, name, _ in loaded.roles.feeds]
    norms = [layer.get_submodule(name) for layer in loaded.layers for name in names]
    for norm in (*norms, loaded.model.get_submodule(loaded.roles.final_norm)):
        norm.forward = partial(_rms, norm)


def _rms(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm of x (..., channels) by a LayerNorm's parameters, where it has them."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    out = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, getattr(norm, "eps", LAYER_NORM_EPS))
    return out if bias is None else out + bias


def fuse_norms(loaded: LoadedModel) -> None:
    """Move each norm's gain g into the linears it feeds, W -> W diag(g), g -> 1. Needs untied embeddings."""
    _require_untied(loaded)
    extra = GAINS[loaded.roles.norm]

    def fuse(part: int) -> None:
        if part == HEAD:
            fuse_norm(linear(loaded.model, loaded.roles.final_norm), [_ends(loaded)[0]], extra)
            return
        for norm, readers in _feeds(loaded, part).values():
            fuse_norm(norm, readers, extra)

    change(loaded, fuse, {*range(len(loaded.layers)), HEAD})
    loaded.done.add(FUSED)


def fuse_norm(norm: nn.Linear, linears: list[nn.Linear], extra: float = 0.0) -> None:
    """Move one norm's gain g (its weight + `extra`) into the `linears` that alone read it, W -> W diag(g),
    g -> 1; its bias b into theirs as W b, or, where they have none, keep it as b / g. ValueError: g = 0."""
    if getattr(norm, "weight", None) is None:  # a norm without parameters
        return
    gain, bias = norm.weight.data + extra, getattr(norm, "bias", None)
    if bias is not None and all(reader.bias is not None for reader in linears):
        for reader in linears:
            reader.bias.data.copy_(reader.bias.double() + reader.weight.double() @ bias.double())
        bias.data.zero_()
    elif bias is not None:
        if bool((gain == 0).any()):
            raise ValueError("a norm's gain must not be 0 where its bias has nowhere else to go; got a 0")
        bias.data.copy_(bias.double() / gain.double())
    for reader in linears:  # one product a value: rounded once, as if it were taken in float64
        reader.weight.data.mul_(gain)
    norm.weight.data.fill_(1 - extra)


def fold_gains(loaded: LoadedModel, gains: Mapping[str, Tensor]) -> None:
    """Give norms at some sites gains g (channels,), their readers W -> W / g; after R1, never before it."""
    sites, wanted = sites_of(loaded, *NORMS), dict[str, Tensor]()
    for site, gain in gains.items():
        if site not in sites:
            there = ", ".join(sites[:2])
            raise KeyError(f"no norm at site {site!r} in this model; it has {there}, ...")
        if gain.shape != (loaded.channels,) or not (gain.isfinite() & (gain != 0)).all():
            rule = f"{loaded.channels} finite numbers that are not 0"
            raise ValueError(f"gains[{site!r}] must be {rule}; got shape {tuple(gain.shape)}, {gain}")
        wanted[site] = gain.to(loaded.device, torch.float64)

    def fold(number: int) -> None:
        for site, (norm, readers) in _feeds(loaded, number).items():
            if (gain := wanted.get(site)) is not None:
                extra = GAINS[loaded.roles.norm]
                norm.weight.data.copy_((norm.weight.double() + extra) * gain - extra)
                _edit_rows(readers, partial(torch.div, other=gain))

    change(loaded, fold, {int(site.split(".")[1]) for site in wanted})


def norms_are_fused(loaded: LoadedModel) -> bool:
    """Whether every norm gain that R1 must pass is 1."""
    if loaded.checkpoint is not None:
        return FUSED in loaded.done
    feeds = [feed for number in range(len(loaded.layers)) for feed in _feeds(loaded, number).values()]
    norms = [linear(loaded.model, loaded.roles.final_norm), *(norm for norm, _ in feeds)]
    weights = [weight for norm in norms if (weight := getattr(norm, "weight", None)) is not None]
    return all(bool((weight == 1 - GAINS[loaded.roles.norm]).all()) for weight in weights)


def rotate_residual(loaded: LoadedModel, R: Tensor) -> None:
    """Fuse R1 = `R` (channels, channels) into embedding, all linears and lm_head. Needs fused norms."""
    _require_untied(loaded)
    if not norms_are_fused(loaded):
        why = "a gain that is not 1 does not commute with a rotation"
        raise ValueError(f"norm gains must be fused (surgery.fuse_norms) before R1: {why}")
    R = check(R, loaded.channels).to(loaded.device)
    fast = fast_product(R)
    times_R = fast or (lambda x: x @ R)
    columns: Transform = (lambda w: fast(w.T).T) if fast else (lambda w: R.T @ w)

    def rotate(part: int) -> None:
        if part < 0:
            _edit_rows([_ends(loaded)[0]] if part == HEAD else _tables(loaded), times_R)
            final = linear(loaded.model, loaded.roles.final_norm)
            if part == HEAD and getattr(final, "bias", None) is not None:
                final.bias.data.copy_(times_R(final.bias.double()[None])[0])
            return
        for _, readers in _feeds(loaded, part).values():
            _edit_rows(readers, times_R)
        for writer in _writers(loaded, part):
            _edit(writer, columns, times_R)

    change(loaded, rotate, {EMBEDDING, *range(len(loaded.layers)), HEAD})


def rotate_heads(loaded: LoadedModel, R2: Tensor | None = None) -> None:
    """Fuse R2 into each head's values, v -> v @ R2, and let o_proj take it back; default: Hadamard. `R2`:
    one (head, head) for all, (layers, head, head), or (layers, key-value heads, head, head)."""
    heads, kv_heads, head = heads_of(loaded.config)
    if R2 is None:
        _require_hadamard(head, "a head's size, so neither R2 nor R3")
    each = [None] * len(loaded.layers) if R2 is None else _of_each_head(loaded, R2)
    shared, own = heads // kv_heads, loaded.roles.v_rows
    values = slice(None) if own is None else own(loaded.config)

    def rotate(number: int) -> None:
        layer, R = loaded.layers[number], each[number]
        rows = partial(_rotate_values, head=head, R=R, rows=values)
        _edit(linear(layer, loaded.roles.v), rows, rows)
        R = None if R is None else R.repeat_interleave(shared, 0)
        _edit(linear(layer, loaded.roles.o), partial(_rotate_inputs, head=head, R=R))

    change(loaded, rotate)


def _of_each_head(loaded: LoadedModel, R2: Tensor) -> Tensor:
    """`R2` as (layers, key-value heads, head, head) float64, once it is known to fit and to be orthogonal."""
    (_, kv_heads, head), layers = heads_of(loaded.config), len(loaded.layers)
    full = (layers, kv_heads, head, head)
    if R2.shape not in (allowed := ((head, head), (layers, head, head), full)):
        raise ValueError(f"R2.shape must be one of {allowed}; got {tuple(R2.shape)}")
    for matrix in R2.reshape(-1, head, head):
        check(matrix, head)
    return (R2[:, None] if R2.ndim == 3 else R2).to(loaded.device, torch.float64).expand(full)


def _rotate_values(w: Tensor, head: int, R: Tensor | None, rows: slice | list[int]) -> Tensor:
    """v's weight (out, in) or bias (out,) with each head's value rows h (of `rows`) as R^T h."""
    values = w[rows]
    heads = values.reshape(-1, head, w[0].numel()).transpose(1, 2)
    w[rows] = (hadamard(heads) if R is None else heads @ R).transpose(1, 2).reshape(values.shape)
    return w


def _rotate_inputs(w: Tensor, head: int, R: Tensor | None) -> Tensor:
    """o_proj's weight (out, heads * head) with each head's columns h as h R."""
    heads = w.reshape(len(w), -1, head)
    return (hadamard(heads) if R is None else torch.einsum("ohi,hij->ohj", heads, R)).reshape(w.shape)


def rotate_down(loaded: LoadedModel) -> None:
    """Fuse the offline half of R4 into down_proj, W -> W H^T: right only with `online(..., r4=True)`."""
    for width in widths(loaded.layers, loaded.roles):
        _require_hadamard(width, "the MLP's width, so no R4")
    change(loaded, lambda number: _edit_rows(_writers(loaded, number)[1:], hadamard))


@contextmanager
def online(
    loaded: LoadedModel, *, r3: bool = False, r4: bool = False, function: At | None = None,
    sites: Collection[str] | None = None,
) -> Iterator[None]:  # fmt: skip
    """While the block runs: R3 on queries and keys, R4 before down_proj, then `function` at `sites` (all)."""
    if r3:
        _require_hadamard(heads_of(loaded.config)[2], "a head's size, so neither R2 nor R3")
    kinds = [*(("q", "k") if r3 else ()), *(("down_proj_in",) if r4 else ())]
    rotated = at_sites(loaded, lambda _, x: hadamard(x), sites_of(loaded, *kinds))
    with rotated, at_sites(loaded, function, sites) if function else nullcontext():
        yield


def hadamard(x: Tensor) -> Tensor:
    """x H^T / sqrt(n) for x (..., n): R3 of a head, and R4, which `rotate_down` makes down_proj expect."""
    return hadamard_transform(x, x.shape[-1] ** -0.5)


def _require_untied(loaded: LoadedModel) -> None:
    if is_tied(loaded):
        why = "lm_head and the embedding are one tensor and would be changed twice"
        raise ValueError(f"embeddings must be untied (surgery.untie) first: {why}")


def _require_hadamard(n: int, what: str) -> None:
    if factors(n) is None:
        said = f"no Hadamard matrix of order {n} is known here, and that is {what} can be applied"
        raise ValueError(f"{said}: evaluate this model with NR only")


def _edit_rows(modules: Iterable[nn.Linear], function: Transform) -> None:
    """Replace weights by a function of their rows, in float64 and cast once, a few at a time."""
    for module in modules:
        for part in module.weight.data.split(EDIT_ROWS):
            part.copy_(function(part.double()))


def _edit(module: nn.Linear, weight: Transform, bias: Transform | None = None) -> None:
    """Replace a module's weight (and bias) by a function of it, computed in float64 and cast once."""
    with torch.no_grad():
        module.weight.copy_(weight(module.weight.double()))
        own = getattr(module, "bias", None)  # an embedding has none
        if bias is not None and own is not None:
            own.copy_(bias(own.double()))
