"""How far a quantized model's next-token distributions are from the full-precision model's, token by token.

Both logits are made by the quantized model's own head, which is never quantized: with h what leaves the last
layer in full precision, its head(h R1) is that model's head(h), since a rotation leaves the function alone.
So of full precision h alone is kept, once for every window, whatever is scored on it later."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.model import door, loading, stream, surgery
from dfrot_lab.model.checkpoint import HEAD
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.prefix import before, tokens
from dfrot_lab.model.stream import LOGIT_ROWS, LOSS_ROWS, Walk
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import found
from dfrot_lab.score.build import Built
from dfrot_lab.weights.run import OnPart, nothing

KIND, HIDDEN = "reference", "hidden"
MEASURES = ("loss", "divergence", "agreement")
FINITE = "finite (a broken model, or too small a dtype: try --dtype float32)"


def compared(logits: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """MEASURES of each token (tokens, 3) in float64, from quantized and full-precision logits in float32
    (tokens, vocabulary), which are overwritten, and the next tokens' ids `target` (tokens,): -log q(target)
    and sum of p log(p / q) in nats, and whether the most likely token is the same (1 or 0), where q and p are
    the softmax of `logits` and of `reference`. The largest logit is taken off and the sums are logged in
    float64, so that little cancels: a divergence is right to 1e-6, and no less than -1e-6."""
    (top, best), (p_top, p_best) = logits.max(-1, keepdim=True), reference.max(-1, keepdim=True)
    q, p = logits.sub_(top), reference.sub_(p_top)
    aim, ratio = q.gather(-1, target[:, None])[:, 0], p - q
    p_sum, q_log = p.exp_().sum(-1).double(), q.exp_().sum(-1).double().log()
    divergence = ratio.mul_(p).sum(-1).double() / p_sum - p_sum.log() + q_log
    return torch.stack([q_log - aim, divergence, (best == p_best)[:, 0].double()], -1)


def measures(loaded: LoadedModel, hidden: Tensor, reference: Tensor, ids: Tensor) -> Tensor:
    """MEASURES of each token but the last of one window `ids` (tokens,), (tokens - 1, 3) float32, from what
    leaves the last layer, quantized and in full precision (tokens, channels), both in the basis of `loaded`:
    call it while the part HEAD is there."""
    found, target = list[Tensor](), ids[1:].to(loaded.device)
    states = (x[:-1].split(LOGIT_ROWS) for x in (hidden, reference))
    for *both, aim in zip(*states, target.split(LOGIT_ROWS), strict=True):
        logits = [stream.logits(loaded, x[None])[0].float().split(LOSS_ROWS) for x in both]
        found += map(compared, *logits, aim.split(LOSS_ROWS))
    return torch.cat(found).float()


def is_full_precision(recipe: Recipe) -> bool:
    """Whether nothing of a canonical recipe's model is quantized, rotated or set: it is its own reference."""
    changed = recipe.prefix is not None and recipe.prefix.reference == "plain"
    is_whole = recipe.bits == "16-16-16" and not recipe.is_rotated and recipe.set_massive is None
    return is_whole and not changed


def in_basis(built: Built, hidden: Tensor) -> Tensor:
    """What leaves the last layer without R1, h (tokens, channels), as a built model has it: h R1."""
    R = built.transforms.R1
    if R is None or built.loaded.roles.online:
        return hidden
    at = built.loaded.device, torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(*at) @ R.to(*at)).to(hidden.dtype)


def walk(built: Built, ids: Sequence[Tensor], **how: Any) -> Walk:
    """A walk of windows of ids (tokens,), one at a time, each with what the model has before every window."""
    own = built.prefix.ids if built.prefix else None
    return Walk(built.loaded, [before(each[None], own) for each in ids], **how)


def skipped(built: Built) -> int:
    """How many tokens are before every window."""
    return tokens(built.prefix.ids if built.prefix else None)


@torch.inference_mode()
def window_measures(built: Built, ids: Tensor, reference: Artefact, hidden: Tensor | None = None) -> Tensor:
    """`measures` (tokens - 1, 3) of a window `ids` (tokens,), beside its `reference`; `hidden` (tokens,
    channels) by default from a pass through the model as it is now, which then must be kept in memory."""
    if hidden is None:
        [hidden] = walk(built, [ids]).through()[0][:, skipped(built) :]
    return measures(built.loaded, hidden, in_basis(built, states_of(reference)), ids)


def references(recipe: Recipe, ids: Tensor, store: Store, on_part: OnPart = nothing) -> list[Artefact]:
    """The full-precision model's reference for each of the windows `ids` (windows, tokens), whatever recipe
    asks for it: `states_of` it, once norms are fused, in the model's dtype; in its note the mean `loss` in
    nats and the `seconds` it took. What is not stored is made, and goes on where it was stopped: window by
    window, or, of a model read layer by layer, all in one walk. With the recipe's prefix before each, where
    that is what it is compared with. ValueError: NaN or Inf."""
    own = found.prefix_of(recipe, store) if recipe.prefix and recipe.prefix.reference == "prefix" else None
    said = [] if own is None else own.tolist()
    asked = [partial(keys.reference, recipe.model, window.tolist(), door.prints, said) for window in ids]
    loaded: LoadedModel | None = None
    while True:
        kept = [store.open(KIND, ask()) for ask in asked]
        lacking = {keys.content_key(asked[i]()): i for i, each in enumerate(kept) if each is None}
        if not lacking:
            return [each for each in kept if each is not None]
        if loaded is None:
            loaded = loading.load_model(recipe.model, store)
            surgery.prepare(loaded)
        lot = [lacking[key] for key in sorted(lacking)]  # in one order, so that no two wait for each other
        lot = lot if loaded.checkpoint else [min(lot)]
        on_part(KIND, len(ids) - len(lacking), len(ids))
        _make([asked[i] for i in lot], [ids[i] for i in lot], own, loaded, store)


@torch.inference_mode()
def _make(
    asked: list[partial[dict[str, Any]]], texts: list[Tensor], prefix: Tensor | None, loaded: LoadedModel,
    store: Store,
) -> None:  # fmt: skip
    """Keep the references of some windows, a prefix before each, by one walk; the first holds its state."""

    def make(writer: Writer) -> None:
        own = [before(ids[None], prefix) for ids in texts]
        walk = Walk(loaded, own, name="full precision", writer=writer)
        states = [x[:, x.shape[1] - len(ids) :] for x, ids in zip(walk.through(), texts, strict=True)]
        seconds = walk.seconds / len(texts)
        with stream.part(loaded, HEAD):
            for ask, ids, (hidden,) in reversed(list(zip(asked, texts, states, strict=True))):
                loss = float(stream.loss(loaded, hidden, ids))
                said = f"loss of {loaded.spec.source} in full precision"
                require(said, loss, math.isfinite(loss), FINITE)
                keep = partial(_keep, hidden, {"loss": loss, "seconds": seconds})
                keep(writer) if ask is asked[0] else store.get_or_make(KIND, ask, keep)

    store.get_or_make(KIND, asked[0], make)


def _keep(hidden: Tensor, note: dict[str, float], writer: Writer) -> None:
    writer.save_tensors(HIDDEN, {HIDDEN: hidden})
    writer.note.update(note)


def states_of(reference: Artefact) -> Tensor:
    """What leaves the last layer in full precision (tokens, channels)."""
    return reference.tensors(HIDDEN)[HIDDEN]
