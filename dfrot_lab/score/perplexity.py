"""What a rotation is worth: perplexity of the quantized model, with its uncertainty, one row a spec.

Perplexity follows the WikiText-2 protocol of GPTQ, QuaRot and DFRot: the text tokenised whole, cut into
windows, exp(mean over windows of the mean next-token loss). Where weights and activations both have codes,
linears run in integer arithmetic; with 16-bit weights, and for the KV cache, values are fake-quantized:
rounded to their grid, computed in float.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.model import corpus, hooks, integer, loading, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import intervene, massive
from dfrot_lab.recipe.specs import KEEP_OUT_COUNTS, CorpusSpec, EvalSpec, RefineSpec, RotationSpec, WeightSpec
from dfrot_lab.rotate import dfrot
from dfrot_lab.weights import gptq
from dfrot_lab.weights.gptq import OnPart, nothing

log = logging.getLogger(__name__)

LOGIT_ROWS = 256
"""Tokens whose logits exist at once: the logits of a whole window would be the largest tensor of an
evaluation (0.4 GB).
"""

RESAMPLES = 9999

KIND = "evaluation"

TextKey = Callable[[CorpusSpec], str]


@dataclass(frozen=True)
class Built:
    """A model with R1 and R2 fused and its weights quantized, the R1 it has (None without rotation) and its
    weight codes (none at 16 bits).
    """

    loaded: LoadedModel
    R: Tensor | None
    codes: list[gptq.LayerCodes]


@dataclass(frozen=True)
class EvalResult:
    """Mean next-token loss of each window (windows,), in nats, the seconds it took, and where model and text
    came from.
    """

    spec: EvalSpec
    losses: np.ndarray
    seconds: float
    provenance: str

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(np.exp(self.losses.mean()))

    @property
    def ci95(self) -> tuple[float, float]:
        """Bootstrap 95% interval of the perplexity over windows."""
        return bootstrap(lambda loss, axis: np.exp(loss.mean(axis)), self.losses)


def bootstrap(statistic: Callable[..., Any], *samples: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of `statistic(*samples, axis=)` over paired samples (windows,); (nan,
    nan) for fewer than 2 windows.
    """
    if len(samples[0]) < 2:
        return float("nan"), float("nan")
    options: dict[str, Any] = {
        "paired": True,
        "vectorized": True,
        "n_resamples": RESAMPLES,
        "method": "percentile",
        "rng": 0,
    }
    result = stats.bootstrap(samples, statistic, **options)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def statistic(function: Callable[..., Any], found: Sequence[EvalResult]) -> tuple[float, tuple[float, float]]:
    """`function(*losses, axis=)` of several evaluations and its bootstrap 95% interval, resampling the
    windows that all were scored on.
    """
    first = found[0]
    for other in found[1:]:
        if (
            other.spec.corpus != first.spec.corpus
            or len(other.losses) != len(first.losses)
            or other.spec.window != first.spec.window
        ):
            raise ValueError(
                f"paired results must share corpus, windows and window; got {first.spec.corpus} x {len(first.losses)} "
                f"and {other.spec.corpus} x {len(other.losses)}"
            )
    losses = [result.losses for result in found]
    return float(function(*losses, axis=-1)), bootstrap(function, *losses)


def paired_difference(a: EvalResult, b: EvalResult) -> tuple[float, tuple[float, float]]:
    """Perplexity of `a` minus that of `b` and its paired 95% interval."""
    return statistic(lambda x, y, axis: np.exp(x.mean(axis)) - np.exp(y.mean(axis)), [a, b])


def closed_share(ro: np.ndarray, ro_kept: np.ndarray, rh: np.ndarray, rh_kept: np.ndarray, axis: int) -> Any:
    """From losses, the share of the perplexity gap between RO and RH that is gone when massive tokens are
    kept out: 1 where none is left.
    """
    perplexity = [np.exp(losses.mean(axis)) for losses in (ro, ro_kept, rh, rh_kept)]
    return 1 - (perplexity[1] - perplexity[3]) / (perplexity[0] - perplexity[2])


