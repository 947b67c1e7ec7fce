"""Rival rotations: each formula against autograd, torch.optim, scipy or a slow loop; objectives fall; R1 stays a
rotation and leaves the model's function.
"""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from again import FLOAT32, apart, assert_near
from conftest import FAMILIES, tiny_model
from test_evaluate import save_lively, spec_for
from test_offset import C, means, planted
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import hooks, stream, surgery
from dfrot_lab.model.parts import feeds
from dfrot_lab.observe.capture import capture, token_blocks
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.base import MethodSpec
from dfrot_lab.recipe.grids import ACTIVATIONS, KV_CACHE, QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, RotationSpec, recipe_of
from dfrot_lab.rotate import klt, proxy, smoothquant, task
from dfrot_lab.rotate.downhill import Sample, State
from dfrot_lab.rotate.proxy import ProxySpec
from dfrot_lab.rotate.smoothquant import SmoothQuantSpec
from dfrot_lab.rotate.task import TaskSpec
from dfrot_lab.score import build
from dfrot_lab.score.perplexity import evaluate

RIVALS = [row for row in registry.rows() if row not in ("NR", "RO", "RH", "DFRot", "Offset", "Offset+")]


def short(row: str, capture_spec: CaptureSpec, seed: int = 0) -> MethodSpec:
    spec = registry.spec_of(row, seed=seed, capture=capture_spec)
    fields = {"updates": 6, "length": 32}
    return spec.with_(**{name: value for name, value in fields.items() if name in type(spec).model_fields})


@pytest.fixture
def rows_of(text_file, tmp_path):
    base = spec_for(save_lively(tmp_path / "model"), text_file)
    text = CorpusSpec(name=str(text_file), split="calibration")
    return base, CaptureSpec(model=base.model, corpus=text, tokens=64)


@pytest.mark.parametrize("row", RIVALS)
def test_a_rival_leaves_the_model_alone_and_changes_what_is_rounded(row, rows_of, text_file, store):
    base, recorded = rows_of
    rotation = short(row, recorded)
    assert rotation.name == row
    plain = evaluate(base.with_(rotation=RotationSpec(kind="NR")), store)
    assert_near(evaluate(base.with_(rotation=rotation), store).losses, plain.losses, FLOAT32)
    low = spec_for(base.model, text_file, "16-4-16")
    losses = [evaluate(low.with_(rotation=of), store).losses for of in (rotation, RotationSpec())]
    assert apart(*map(torch.from_numpy, losses)) > 1e-4
    assert evaluate(low.with_(rotation=rotation), Store(store.root.parent / "again")).losses == pytest.approx(
        losses[0], rel=1e-6
    )


# ---- two Hadamards, Walsh matrices, principal directions


