"""Weights that know their inputs: GPTAQ, QEP and FOEM against their definitions, what they are told of a model, and
calibration on activations that are rounded.
"""

import pytest
import torch
from conftest import LAYERS
from test_families import folder_of as family_folder
from test_gptq import UNCLIPPED, fresh, gaussian, linears, moved, stop_after_a_layer, weight_spec
from test_stream import folder_of, recipe
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.quantizers import clip_ratios, dequantize
from dfrot_lab.model import corpus, door, hooks, surgery
from dfrot_lab.recipe import keys, registry
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import WeightSpec
from dfrot_lab.score import build
from dfrot_lab.weights import calibrate, foem, gptaq, gptq, lwc, qep, rtn
from dfrot_lab.weights.gptq import Seen
from dfrot_lab.weights.run import quantize_weights

DRIFTING = {"gptaq": gptaq, "qep": qep}
FINE = UNCLIPPED.with_(quantizer=QuantSpec(bits=16, granularity="per_channel"), damping=1e-9)
"""So many codes that rounding is nothing: what is left is what a correction does."""


def inputs(channels: int, tokens: int = 900, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What full precision has (tokens, channels), and the quantized model: some of it lost, some noise."""
    full = gaussian(tokens, channels, seed=seed) @ gaussian(channels, channels, seed=seed + 1)
    turned = torch.eye(channels) + 0.1 * gaussian(channels, channels, seed=seed + 2) / channels**0.5
    return full, full @ turned + 0.1 * full.std() * gaussian(tokens, channels, seed=seed + 3)


def seen(full: Tensor, x: Tensor) -> Seen:
    return Seen(x.T @ x, (full - x).T @ x)


def lost(weight: Tensor, made: Tensor, full: Tensor, x: Tensor) -> float:
    """How far the outputs are from full precision's, squared."""
    return float((full @ weight.T - x @ made.T).square().sum())


# ---- one matrix


@pytest.mark.parametrize("channels", [20, 128, 150])
def test_gptaq_equals_its_definition(channels):
    """The paper's loop, column by column and in float64: below, at and above a block of 128."""
    weight, (full, x) = gaussian(12, channels), inputs(channels)
    about, spec = seen(full, x), UNCLIPPED.with_(correction=0.6)
    found = gptaq.quantize(weight, about, spec)
    factor = gptq.inverse_factor(about.hessian, spec.damping).double()
    drag = 0.6 * torch.triu(about.drift.double() @ factor.T, 1) @ factor
    w, made = weight.double().clone(), torch.zeros(12, channels, dtype=torch.float64)
    for j in range(channels):
        made[:, j] = (w[:, j] / found.scale[:, 0].double()).round().clamp(-8, 7)
        error = (w[:, j] - made[:, j] * found.scale[:, 0].double()) / factor[j, j]
        w[:, j + 1 :] += torch.outer(w[:, j], drag[j, j + 1 :]) - torch.outer(error, factor[j, j + 1 :])
    assert (found.codes.double() == made).double().mean() > 0.98


def test_qep_is_the_least_squares_fit_of_full_precision_s_outputs(monkeypatch):
    """All of the drift made good, nothing damped, nothing rounded: `torch.linalg.lstsq` of x on W x0."""
    monkeypatch.setattr(qep, "DAMPING", 1e-12)
    weight, (full, x) = gaussian(6, 40), inputs(40)
    found = qep.quantize(weight, seen(full, x), FINE.with_(correction=1.0))
    expected = torch.linalg.lstsq(x.double(), full.double() @ weight.double().T).solution.T
    torch.testing.assert_close(dequantize(found, weight.shape).double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("channels", [20, 128, 150])
def test_foem_equals_its_definition(channels):
    """Column by column and in float64: drawn back to its first value, rounded, its error spread."""
    weight, (_, x) = gaussian(12, channels), inputs(channels)
    spec = UNCLIPPED.with_(correction=0.3)
    found = foem.quantize(weight, Seen(x.T @ x), spec)
    factor, scale = gptq.inverse_factor(x.T @ x, spec.damping).double(), found.scale[:, 0].double()
    w, made = weight.double().clone(), torch.zeros(12, channels, dtype=torch.float64)
    for j in range(channels):
        w[:, j] -= 0.3 * (w[:, j] - weight[:, j])
        made[:, j] = (w[:, j] / scale).round().clamp(-8, 7)
        error = (w[:, j] - made[:, j] * scale) / factor[j, j]
        w[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    assert (found.codes.double() == made).double().mean() > 0.99


def test_foem_goes_from_gptq_to_rounding_to_nearest():
    weight, (_, x) = gaussian(12, 150), inputs(150)
    gone = [
        foem.quantize(weight, Seen(x.T @ x), WeightSpec(correction=part)).codes for part in (0.0, 0.5, 1.0)
    ]
    assert torch.equal(gone[0], gptq.quantize(weight, Seen(x.T @ x), WeightSpec()).codes)
    assert torch.equal(gone[2], rtn.quantize(weight, None, WeightSpec()).codes)
    assert not any(torch.equal(gone[1], end) for end in (gone[0], gone[2]))
    with pytest.raises(ValueError, match=r"foem\.seen must have the Hessian of the layer's inputs; got None"):
        foem.quantize(weight, None, WeightSpec())


GROUPED = QuantSpec(granularity="per_group", group_size=20)


@pytest.mark.parametrize("grid", [WeightSpec().quantizer, GROUPED, GROUPED.with_(bits=2)])
def test_lwc_takes_the_clip_of_least_error_of_what_is_computed(grid):
    """A slow loop over channels, groups and clips, on the inputs themselves, in float64."""
    weight, (x, _) = gaussian(7, 60), inputs(60)
    found = lwc.quantize(weight, Seen(x.T @ x), WeightSpec(quantizer=grid))
    size, top = grid.group_size or 60, 2 ** (grid.bits - 1)
    groups = [(row[n : n + size], x[:, n : n + size]) for row in weight.double() for n in range(0, 60, size)]
    for (w, rows), scale, chosen in zip(groups, found.scale[:, 0], found.codes, strict=True):
        tried = {}
        for ratio in clip_ratios(grid.bits):
            step = float(w.abs().max()) / (top - 1) * ratio
            made = (w / step).round().clamp(-top, top - 1)
            tried[float((rows.double() @ (made * step - w)).square().sum())] = step, made
        step, made = tried[min(tried)]
        assert float(scale) == pytest.approx(step, rel=1e-5) and torch.equal(chosen.double(), made)


def test_lwc_of_inputs_that_are_alike_is_rounding_to_nearest():
    weight, (x, _) = gaussian(12, 60), inputs(60)
    alike, plain = (lwc.quantize(weight, Seen(h), WeightSpec()) for h in (torch.eye(60), x.T @ x))
    nearest = rtn.quantize(weight, None, WeightSpec())
    assert torch.equal(alike.codes, nearest.codes) and torch.equal(alike.scale, nearest.scale)
    assert lost(weight, dequantize(plain, weight.shape), x, x) < lost(
        weight, dequantize(nearest, weight.shape), x, x
    )
    unclipped = lwc.quantize(weight, Seen(x.T @ x), UNCLIPPED)
    assert torch.equal(unclipped.codes, rtn.quantize(weight, None, UNCLIPPED).codes)
    with pytest.raises(ValueError, match=r"lwc\.seen must have the Hessian"):
        lwc.quantize(weight, None, WeightSpec())


@pytest.mark.parametrize("method", DRIFTING)
def test_without_a_correction_or_a_drift_they_are_gptq(method):
    weight, (full, x) = gaussian(8, 60), inputs(60)
    plain = gptq.quantize(weight, seen(full, x), WeightSpec()).codes
    without = DRIFTING[method].quantize(weight, seen(full, x), WeightSpec(correction=0.0)).codes
    still = DRIFTING[method].quantize(weight, seen(x, x), WeightSpec()).codes
    assert torch.equal(plain, without) and torch.equal(plain, still)


@pytest.mark.parametrize("method", DRIFTING)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_nearer_full_precision_s_than_gptq_s_on_other_tokens_too(method, seed):
    weight, (full, x) = gaussian(16, 64, seed=seed), inputs(64, 1800, seed)
    about = seen(full[:900], x[:900])
    made = [m.quantize(weight, about, WeightSpec()) for m in (DRIFTING[method], gptq)]
    apart = [lost(weight, dequantize(each, weight.shape), full[900:], x[900:]) for each in made]
    assert apart[0] < 0.97 * apart[1]


@pytest.mark.parametrize("method", DRIFTING)
@pytest.mark.parametrize("about", [None, Seen(torch.eye(8))], ids=["nothing", "no drift"])
def test_a_drift_is_needed(method, about):
    with pytest.raises(ValueError, match=rf"{method}\.seen must have the drift of the layer's inputs; got"):
        DRIFTING[method].quantize(gaussian(4, 8), about, WeightSpec())


# ---- a model


class Told:
    """A weight quantizer that notes what it is told, and rounds by GPTQ."""

    CALIBRATED, DRIFT, VERSION = True, True, 1

    def __init__(self) -> None:
        self.of: list[Seen] = []

    def quantize(self, weight, about, spec):
        self.of.append(Seen(about.hessian.clone(), about.drift.clone()))
        return gptq.quantize(weight, about, spec)


@pytest.fixture
def told(monkeypatch):
    found, load = Told(), registry.load
    monkeypatch.setitem(registry.WEIGHTS, "told", registry.Choice("told"))
    monkeypatch.setattr(
        registry, "load", lambda table, name, *of: found if name == "told" else load(table, name, *of)
    )
    return found


def read(loaded, ids, *, r4: bool, then=None) -> dict[str, Tensor]:
    """What each site has (tokens, channels), in the order of the pass."""
    found: dict[str, Tensor] = {}

    def note(site: str, x: Tensor) -> Tensor | None:
        new = then(site, x) if then else None
        found[site] = (x if new is None else new).reshape(-1, x.shape[-1]).clone()
        return new

    sites = hooks.sites_of(loaded, *hooks.LINEAR_INPUTS)
    with surgery.online(loaded, r4=r4, function=note, sites=sites), torch.no_grad():
        loaded.model(ids)
    return found


@pytest.mark.parametrize("lots", [1, 3], ids=["at once", "in lots"])
def test_the_drift_is_from_the_model_before_to_the_model_as_quantized_so_far(
    told, lots, text_file, store, monkeypatch
):
    monkeypatch.setattr(calibrate, "windows_at_once", lambda _window, _width: 3 // lots)
    loaded, original = fresh(rotated=True), fresh(rotated=True)
    spec = weight_spec(text_file, method="told")
    quantize_weights(loaded, spec, {"by": "told"}, store, r4=True)
    ids = corpus.sampled_blocks(spec.corpus, loaded.tokenizer, blocks=3, window=40, sample=None)
    full, now = read(original, ids, r4=True), read(loaded, ids, r4=True)
    assert len(told.of) == len(full) == 4 * LAYERS
    for site, about in zip(sorted(full, key=order), told.of, strict=True):
        expected = seen(full[site], now[site])
        for found, own in zip(about[:2], expected[:2], strict=True):
            torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-3 * float(own.abs().max() + 1e-3))


def order(site: str) -> tuple[int, int]:
    """A site's place in the pass."""
    _, number, kind = site.split(".")
    return int(number), ("input_norm", "o_proj_in", "post_attention_norm", "down_proj_in").index(kind)


@pytest.mark.parametrize("method", DRIFTING)
def test_a_stopped_run_goes_on_with_the_same_drift(text_file, store, tmp_path, monkeypatch, method):
    """In both: where layers are kept, and where the hidden states after them are, too."""
    spec = weight_spec(text_file, method=method)
    stop_after_a_layer(monkeypatch)
    monkeypatch.setattr(calibrate.stream, "SAVE_AFTER", -1.0)
    stopped = fresh()
    with pytest.raises(KeyboardInterrupt):
        quantize_weights(stopped, spec, {"model": "tiny"}, store, r4=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stopped.model.modules())
    monkeypatch.undo()
    resumed, whole = fresh(), fresh()
    quantize_weights(resumed, spec, {"model": "tiny"}, store, r4=False)
    quantize_weights(whole, spec, {"model": "tiny"}, Store(tmp_path / "one go"), r4=False)
    for name, weight in linears(resumed).items():
        assert moved(weight, linears(whole)[name]) < 0.03, name


def test_rounded_calibration_sees_what_the_quantized_model_sends(told, tmp_path, text_file, store):
    """Activations, keys and values rounded, and nothing else: each Hessian is of what the built model, while
    it is quantized, has at that site for the calibration text.
    """
    spec = recipe(folder_of(tmp_path / "m"), text_file, "4-4-4", weights="gptq")
    spec = spec.with_(weights=spec.weights.with_(method="told", rounded=True))
    built = build.build(spec, store)
    own = spec.weights
    of = {"blocks": own.windows, "window": own.window, "sample": own.sample}
    ids = corpus.sampled_blocks(own.corpus, built.loaded.tokenizer, **of)
    with build.quantized(built, spec, fake=True):
        now = read(built.loaded, ids, r4=False)
    for site, about in zip(sorted(now, key=order), told.of, strict=True):
        expected = now[site].T @ now[site]
        torch.testing.assert_close(about.hessian, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("method", DRIFTING)
def test_experts_are_refused_before_anything_is_kept(method, tmp_path, text_file, store):
    spec = recipe(family_folder("mixtral", tmp_path / "m"), text_file, "4-4-16", weights=method)
    with pytest.raises(ValueError, match=f"the model must be without experts for {method}"):
        build.build(spec, store)
    assert not [artefact for artefact in store.list() if artefact.kind == "weights"]


# ---- what they are named by


def key(spec) -> str:
    return keys.content_key(keys.weights(door.resolved(spec).canonical(), door.prints))


def test_weights_are_named_by_the_activations_they_were_calibrated_on(tmp_path, text_file):
    spec = recipe(folder_of(tmp_path / "m"), text_file, "4-4-16", weights="gptq")
    rounded = spec.with_(weights=spec.weights.with_(rounded=True))
    other = {"activations": QuantSpec(bits=5, scheme="asymmetric")}
    assert key(spec) == key(spec.with_(**other)) != key(rounded)
    assert key(rounded) != key(rounded.with_(**other))
    kept = {"keep_out": "nr_error_9.5"}
    assert key(spec) == key(spec.with_(**kept)) and key(rounded) != key(rounded.with_(**kept))


def test_what_has_no_effect_is_not_in_a_name(tmp_path, text_file):
    spec = recipe(folder_of(tmp_path / "m"), text_file, "4-16-16", weights="gptq")
    for changes in ({"rounded": True}, {"correction": 0.3}):
        assert key(spec) == key(spec.with_(weights=spec.weights.with_(**changes)))
    drifting = spec.with_(weights=spec.weights.with_(method="qep"))
    assert key(drifting) != key(drifting.with_(weights=drifting.weights.with_(correction=0.3)))


def test_quantizers_that_ask_for_the_drift_see_rounded_activations_unless_told_otherwise(tmp_path, text_file):
    spec = recipe(folder_of(tmp_path / "m"), text_file, "4-4-16", weights="qep")
    rounded, as_they_are = (
        spec.with_(weights=spec.weights.with_(rounded=value)).canonical() for value in (True, False)
    )
    assert spec.canonical() == rounded == rounded.canonical() and rounded.weights.rounded is True
    assert as_they_are == as_they_are.canonical() != rounded and not as_they_are.weights.sees_rounded
    plain = spec.with_(weights=spec.weights.with_(method="gptq"))
    unrounded = plain.with_(weights=plain.weights.with_(rounded=False))
    assert plain.canonical() == unrounded.canonical() and plain.canonical().weights.rounded is None