def canonical(spec: EvalSpec) -> EvalSpec:
    """`spec` with its corpora resolved and what has no effect set to defaults, so that equal work has one
    key.
    """
    weights = spec.weights.with_(corpus=corpus.resolve(spec.weights.corpus))
    if weights.quantizer.bits == 16:
        weights = WeightSpec(method="rtn", quantizer=weights.quantizer)
    elif weights.method == "rtn":
        weights = WeightSpec(method="rtn", quantizer=weights.quantizer, clip_search=weights.clip_search)
    if spec.activations.bits == 16:
        spec = spec.with_(
            activations=EvalSpec().activations.with_(bits=16, clip_ratio=1.0),
            keep_out=None,
            keep_out_tokens=None,
        )
    if spec.kv.bits == 16:
        spec = spec.with_(kv=EvalSpec().kv)
    if not is_rotated(spec):
        spec = spec.with_(rotation=RotationSpec(kind="NR"))
    return spec.with_(corpus=corpus.resolve(spec.corpus), weights=weights)


def is_rotated(spec: EvalSpec) -> bool:
    """Whether R1 to R4 act: NR means no rotation anywhere, as in the paper's tables."""
    return isinstance(spec.rotation, RefineSpec) or spec.rotation.kind != "NR"


def rotation_key(spec: RotationSpec | RefineSpec, text_key: TextKey = corpus.fingerprint) -> Any:
    """JSON-able identity of a rotation: its spec, a refined one's model bytes, a file's digest."""
    return dfrot.identity(spec, text_key) if isinstance(spec, RefineSpec) else rotations.identity(spec)


def rotation_matrix(spec: RotationSpec | RefineSpec, channels: int, store: Store) -> Tensor:
    """R1 (channels, channels) float64 of a rotation or refinement."""
    return dfrot.refined(spec, store).R if isinstance(spec, RefineSpec) else rotations.make(spec, channels)


def build_key(spec: EvalSpec) -> Any:
    """Identity of the model `build` would return: rows that share it can share the built model."""
    return {
        "model": loading.fingerprint(spec.model),
        "rotation": rotation_key(spec.rotation),
        "weights": canonical(spec).weights.to_dict(),
    }


def build(spec: EvalSpec, store: Store, on_part: OnPart = nothing) -> Built:
    """Load, untie, fuse norms, fuse R1 and R2 and the offline half of R4, quantize the weights: the model
    that `spec` evaluates.
    """
    loaded = loading.load_model(spec.model, store)
    windows(spec, loaded)  # before minutes of work on weights: is there that much text, and does it fit?
    surgery.prepare(loaded)
    R = None
    if is_rotated(spec):
        R = rotation_matrix(spec.rotation, loaded.channels, store)
        surgery.rotate_residual(loaded, R)
        surgery.rotate_heads(loaded)
        surgery.rotate_down(loaded)
    codes = gptq.quantize_weights(
        loaded, spec.weights, _model_key(spec), store, r4=R is not None, on_part=on_part
    )
    return Built(loaded, None if R is None else R.to(next(loaded.model.parameters())), codes)


def _model_key(spec: EvalSpec) -> Any:
    """Identity of the rotated model before its weights are quantized."""
    return {"model": loading.fingerprint(spec.model), "rotation": rotation_key(spec.rotation)}


def weights_stored(spec: EvalSpec, store: Store) -> bool:
    """Whether `build` would find the quantized weights of `spec` in the store; always true at 16 bits."""
    return gptq.is_stored(spec.weights, _model_key(spec), store)


