"""Change a model without changing its function: untie, fuse norms, rotate R1 and R2, hook in R3 and R4.

With x the residual stream and R orthogonal, RMSNorm(x R) = RMSNorm(x) R once the gain is in the linears. So
    embedding E -> E R;  q, k, v, gate, up, lm_head: W -> W R  (their input is x R, and x R (W R)^T = x W^T);
    o, down: W -> R^T W, b -> b R,
leaves every logit as it was (QuaRot, arXiv 2404.00456, Sec. 3; DFRot, arXiv 2412.00648, Sec. 3.1). The
embedding is not centred: RMSNorm does not subtract a mean. Products run in float64 and are cast once."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab.maths.hadamard import block_of, hadamard_transform
from dfrot_lab.maths.rotations import check, fast_product
from dfrot_lab.model.checkpoint import EMBEDDING, HEAD
from dfrot_lab.model.experts import widths
from dfrot_lab.model.families import GAINS, heads_of
from dfrot_lab.model.hooks import NORMS, At, at_sites, sites_of
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.model.parts import Transform, edit, edit_rows, ends, feeds, tables, writers
from dfrot_lab.model.stream import change

log = logging.getLogger(__name__)
Blocks = tuple[int | None, int | None]  # of Hadamards of heads (R2, R3) and of R4; None: the largest
FUSED = "norms fused"
LAYER_NORM_EPS = 1e-5  # of a LayerNorm that does not say its own (OLMo)


def untie(loaded: LoadedModel) -> None:
    """Give lm_head its own copy of a tied embedding: the two are about to be changed differently."""
    if is_tied(loaded):
        head, embedding = ends(loaded)
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    loaded.config.tie_word_embeddings = False


def is_tied(loaded: LoadedModel) -> bool:
    """Whether lm_head and the embedding are one tensor."""
    head, embedding = ends(loaded)
    return head.weight is embedding.weight


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

    def centred(part: int) -> None:
        if part == EMBEDDING:
            edit_rows(tables(loaded), lambda w: w - w.mean(-1, keepdim=True))
            return
        for writer in writers(loaded, part):
            edit(writer, lambda w: w - w.mean(0), lambda b: b - b.mean())

    change(loaded, centred, {EMBEDDING, *range(len(loaded.layers))})
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
            fuse_norm(linear(loaded.model, loaded.roles.final_norm), [ends(loaded)[0]], extra)
            return
        for norm, readers in feeds(loaded, part).values():
            fuse_norm(norm, readers, extra)

    change(loaded, fuse, {*range(len(loaded.layers)), HEAD})
    loaded.done.add(FUSED)


def fuse_norm(norm: nn.Linear | None, linears: list[nn.Linear], extra: float = 0.0) -> None:
    """Move one norm's gain g (its weight + `extra`) into the `linears` that alone read it, W -> W diag(g),
    g -> 1; its bias b into theirs as W b, or, where they have none, keep it as b / g. ValueError: g = 0."""
    if norm is None or getattr(norm, "weight", None) is None:  # no norm, or one without parameters
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
    if gains and loaded.roles.online:
        raise ValueError(
            f"gains must be none for {loaded.family}: its R1 acts after the norms; got {len(gains)}"
        )
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
        for site, (norm, readers) in feeds(loaded, number).items():
            if (gain := wanted.get(site)) is not None:
                assert norm is not None
                edit(norm, partial(_times, gain, GAINS[loaded.roles.norm]), partial(torch.mul, gain))
                edit_rows(readers, partial(torch.div, other=gain))

    change(loaded, fold, {int(site.split(".")[1]) for site in wanted})


def _times(gain: Tensor, extra: float, weight: Tensor) -> Tensor:
    return (weight + extra) * gain - extra


def norms_are_fused(loaded: LoadedModel) -> bool:
    """Whether every norm gain that R1 must pass is 1."""
    if loaded.checkpoint is not None:
        return FUSED in loaded.done
    inner = [norm for i in range(len(loaded.layers)) for norm, _ in feeds(loaded, i).values()]
    norms = [linear(loaded.model, loaded.roles.final_norm), *inner]
    weights = [weight for norm in norms if (weight := getattr(norm, "weight", None)) is not None]
    return all(bool((weight == 1 - GAINS[loaded.roles.norm]).all()) for weight in weights)


def rotate_residual(loaded: LoadedModel, R: Tensor) -> None:
    """Fuse R1 = `R` (channels, channels) into embedding, all linears and lm_head; of an `online` family into
    what reads the norms alone, and turn there what they read. Needs fused norms."""
    _require_untied(loaded)
    if not norms_are_fused(loaded):
        why = "a gain that is not 1 does not commute with a rotation"
        raise ValueError(f"norm gains must be fused (surgery.fuse_norms) before R1: {why}")
    R = check(R, loaded.channels).to(loaded.device)
    fast = fast_product(R)
    times_R = fast or (lambda x: x @ R)
    columns: Transform = (lambda w: fast(w.T).T) if fast else (lambda w: R.T @ w)

    def turn_bias(norm: nn.Linear | None) -> None:  # of a norm that keeps one, its readers having none
        if norm is not None and getattr(norm, "bias", None) is not None:
            norm.bias.data.copy_(times_R(norm.bias.double()[None])[0])

    def rotate_readers(part: int) -> None:
        for _, readers in feeds(loaded, part).values():
            edit_rows(readers, times_R)

    if loaded.roles.online:
        change(loaded, rotate_readers)
        loaded.online.enter_context(_turned(loaded, R))
        return

    def rotate(part: int) -> None:
        if part < 0:
            edit_rows([ends(loaded)[0]] if part == HEAD else tables(loaded), times_R)
            if part == HEAD:
                turn_bias(linear(loaded.model, loaded.roles.final_norm))
            return
        for norm, _ in feeds(loaded, part).values():
            turn_bias(norm)
        rotate_readers(part)
        for writer in writers(loaded, part):
            edit(writer, columns, times_R)

    change(loaded, rotate, {EMBEDDING, *range(len(loaded.layers)), HEAD})


def _turned(loaded: LoadedModel, R: Tensor) -> AbstractContextManager[None]:
    """What the readers of the norms read, times `R`, by the fast transform where there is one."""
    sites = sites_of(loaded, *NORMS)
    readers = [one for _, linears in feeds(loaded, 0).values() for one in linears]
    share = len(NORMS) * R.numel() / sum(reader.weight.numel() for reader in readers)
    own, fast = R.to(next(loaded.model.parameters()).dtype), fast_product(R)
    said = "as a fast transform" if fast else f"{share:.0%} more work there"
    log.info("R1 of %s acts online where %d norms are read, %s", loaded.family, len(sites), said)
    return at_sites(loaded, lambda _, x: fast(x) if fast else x @ own, sites)


def rotate_heads(loaded: LoadedModel, R2: Tensor | None = None, block: int | None = None) -> None:
    """Fuse R2 into each head's values, v -> v @ R2, and let o_proj take it back; default: Hadamard, of
    `block`. `R2`: one (head, head) for all, (layers, head, head), (layers, key-value heads, head, head)."""
    heads, kv_heads, head = heads_of(loaded.config)
    if R2 is None:
        block = block_of(head, block, "Recipe.head_block")
    each = [None] * len(loaded.layers) if R2 is None else _of_each_head(loaded, R2)
    shared, own = heads // kv_heads, loaded.roles.v_rows
    values = slice(None) if own is None else own(loaded.config)

    def rotate(number: int) -> None:
        layer, R = loaded.layers[number], each[number]
        rows = partial(_rotate_values, head=head, R=R, block=block, rows=values)
        edit(linear(layer, loaded.roles.v), rows, rows)
        R = None if R is None else R.repeat_interleave(shared, 0)
        edit(linear(layer, loaded.roles.o), partial(_rotate_inputs, head=head, R=R, block=block))

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


def _rotate_values(
    w: Tensor, head: int, R: Tensor | None, block: int | None, rows: slice | list[int]
) -> Tensor:
    """v's weight (out, in) or bias (out,) with each head's value rows h (of `rows`) as R^T h."""
    values = w[rows]
    heads = values.reshape(-1, head, w[0].numel()).transpose(1, 2)
    w[rows] = (hadamard(heads, block) if R is None else heads @ R).transpose(1, 2).reshape(values.shape)
    return w


def _rotate_inputs(w: Tensor, head: int, R: Tensor | None, block: int | None) -> Tensor:
    """o_proj's weight (out, heads * head) with each head's columns h as h R."""
    heads = w.reshape(len(w), -1, head)
    turned = hadamard(heads, block) if R is None else torch.einsum("ohi,hij->ohj", heads, R)
    return turned.reshape(w.shape)


def rotate_down(loaded: LoadedModel, block: int | None = None) -> None:
    """Fuse the offline half of R4 into down_proj, W -> W H^T, in blocks of `block`: right only with the other
    half, `online(..., r4=True)` of the same blocks."""
    blocks = {
        width: block_of(width, block, "Recipe.mlp_block") for width in widths(loaded.layers, loaded.roles)
    }

    def rotate(number: int) -> None:
        for down in writers(loaded, number)[1:]:
            edit_rows([down], partial(hadamard, block=blocks[down.weight.shape[1]]))

    change(loaded, rotate)


@contextmanager
def online(
    loaded: LoadedModel, *, r3: bool = False, r4: bool = False, blocks: Blocks = (None, None),
    function: At | None = None, sites: Collection[str] | None = None,
) -> Iterator[None]:  # fmt: skip
    """While the block runs: R3 on queries and keys, R4 before down_proj, then `function` at `sites` (all)."""
    own = dict.fromkeys(("q", "k") if r3 else (), blocks[0]) | ({"down_proj_in": blocks[1]} if r4 else {})
    at = sites_of(loaded, *own)
    rotated = at_sites(loaded, lambda site, x: hadamard(x, own[site.rpartition(".")[2]]), at)
    with rotated, at_sites(loaded, function, sites) if function else nullcontext():
        yield


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """x H^T / sqrt(n) for x (..., n), or the same block by block: R3, R2 and the two halves of R4. Default:
    the largest blocks that there are, one of n where a Hadamard matrix of n is known (`block_of`)."""
    block = block_of(x.shape[-1], block)
    parts = x.reshape(*x.shape[:-1], -1, block)
    return hadamard_transform(parts, block**-0.5).reshape(x.shape)


def _require_untied(loaded: LoadedModel) -> None:
    if is_tied(loaded):
        why = "lm_head and the embedding are one tensor and would be changed twice"
        raise ValueError(f"embeddings must be untied (surgery.untie) first: {why}")
