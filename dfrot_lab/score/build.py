"""The model of a recipe: rotated, its weights quantized; while a block runs, quantized altogether: linears as
integer products where both sides have codes, all else fake-quantized (rounded to its grid, then float)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.caches import run as caches
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.disk.atomic import still
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.model import corpus, door, hooks, integer, loading, noise, prefix, scales, surgery, turns
from dfrot_lab.model.families import heads_of
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.parts import Transform
from dfrot_lab.model.prefix import Prefix
from dfrot_lab.model.proof import TOKENS, Proof
from dfrot_lab.observe import massive, residual
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import KEEP_OUT_COUNTS, WINDOW, Recipe
from dfrot_lab.rotate import transforms
from dfrot_lab.rotate.transforms import Transforms
from dfrot_lab.score import found
from dfrot_lab.weights import run
from dfrot_lab.weights.calibrate import Rounding
from dfrot_lab.weights.codes import LayerCodes
from dfrot_lab.weights.run import OnPart, nothing


@dataclass(frozen=True)
class Built:
    """A model, transforms fused, weights quantized; R1 in its dtype or None; codes, none at 16 bits; what is
    before every window, if anything."""

    loaded: LoadedModel
    transforms: Transforms
    R: Tensor | None
    codes: Sequence[LayerCodes]
    prefix: Prefix | None = None


def build_key(recipe: Recipe) -> str:
    """Key of the model `build` would return: rows that share it can share the built model."""
    return keys.content_key(keys.built(door.resolved(recipe).canonical(), door.prints))


def build(recipe: Recipe, store: Store, on_part: OnPart = nothing, *, whole: bool = False) -> Built:
    """Load, untie, fuse norms, fit and fuse the transforms, quantize the weights: the model of `recipe`.
    ValueError: `whole` (all layers at once, as generating needs), and it does not fit into memory."""
    recipe = door.resolved(recipe).canonical()
    key = still(lambda: keys.weights(recipe, door.prints))
    loaded, made = rotated(recipe, store, whole=whole)
    R = None if made.R1 is None else made.R1.to(loaded.device, next(loaded.model.parameters()).dtype)
    if recipe.clips is not None:
        made = replace(made, clips=found.clips_of(recipe, loaded, made, store))
    if recipe.static is not None:
        made = replace(made, static=found.static_of(recipe, loaded, made, store))
    before: Prefix | None = None
    if (ids := found.prefix_of(recipe, store)) is not None:
        before = prefix.keep(loaded, ids, r4=made.r4, blocks=recipe.blocks)
    built = Built(loaded, made, R, [], before)
    rounding: Rounding | None = None
    if is_rounding := recipe.weights.sees_rounded:
        spare = keep_out(recipe, R) if recipe.keep_out else None
        rounding = _rounding(built, recipe, _rounded_kinds(recipe), spare)
    elif before:
        rounding = _rounding(built, recipe, [], None)
    r3 = made.r3 and is_rounding and recipe.keys.bits < 16
    how: dict[str, Any] = {"r3": r3, "r4": made.r4, "blocks": recipe.blocks, "on_part": on_part}
    how |= {"rounding": rounding, "prefix": before and before.ids}
    return replace(built, codes=run.quantize_weights(loaded, recipe.weights, key, store, **how))


def _rounding(built: Built, recipe: Recipe, kinds: Sequence[str], spare: Transform | None) -> Rounding:
    """What rounds some kinds of site of a built model as its recipe says, and holds what its prefix has; and
    the sites at which it acts."""
    function, sites = rounded(recipe, built.transforms, spare), hooks.sites_of(built.loaded, *kinds)
    if (own := built.prefix) is None:
        return function, sites
    r3 = built.transforms.r3 and recipe.keys.bits < 16 and "k" in kinds
    held = own.holding(function, sites, r3=r3, block=recipe.head_block)
    return held, {*sites, *prefix.cached(built.loaded)}


def rotated(recipe: Recipe, store: Store, *, whole: bool = False) -> tuple[LoadedModel, Transforms]:
    """The model of a canonical recipe with its transforms fused and nothing quantized; they leave its
    function as it is, which a few tokens prove."""
    found.prefix_of(recipe, store)  # of a model of its own, before this one is loaded
    loaded = loading.load_model(recipe.model, store, whole=whole)
    ids = windows(recipe, loaded)  # before minutes of work on weights: is there so much text? does it fit?
    for kind, spec in (("k", recipe.keys), ("v", recipe.values)):
        caches.check(spec, kind, recipe.window, heads_of(loaded.config)[2])
    proof = Proof(loaded, ids[:1, :TOKENS])
    surgery.prepare(loaded)
    made = transforms.fit(recipe, transforms.Context(recipe, store, loaded))
    made = replace(made, r3=made.r3 and recipe.acts("R3"), r4=made.r4 and recipe.acts("R4"))
    if recipe.jitter is not None:  # after a method's look: what it keeps is of the model itself
        noise.jitter(loaded, recipe.jitter)
    if made.R1 is not None:
        surgery.rotate_residual(loaded, made.R1)
    surgery.fold_gains(loaded, made.gains)
    if recipe.scales is not None:
        made = replace(made, scales=found.scales_of(recipe, loaded, made, store))
        scales.fold(loaded, made.scales)
    if made.R2 is not None:
        surgery.rotate_heads(loaded, None if isinstance(made.R2, str) else made.R2, recipe.head_block)
    if made.r4:
        surgery.rotate_down(loaded, recipe.mlp_block)
    turns.act(loaded, made.turns)
    with surgery.online(loaded, r3=made.r3, r4=made.r4, blocks=recipe.blocks):
        proof.check(None if loaded.roles.online else made.R1)
    return loaded, made


def _rounded_kinds(recipe: Recipe) -> list[str]:
    """The kinds of site that a recipe rounds."""
    kinds = [kind for kind, grid in (("k", recipe.keys), ("v", recipe.values)) if grid.bits < 16]
    return [*kinds, *(hooks.LINEAR_INPUTS if recipe.activations.bits < 16 else ())]


def weights_stored(recipe: Recipe, store: Store) -> bool:
    """Whether `build` would find the quantized weights of `recipe` in the store; always true at 16 bits."""
    recipe = door.resolved(recipe).canonical()
    key = keys.weights(recipe, door.prints)
    return recipe.weights.quantizer.bits == 16 or store.open(run.KIND, key) is not None


def windows(recipe: Recipe, loaded: LoadedModel) -> Tensor:
    """The token ids (windows, window) a recipe is scored on; ValueError if text or context is too short."""
    return _windows(recipe, loaded.tokenizer, loaded.context)


def windows_of(recipe: Recipe, store: Store) -> Tensor:
    """`windows` before the model is loaded."""
    return _windows(recipe, *loading.words_of(recipe.model, store))


def _windows(recipe: Recipe, tokenizer: Any, context: int) -> Tensor:
    loading.check_window(recipe.window, context)
    of: dict[str, Any] = {"blocks": recipe.windows, "window": recipe.window, "sample": recipe.sample}
    return corpus.sampled_blocks(recipe.corpus, tokenizer, **of)


def require_texts(recipe: Recipe, store: Store) -> None:
    """Refuse, before any work, windows longer than the model's context, and texts that are too short for what
    a recipe scores or calibrates its weights on; ValueError."""
    tokenizer, context = loading.words_of(recipe.model, store)
    recipe = recipe.canonical()
    of = recipe.weights
    needed = [(recipe.corpus, recipe.windows, recipe.window)]
    needed += [(of.corpus, of.windows, of.window)] if of.corpus is not None else []
    looked_at = [text for text in (recipe.clips, recipe.scales) if text is not None]
    needed += [(text.corpus, 1, min(text.tokens, WINDOW)) for text in looked_at]
    looks = [own for own in (recipe.static, recipe.prefix) if own is not None]
    needed += [(own.corpus, own.windows, own.window) for own in looks]
    for text, count, window in needed:
        loading.check_window(window, context)
        corpus.token_blocks(text, tokenizer, blocks=count, window=window)


def is_integer(recipe: Recipe) -> bool:
    """Whether both sides of every linear are codes that fit int8, a scale a channel and a token or a site:
    then it is an integer product; never with a rotation that acts before every linear, where floats are."""
    grid = recipe.weights.quantizer
    if recipe.rotation.acts_online:
        return False
    return grid.bits <= 8 and grid.group_size is None and integer.fits(recipe.activations)


def keep_out(recipe: Recipe, R: Tensor | None) -> Transform:
    """From a norm's output (..., tokens, channels), which tokens (..., tokens) pass unquantised: errors are
    those of the recipe's own activations, as in `QuaRot.FP16()`."""
    rule, count, act = str(recipe.keep_out), recipe.keep_out_tokens, recipe.activations

    def unrotated(x: Tensor) -> Tensor:
        return x if R is None else x @ R.T

    def counted(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rule == "random":  # the same at every site
            source = torch.Generator().manual_seed(recipe.sample or 0)
            chosen = torch.randperm(len(rows), generator=source)[:count]
        else:
            worst = rule == "worst"
            measure = squared_error(rows, act) if worst else unrotated(rows).abs().amax(1)
            chosen = measure.topk(min(int(count or 0), len(rows))).indices
        mask = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
        return mask.index_fill_(0, chosen.to(x.device), True).reshape(x.shape[:-1])

    return counted if rule in KEEP_OUT_COUNTS else lambda x: massive.rows_rule(unrotated(x), rule, act)


@contextmanager
def quantized(built: Built, recipe: Recipe, *, fake: bool = False, only: str | None = None) -> Iterator[None]:
    """While the block runs the built model has the recipe's online rotations, quantization and keep-out, with
    integer products where `is_integer`, but for `fake` and on a GPU (there they are slower); with `only` a
    kind of site (of hooks.KINDS), of the activations, keys and values those alone are rounded."""
    loaded, made, act = built.loaded, built.transforms, _moving(recipe.activations)
    spare = keep_out(recipe, built.R) if recipe.keep_out else None
    fake = fake or only is not None
    in_integers = is_integer(recipe) and not fake and loaded.device.type == "cpu"
    in_integers &= not (spare and loaded.roles.experts)  # a rule needs all tokens, an expert sees its own
    kinds = [kind for kind in _rounded_kinds(recipe) if only in (None, kind)]
    with ExitStack() as stack:
        if recipe.set_massive:  # mean values come from the text's other half
            ids = windows(recipe.with_(corpus=recipe.corpus.with_(split="calibration")), loaded)
            stack.enter_context(residual.massive_set(loaded, recipe.set_massive, ids))
        if in_integers:
            r4 = partial(surgery.hadamard, block=recipe.mlp_block) if made.r4 else None
            how: dict[str, Any] = {"r4": r4, "spare": spare, "clips": made.clips}
            how |= {"static": made.static}
            stack.enter_context(integer.integer_linears(loaded, built.codes, act, **how))
            kinds = [kind for kind in kinds if kind not in hooks.LINEAR_INPUTS]
        r3, r4_online = made.r3 and recipe.keys.bits < 16, made.r4 and not in_integers
        function, sites = _rounding(built, recipe, kinds, spare)
        seen: dict[str, Any] = {"function": function, "sites": sites, "blocks": recipe.blocks}
        stack.enter_context(surgery.online(loaded, r3=r3, r4=r4_online, **seen))
        yield


def _moving(grid: QuantSpec) -> QuantSpec:
    """The grid of each token by its own range, which a static one is where no scale was found."""
    return grid.with_(granularity="per_token") if grid.granularity == "static" else grid


def rounded(recipe: Recipe, made: Transforms, spare: Transform | None) -> hooks.At:
    """The function (site, x) -> x that rounds keys, values and the linears' inputs to the grids of `recipe`,
    by the clip or the static scale that a site has in `made`; tokens of a norm's output that `spare` marks
    pass."""
    act = _moving(recipe.activations)
    grids = {site: act.with_(clip_ratio=clip) for site, clip in made.clips.items()}
    cache = {"k": recipe.keys, "v": recipe.values}

    def function(site: str, x: Tensor) -> Tensor:
        kind = site.rpartition(".")[2]
        if kind in cache:
            return caches.held(x, cache[kind], kind)
        x_rounded = fake_quantize(x, grids.get(site, act), made.static.get(site))
        if spare is None or kind not in hooks.NORMS:
            return x_rounded
        return torch.where(spare(x)[..., None], x, x_rounded)

    return function