@pytest.mark.parametrize("channels", [16, 64, 576])
def test_gsr_has_walsh_matrices_in_blocks(channels):
    """By scipy's Sylvester matrix, sorted by changes of sign, which in a Walsh matrix are 0, 1, 2, ..."""
    R, block = rotations.make(RotationSpec(kind="GSR"), channels), math.gcd(channels, 128)
    H = scipy.linalg.hadamard(block)
    changes = (np.diff(H, axis=1) != 0).sum(1)
    assert sorted(changes) == list(range(block))
    expected = scipy.linalg.block_diag(*[H[changes.argsort()] / math.sqrt(block)] * (channels // block))
    np.testing.assert_allclose(R.numpy(), expected, atol=1e-15)
    torch.testing.assert_close(R @ R, torch.eye(channels, dtype=torch.float64))


def test_two_hadamards_spread_a_spike_worse_than_one():
    """What one does to a spike, equal entries, the second undoes (rivals: RHT2 loses RH's advantage)."""
    spike = torch.zeros(1, 576, dtype=torch.float64)
    spike[0, 7] = 1
    one, two = (spike @ rotations.make(RotationSpec(kind=kind), 576) for kind in ("RH", "RHT2"))
    assert one.abs().max() == pytest.approx(576**-0.5) and two.abs().max() > 2 * 576**-0.5
    assert rotations.orthogonality_error(rotations.make(RotationSpec(kind="RHT2"), 576)) < 1e-12


def test_klt_gives_every_channel_the_same_second_moment(rows_of, store):
    _, spec = rows_of
    R, x = klt.principal(klt.KltSpec(capture=spec), store)[0], capture(spec, store).all_rows().double()
    moments = (x @ R).square().mean(0)
    torch.testing.assert_close(moments, moments.mean().expand_as(moments), rtol=1e-5, atol=0)
    U = torch.linalg.svd(x, full_matrices=False).Vh.T
    mixed = (U.T @ R).abs() * math.sqrt(len(R))
    torch.testing.assert_close(mixed, torch.ones_like(mixed), rtol=1e-3, atol=1e-3)


# ---- no rotation


@torch.no_grad()
def test_smoothquant_levels_channels_and_weights_and_rotates_nothing(rows_of, store):
    """With alpha 1/2 a channel's largest value and its column's are then the same."""
    base, recorded = rows_of
    spec = SmoothQuantSpec(capture=recorded)
    plain = base.with_(rotation=RotationSpec(kind="NR"))
    smooth, was = (build.build(of, store) for of in (base.with_(rotation=spec), plain))
    assert smooth.R is None and not smooth.transforms.r4 and set(smooth.transforms.gains)
    rows = {}
    for built in (smooth, was):
        ids = token_blocks(recorded, built.loaded)
        own: dict[str, Tensor] = {}
        with hooks.at_sites(
            built.loaded,
            lambda site, x, own=own: own.update({site: x.flatten(0, -2).clone()}),
            hooks.sites_of(built.loaded, *hooks.NORMS),
        ):
            built.loaded.model(ids)
        rows[built is smooth] = own
    for site, (_, readers) in feeds(smooth.loaded, 0).items():
        largest = rows[True][site].abs().amax(0)
        columns = torch.stack([one.weight.abs().amax(0) for one in readers]).amax(0)
        torch.testing.assert_close(largest, columns, rtol=1e-3, atol=0)
        gain = smooth.transforms.gains[site]
        torch.testing.assert_close(rows[True][site], rows[False][site] * gain.float(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_alpha_0_and_1_leave_one_side_level():
    readers = [torch.nn.Linear(6, 3, bias=False), torch.nn.Linear(6, 4, bias=False)]
    largest = torch.tensor([1.0, 2, 4, 8, 16, 32]).double()
    columns = torch.cat([one.weight for one in readers]).abs().amax(0).double()
    torch.testing.assert_close(smoothquant.smoothing(largest, readers, 1.0), largest)
    torch.testing.assert_close(smoothquant.smoothing(largest, readers, 0.0), 1 / columns)


# ---- proxies


@pytest.mark.parametrize("loss", proxy.LOSSES)
def test_the_slope_of_a_proxy_is_autograd_s(loss):
    y = torch.randn(7, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    y[0, 3] = 30
    weights = torch.rand(7, dtype=torch.float64)

    def plain(y: Tensor) -> Tensor:
        if loss == "whip":
            return (weights * (-y.abs()).exp().sum(1)).sum()
        centred = y - y.mean(1, keepdim=True)
        ratio = centred.pow(4).mean(1) / centred.pow(2).mean(1).square()
        return (weights * (ratio - 1.8).abs()).sum()

    leaf = y.clone().requires_grad_()
    plain(leaf).backward()
    value, slope = proxy.LOSSES[loss](y, weights)
    assert value == pytest.approx(float(plain(y)), rel=1e-12)
    torch.testing.assert_close(slope, leaf.grad, rtol=1e-9, atol=1e-12)


def test_qr_orth_is_sgd_with_momentum_on_z():
    x = torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    start = rotations.make(RotationSpec(kind="RO"), 16)
    Z = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.SGD([Z], lr=0.3, momentum=0.9)
    state = State(start, start, torch.zeros_like(start), start, [])
    for _ in range(4):
        optimiser.zero_grad()
        (weights * (-(x @ torch.linalg.qr(Z).Q).abs()).exp().sum(1)).sum().backward()
        optimiser.step()
        proxy.qr_orth(state, x.T @ proxy.whip(x @ state.R, weights)[1], 0.3)
    torch.testing.assert_close(state.second.abs(), Z.detach().abs(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state.R.abs(), torch.linalg.qr(Z.detach()).Q.abs(), rtol=1e-9, atol=1e-12)
    assert rotations.distance(state.R, start) > 1e-3


@pytest.mark.parametrize("loss", proxy.LOSSES)
def test_a_proxy_falls_and_massive_rows_count_where_they_are_made_to(loss):
    x, mask = planted(heavy=4)
    found = {}
    for heavy in (None, 1.0):
        spec = ProxySpec(loss=loss, massive=heavy, updates=100, rate=0.1)
        result = proxy.descend(Sample(x, proxy.weights(mask, heavy), mask), spec)
        history = result.history
        assert rotations.orthogonality_error(result.R) < 1e-12
        assert history["best"].iloc[-1] < history["objective"].iloc[0]
        found[heavy] = proxy.LOSSES[loss]((x @ result.R)[mask], torch.ones(4).double())[0]
    assert loss == "kurtosis" or found[1.0] < found[None]  # of a spike it is below the uniform one's already


def test_rows_weigh_the_same_or_massive_ones_as_much_as_all_others():
    mask = torch.tensor([True, False, False, False])
    torch.testing.assert_close(proxy.weights(mask, None), torch.full((4,), 0.25).double())
    torch.testing.assert_close(proxy.weights(mask, 1.0), torch.tensor([3, 1, 1, 1]).double() / 6)
    torch.testing.assert_close(proxy.weights(mask, 0.5)[0], proxy.weights(mask, 0.5)[1:].sum() / 2)


def test_whip_alone_pays_with_the_massive_rows():
    x, mask = planted(heavy=4)
    result = proxy.descend(Sample(x, proxy.weights(mask, None), mask), ProxySpec(updates=60, rate=0.1))
    start = rotations.make(RotationSpec(), C)
    before, after = means(x, mask, start), means(x, mask, result.R)
    assert after[0] < before[0]


def test_a_killed_proxy_goes_on_at_its_last_look(rows_of, store, monkeypatch, caplog, tmp_path):
    _, recorded = rows_of
    spec = ProxySpec(capture=recorded, updates=50, rate=0.1)
    save, seen = proxy.downhill.save, []

    def stop(writer, state):
        save(writer, state)
        seen.append(len(state.history))
        if seen[-1] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(proxy.downhill, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        proxy.descended(spec, store)
    monkeypatch.setattr(proxy.downhill, "save", save)
    with caplog.at_level("INFO", "dfrot_lab"):
        resumed = proxy.descended(spec, store)
    assert "going on with the descent at step 25" in caplog.text
    assert_near(resumed.R, proxy.descended(spec, Store(tmp_path / "other")).R, 1e-4)


# ---- the loss of the network


def loud(family: str = "llama"):
    loaded = tiny_model(family)
    for name, parameter in loaded.model.named_parameters():
        if "proj.weight" in name or name == "lm_head.weight":
            parameter.mul_(6)
    surgery.prepare(loaded)
    surgery.rotate_heads(loaded)
    surgery.rotate_down(loaded)
    return loaded


IDS = torch.arange(24) * 7 % 90 + 32
BOTH = {"r3": True, "r4": True, "blocks": (None, None)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", task.NAMES)
def test_the_gradient_is_the_whole_networks(loss, family):
    """By one backward pass through the fused, rounded network in float64, its weights functions of R."""
    loaded = loud(family)
    R = rotations.make(RotationSpec(kind="RO", seed=2), loaded.channels)
    spec = TaskSpec(loss=loss, cache=KV_CACHE.with_(bits=4))
    value, slope = task.gradient(loaded, R, IDS, spec, BOTH)
    leaf = R.clone().requires_grad_()

    def function(site: str, x: Tensor) -> Tensor:
        kind = site.rpartition(".")[2]
        y = x @ leaf.to(x) if kind in hooks.NORMS else x
        grid = spec.cache if kind in hooks.ATTENTION else ACTIVATIONS
        rounded = y + (fake_quantize(y.detach(), grid) - y.detach())
        return rounded @ leaf.to(x).T if kind in hooks.NORMS else rounded

    sites = hooks.sites_of(loaded, *hooks.LINEAR_INPUTS, "k", "v")
    with torch.no_grad(), surgery.online(loaded, r4=True):
        full = loaded.model(IDS[None]).logits[0].double()
    with torch.enable_grad(), surgery.online(loaded, r3=True, r4=True, function=function, sites=sites):
        logits = loaded.model(IDS[None]).logits[0].double()
        if loss == "cross_entropy":
            expected = torch.nn.functional.cross_entropy(logits[:-1], IDS[1:])
        else:
            p = full.softmax(-1)  # of fewer words than TOP all
            expected = (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()
        expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(slope, leaf.grad, rtol=1e-3, atol=1e-4 * float(leaf.grad.abs().max()))


def test_turning_back_what_r1_turns_is_the_rotated_model():
    """The loss that is descended is that of the model with R1 in its weights, its activations rounded."""
    loaded, fused = loud(), loud()
    R = rotations.make(RotationSpec(kind="RO", seed=2), loaded.channels)
    value, _ = task.gradient(loaded, R, IDS, TaskSpec(), BOTH)
    surgery.rotate_residual(fused, R)
    sites = hooks.sites_of(fused, *hooks.LINEAR_INPUTS)
    with surgery.online(fused, r4=True, function=lambda _, x: fake_quantize(x, ACTIVATIONS), sites=sites):
        expected = float(stream.loss(fused, stream.through(fused, [IDS[None]])[0][0], IDS))
    assert value == pytest.approx(expected, rel=1e-3)


def test_a_cayley_step_is_the_cayley_transform_and_goes_down():
    generator = torch.Generator().manual_seed(0)
    R = rotations.make(RotationSpec(kind="RO"), 12)
    slope = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    W = (R @ slope.T - slope @ R.T) / 2
    alpha = 0.05
    exact = torch.linalg.solve(torch.eye(12) - alpha / 2 * W, (torch.eye(12) + alpha / 2 * W) @ R)
    found = task.cayley(R, slope, alpha)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    assert float(((found - R) * slope).sum()) < 0
    far = task.cayley(R, slope, 1e9)
    assert rotations.orthogonality_error(far) < 0.1, "a step is cut to 1 / |W|_1"


@pytest.mark.parametrize("loss", task.NAMES)
def test_the_loss_of_the_network_falls(loss):
    loaded = loud()
    text = torch.arange(120) * 7 % 90 + 32
    spec = TaskSpec(loss=loss, updates=40, length=120, activations=QuantSpec(bits=2, scheme="asymmetric"))
    result = task.descend(loaded, text[None], spec, BOTH)
    history = result.history
    assert rotations.orthogonality_error(result.R) < 1e-12 and len(history) == 40
    assert history["objective"].tail(5).mean() < 0.985 * history["objective"].iloc[0]
    assert history["distance"].iloc[0] == 0 < history["distance"].iloc[-1]


def test_a_killed_descent_of_the_network_goes_on(rows_of, store, monkeypatch, tmp_path):
    base, recorded = rows_of
    spec = TaskSpec(capture=recorded, updates=12, length=32)
    recipe = base.with_(rotation=spec)
    from dfrot_lab.rotate.transforms import Context

    gradient, calls = task.gradient, []

    def stop(*args):
        calls.append(0)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return gradient(*args)

    monkeypatch.setattr(task, "gradient", stop)
    with pytest.raises(KeyboardInterrupt):
        task.descended(spec, Context(recipe, store))
    resumed = task.descended(spec, Context(recipe, store))
    assert len(calls) == 9 + 12 - 5, "it goes on after its fifth step, which was kept"
    whole = task.descended(spec, Context(recipe, Store(tmp_path / "other")))
    assert resumed.history["step"].tolist() == whole.history["step"].tolist()
    assert_near(resumed.R, whole.R, 1e-4)


def test_the_other_hadamards_are_part_of_what_a_descent_is_of(rows_of, store):
    base, recorded = rows_of
    from dfrot_lab.rotate.transforms import Context

    spec = TaskSpec(capture=recorded, updates=2, length=32)
    base = base.with_(rotation=spec)
    for changed in (base, base.with_(mlp_block=4), base.with_(online="none")):
        task.descended(spec, Context(changed, store))
    assert len([artefact for artefact in store.list() if artefact.kind == task.KIND]) == 3


def test_seconds_of_runs_that_were_stopped_count(rows_of, store, monkeypatch):
    _, recorded = rows_of
    spec, save = ProxySpec(capture=recorded, updates=50), proxy.downhill.save

    def stop(writer, state):
        state.seconds = 1000.0
        save(writer, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(proxy.downhill, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        proxy.descended(spec, store)
    monkeypatch.setattr(proxy.downhill, "save", save)
    assert 1000 < proxy.descended(spec, store).seconds < 1100


def test_a_step_that_leads_nowhere_leaves_the_start_and_says_so(caplog):
    x, mask = planted(heavy=4)
    result = proxy.descend(Sample(x, proxy.weights(mask, None), mask), ProxySpec(rate=1e300, updates=25))
    torch.testing.assert_close(result.R, rotations.make(RotationSpec(), C))
    assert "no step lowered the objective" in caplog.text


def test_the_rule_moves_no_row_that_counts_every_row_the_same(rows_of, store):
    _, recorded = rows_of
    one, other = (
        proxy.descended(ProxySpec(capture=recorded, updates=10, rule=rule), store).R
        for rule in ("ratio_8", "ro_vs_nr")
    )
    assert torch.equal(one, other)


def test_gsr_says_where_it_turns_nothing_and_has_no_seed(caplog):
    rotations.make(RotationSpec(kind="GSR"), 81)
    assert "what is 81 wide is rotated not at all" in caplog.text
    first, second = (recipe_of("4-4-4", rotation=RotationSpec(kind="GSR", seed=seed)) for seed in (0, 5))
    assert first.canonical() == second.canonical()


@pytest.mark.parametrize(("made", "fields", "said"), [
    (ProxySpec, {"loss": "x"}, r"ProxySpec\.loss must be one of whip, kurtosis; got 'x'"),
    (ProxySpec, {"massive": 0}, r"ProxySpec\.massive must be None or > 0; got 0"),
    (ProxySpec, {"rate": -1}, r"ProxySpec\.rate must be None or > 0; got -1"),
    (TaskSpec, {"length": 1}, r"TaskSpec\.length must be a whole number >= 2; got 1"),
    (TaskSpec, {"updates": 0}, r"TaskSpec\.updates must be a whole number >= 1; got 0"),
    (TaskSpec, {"capture": CaptureSpec(tokens=1)}, r"TaskSpec\.capture must be of 2 tokens or more"),
    (TaskSpec, {"activations": QuantSpec(bits=16)}, r"TaskSpec\.activations must be per_token, of fewer"),
])  # fmt: skip
def test_errors_name_the_field_the_rule_and_the_value(made, fields, said):
    with pytest.raises(ValueError, match=said):
        made(**fields)