def keep_out(spec: EvalSpec, R: Tensor | None) -> surgery.Transform:
    """Which rows of a norm's output (..., tokens, channels) pass unquantised: by a rule on the unrotated row
    x R^T, or so many by a measure.
    """
    rule, count = str(spec.keep_out), spec.keep_out_tokens

    def unrotated(x: Tensor) -> Tensor:
        return x if R is None else x @ R.T

    def counted(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rule == "random":  # the same at every site
            chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
        else:
            measure = (
                squared_error(rows, spec.activations) if rule == "worst" else unrotated(rows).abs().amax(1)
            )
            chosen = measure.topk(min(int(count or 0), len(rows))).indices
        return (
            torch.zeros(len(rows), dtype=torch.bool, device=x.device)
            .index_fill_(0, chosen.to(x.device), True)
            .reshape(x.shape[:-1])
        )

    return (
        counted
        if rule in KEEP_OUT_COUNTS
        else lambda x: massive.rows_rule(unrotated(x), rule, root=massive.KEEP_OUT_ROOT)
    )


def is_integer(spec: EvalSpec) -> bool:
    """Whether both sides of every linear are codes that fit int8, so that it runs as an integer product."""
    return spec.weights.quantizer.bits <= 8 and integer.fits(spec.activations)


@contextmanager
def quantized(built: Built, spec: EvalSpec, *, fake: bool = False) -> Iterator[None]:
    """While the block runs the built model has `spec`'s online rotations, activation and KV quantization and
    keep-out.

    Linears run in integer arithmetic where `is_integer`; `fake` has them compute in float on rounded values
    instead, the same to float rounding. On a GPU they always do: its float products are fast, and the passes
    between int8 products are not (0.11 s a window against 0.31 s on an H100).
    """
    loaded, act, rotated = built.loaded, spec.activations, built.R is not None
    spare = keep_out(spec, built.R) if spec.keep_out else None
    kinds = ["k", "v"] if spec.kv.bits < 16 else []
    r3 = rotated and spec.kv.bits < 16

    def quantize(site: str, x: Tensor) -> Tensor:
        if site.endswith((".k", ".v")):
            return fake_quantize(x, spec.kv)
        if spare is None or not site.endswith("_norm"):
            return fake_quantize(x, act)
        return torch.where(spare(x)[..., None], x, fake_quantize(x, act))

    with ExitStack() as stack:
        if spec.set_massive:
            means = _calibration(spec, loaded)
            stack.enter_context(intervene.massive_set(loaded, spec.set_massive, means))
        in_integers = is_integer(spec) and not fake and loaded.device.type == "cpu"
        if in_integers:
            r4 = surgery.hadamard if rotated else None
            stack.enter_context(integer.integer_linears(loaded, built.codes, act, r4=r4, spare=spare))
        elif act.bits < 16:
            kinds += hooks.LINEAR_INPUTS
        sites = hooks.sites_of(loaded, *kinds) if kinds else ()
        r4_online = rotated and not in_integers
        stack.enter_context(surgery.online(loaded, r3=r3, r4=r4_online, function=quantize, sites=sites))
        yield


@torch.inference_mode()
def window_loss(loaded: LoadedModel, ids: Tensor) -> float:
    """Mean next-token loss in nats of one window of token ids (window,), logits in float32 a few hundred
    tokens at a time.
    """
    head, ids = loaded.model.get_submodule(loaded.roles.lm_head), ids.to(loaded.device)
    hidden = loading.body(loaded)(ids[None], use_cache=False).last_hidden_state[0, :-1]
    total = 0.0
    for part, target in zip(hidden.split(LOGIT_ROWS), ids[1:].split(LOGIT_ROWS), strict=True):
        total += float(torch.nn.functional.cross_entropy(head(part).float(), target, reduction="sum"))
    return total / (len(ids) - 1)


def evaluate(
    spec: EvalSpec,
    store: Store | None = None,
    build_model: Callable[[], Built] | None = None,
    on_part: OnPart = nothing,
) -> EvalResult:
    """The losses `spec` describes, from the store or computed now; a stopped evaluation goes on at the window
    it was at.

    `build_model` supplies the built model when one is needed (so that rows with the same `build_key` can
    share it); by default it is built here. `on_part` is called after each window that is finished and kept,
    and may raise to stop there.
    """
    store, spec = store or Store(), canonical(spec)

    def make(writer: Writer) -> None:
        built = build_model() if build_model else build(spec, store, on_part)
        losses, seconds = _losses(built, spec, windows(spec, built.loaded), writer, on_part)
        writer.save_json("losses", losses)
        writer.note.update(provenance=built.loaded.provenance, scoring_seconds=seconds)

    return _result(spec, store.get_or_make(KIND, inputs(spec), make))


def stored(spec: EvalSpec, store: Store, text_key: TextKey = corpus.fingerprint) -> EvalResult | None:
    """The losses `spec` describes if the store has them, else None; computes nothing. `text_key`, where
    given, remembers fingerprints of texts.
    """
    spec = canonical(spec)
    artefact = store.open(KIND, inputs(spec, text_key))
    return None if artefact is None else _result(spec, artefact)


def inputs(spec: EvalSpec, text_key: TextKey = corpus.fingerprint) -> dict[str, Any]:
    """What an evaluation's artefact is keyed by: the spec, the rotation's identity, and the bytes of model
    and text.
    """
    content = {**spec.to_dict(), "rotation": rotation_key(spec.rotation, text_key)}
    key: dict[str, Any] = {
        "spec": content,
        "model": loading.fingerprint(spec.model),
        "text": text_key(spec.corpus),
    }
    key["calibration"] = text_key(spec.weights.corpus) if spec.weights.method == "gptq" else None
    means = spec.corpus.with_(split="calibration")  # whose massive values' means are set
    return {**key, **({"means": text_key(means)} if spec.set_massive == "mean" else {})}


def windows(spec: EvalSpec, loaded: LoadedModel) -> Tensor:
    """The token ids (windows, window) a spec is scored on; a ValueError where corpus or context has not that
    many.
    """
    loading.check_tokens(loaded, spec.window)
    return corpus.token_blocks(spec.corpus, loaded.tokenizer, blocks=spec.windows, window=spec.window)


def _calibration(spec: EvalSpec, loaded: LoadedModel) -> Tensor:
    """The calibration windows (windows, window) of the spec's own text, as many as it is scored on: where
    mean massive values come from.
    """
    return corpus.token_blocks(
        spec.corpus.with_(split="calibration"), loaded.tokenizer, blocks=spec.windows, window=spec.window
    )


def _result(spec: EvalSpec, artefact: Artefact) -> EvalResult:
    note = artefact.manifest["note"]
    return EvalResult(
        spec, np.array(artefact.json("losses")), float(note["scoring_seconds"]), str(note["provenance"])
    )


def _losses(
    built: Built, spec: EvalSpec, ids: Tensor, writer: Writer, on_part: OnPart
) -> tuple[list[float], float]:
    """Each window's loss and the seconds of all, those of a run that was stopped included."""
    names = [f"window-{i:03d}" for i in range(len(ids))]
    with quantized(built, spec):
        bar = tqdm(names, desc=f"{spec.rotation.name} {spec.bits}", unit="window", leave=False)
        for done, (name, window) in enumerate(zip(bar, ids, strict=True), 1):
            if not writer.has(name):
                started = time.perf_counter()
                loss = window_loss(built.loaded, window)
                writer.save_json(name, [loss, time.perf_counter() - started])
            on_part("window", done, len(ids))
    losses, seconds = zip(*(writer.load_json(name) for name in names), strict=True)
    for name in names:
        writer.drop(name)
    return list(losses), sum(seconds)


def evaluate_all(
    specs: Sequence[EvalSpec],
    store: Store | None = None,
    on_result: Callable[[EvalResult], None] | None = None,
    on_part: OnPart = nothing,
) -> list[EvalResult]:
    """`evaluate` for each spec in turn; neighbours that share a built model build it once, and what is stored
    builds nothing.

    `on_part` is told of each finished window, and of each finished layer of weights; what it raises stops the
    work there, with all that kept.
    """
    store = store or Store()
    last: dict[str, Any] = {}

    def shared(spec: EvalSpec) -> Built:
        key = build_key(spec)
        if last.get("key") != key:
            last.clear()  # frees the model before the next one is built
            last.update(key=key, built=build(spec, store, on_part))
        built: Built = last["built"]
        return built

    results = []
    for spec in specs:
        results.append(evaluate(spec, store, partial(shared, spec), on_part))
        if on_result:
            on_result(results[-1])
    return results
