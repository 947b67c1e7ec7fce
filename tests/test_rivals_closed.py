"""Rivals that no network's loss and no text's proxy leads: OptRot, DuQuant's greedy steps, AWQ and OS+. Each formula
against autograd or a slow loop, its own objective through the real surgery, and logits that stay.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHANNELS, tiny_model
from test_evaluate import save_lively, spec_for
from test_families import apart, folder_of, logits_of
from test_offset import planted
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import checkpoint, loading, surgery
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.model.parts import feeds
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.base import MethodSpec
from dfrot_lab.recipe.grids import ACTIVATIONS, SYM4, QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, Recipe, RotationSpec
from dfrot_lab.rotate import downhill, duquant, offset, optrot, scale_search
from dfrot_lab.rotate.downhill import Sample
from dfrot_lab.rotate.duquant import DuQuantSpec
from dfrot_lab.rotate.optrot import OptRotSpec
from dfrot_lab.rotate.scale_search import ScaleSearchSpec
from dfrot_lab.rotate.transforms import Context
from dfrot_lab.score import build
from dfrot_lab.score.build import Built

ROWS = ("OptRot", "DuQuant R1", "AWQ", "OS+")
IDS = torch.arange(2 * 24).reshape(2, 24) * 7 % 90 + 32
C = 64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotated_by(row: str, model: ModelSpec, text_file, **options: object) -> Recipe:
    """A recipe at 16 bits whose rotation is the row's, of few steps, on 64 tokens."""
    text = CorpusSpec(name=str(text_file), split="calibration")
    spec: MethodSpec = registry.spec_of(row, capture=CaptureSpec(model=model, corpus=text, tokens=64))
    few = {"updates": 5} if "updates" in type(spec).model_fields else {}
    spec = spec.with_(**(few | options))
    return spec_for(model, text_file).with_(rotation=spec, windows=1)


@pytest.fixture
def lively(tmp_path) -> ModelSpec:
    return save_lively(tmp_path / "lively")


# ---- all of them


def built_each_way(
    row: str, case: str, folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Built, Tensor]]:
    """A family's model, in float64, built with a rotation as a whole and layer by layer; the logits before."""
    model = ModelSpec(source=str(folder_of(case, folder / "m")), dtype="float64")
    expected = logits_of(loading.load_model(model), IDS)
    for memory in ("", "0"):
        monkeypatch.setenv(checkpoint.MEMORY, memory)
        built = build.build(rotated_by(row, model, text_file), Store(folder / f"store{memory}"))
        assert (built.loaded.checkpoint is not None) == (memory == "0")
        yield built, expected


@pytest.mark.parametrize("case", ["mixtral", "starcoder2"])
@pytest.mark.parametrize("row", ROWS)
def test_the_logits_stay_and_a_streamed_model_gets_the_same(row, case, tmp_path, text_file, monkeypatch):
    """In float64, through the surgery of a build; most norms work in float32 all the same."""
    made = []
    for built, expected in built_each_way(row, case, tmp_path, text_file, monkeypatch):
        made.append(own := built.transforms)
        with surgery.online(built.loaded, r3=own.r3, r4=own.r4):
            assert apart(logits_of(built.loaded, IDS), expected) < 1e-5
    if row in ("AWQ", "OS+"):
        assert own.R1 is None and not own.r4 and any(gain.std() > 0 for gain in own.gains.values())
    else:
        assert own.r4 and not own.gains and rotations.orthogonality_error(own.R1) < 1e-12
    for name in own.gains:
        torch.testing.assert_close(made[0].gains[name], own.gains[name], rtol=1e-5, atol=0)
    if own.R1 is not None:
        torch.testing.assert_close(made[0].R1, own.R1, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("made", "fields", "said"), [
    (OptRotSpec, {"updates": 0}, r"OptRotSpec\.updates must be a whole number >= 1; got 0"),
    (OptRotSpec, {"rows": 0}, r"OptRotSpec\.rows must be a whole number >= 1; got 0"),
    (DuQuantSpec, {"seed": -1}, r"DuQuantSpec\.seed must be a whole number in 0\.\.2\^63; got -1"),
    (DuQuantSpec, {"rule": "x"}, r"DuQuantSpec\.rule must be one of ratio_8, .*; got 'x'"),
    (ScaleSearchSpec, {"scales": "x"}, r"ScaleSearchSpec\.scales must be one of powers, thresholds; got 'x'"),
    (ScaleSearchSpec, {"weights": SYM4}, r"ScaleSearchSpec\.weights must be per_channel, of fewer than 16"),
    (ScaleSearchSpec, {"activations": QuantSpec(granularity="per_channel")},
     r"ScaleSearchSpec\.activations must be per_token; got"),
])  # fmt: skip
def test_errors_name_the_field_the_rule_and_the_value(made, fields, said):
    with pytest.raises(ValueError, match=said):
        made(**fields)


# ---- OptRot


def test_the_slope_of_fourth_powers_is_autograd_s():
    y, weights = draw(7, C), torch.rand(7, dtype=torch.float64)
    leaf = y.clone().requires_grad_()
    (weights * leaf.pow(4).sum(1)).sum().backward()
    value, slope = optrot.fourth_powers(y, weights)
    assert value == pytest.approx(float((weights * y.pow(4).sum(1)).sum()), rel=1e-12)
    torch.testing.assert_close(slope, leaf.grad, rtol=1e-12, atol=0)


def sample_of(rows: Tensor) -> Sample:
    return Sample(rows, torch.ones(len(rows)).double(), torch.zeros(len(rows), dtype=torch.bool))


def test_optrot_makes_one_direction_as_flat_as_there_is():
    """Of C squares that sum to 1 the squares sum to 1 / C at least, where all are the same."""
    rows = (draw(40, 1) / 3) @ torch.nn.functional.normalize(draw(1, C, seed=1))
    found = optrot.descend(sample_of(rows), OptRotSpec(updates=200))
    least = float(rows.square().sum(1).square().sum()) / C
    assert rotations.orthogonality_error(found.R) < 1e-12
    assert found.history["objective"].iloc[0] > 2 * least
    assert found.history["best"].iloc[-1] == pytest.approx(least, rel=0.02)


def test_optrot_falls_on_rows_with_outliers():
    rows = draw(600, C)
    rows[:60] += 8 * rotations.make(RotationSpec(kind="RO", seed=1), C)[:60]
    found = optrot.descend(sample_of(rows), OptRotSpec(updates=60))
    assert found.history["best"].iloc[-1] < 0.97 * found.history["objective"].iloc[0]
    assert found.history["best"].is_monotonic_decreasing


def turned_weights(loaded: LoadedModel) -> float:
    """The sum of fourth powers of all weights of a built model that are rounded, those alone that R1 turned."""
    total = 0.0
    for layer in loaded.layers:
        wrote = {loaded.roles.o, *loaded.roles.downs(layer)} if loaded.roles.online else set()
        own = [linear(layer, name).weight for name in loaded.roles.linears(layer) if name not in wrote]
        total += sum(float(weight.double().pow(4).sum()) for weight in own)
    return total


@pytest.mark.parametrize("case", ["qwen2_moe", "phi3", "gemma2", "opt"])
def test_what_optrot_lowers_is_the_sum_over_the_built_model_s_weights(case, tmp_path, text_file, store):
    """Readers and writers, R2 and R4 in them, no router; where R1 is online what reads alone."""
    model = ModelSpec(source=str(folder_of(case, tmp_path / "m")), dtype="float64")
    recipe = rotated_by("OptRot", model, text_file)
    found = optrot.descended(recipe.rotation, Context(recipe, store))
    sums = [
        turned_weights(build.build(recipe.with_(rotation=of), store).loaded)
        for of in (RotationSpec(), recipe.rotation)
    ]
    assert sums == pytest.approx(
        [found.history["objective"].iloc[0], found.history["best"].iloc[-1]], rel=1e-5
    )
    assert sums[1] < 0.999 * sums[0]


def test_rows_that_are_drawn_stand_for_all(lively):
    loaded = tiny_model()
    surgery.prepare(loaded)
    whole = optrot.drawn(loaded, OptRotSpec())
    part = optrot.drawn(loaded, OptRotSpec(rows=100))
    assert part.rows.shape == (100, CHANNELS) and len(whole.rows) == int(whole.weights.sum())
    assert float(part.weights.sum()) == pytest.approx(len(whole.rows))
    at = [int((whole.rows == row).all(1).nonzero()[0]) for row in part.rows]
    assert len(set(at)) == 100, "rows of the weights, none twice"


def test_optrot_hangs_on_the_model_and_on_no_text(tmp_path, text_file, store):
    one, other = (save_lively(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    assert registry.spec_of("OptRot", capture=CaptureSpec(tokens=32)) == OptRotSpec()
    found = []
    for model in (one, other):
        recipe = rotated_by("OptRot", model, text_file)
        found.append(optrot.descended(recipe.rotation, Context(recipe, store)).R)
    assert rotations.distance(*found) > 1e-3


def test_a_killed_optrot_goes_on_at_its_last_look(lively, text_file, store, monkeypatch, caplog, tmp_path):
    recipe = rotated_by("OptRot", lively, text_file, updates=50)
    save, seen = downhill.save, []

    def stop(writer, state):
        save(writer, state)
        seen.append(state)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(downhill, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        optrot.descended(recipe.rotation, Context(recipe, store))
    monkeypatch.setattr(downhill, "save", save)
    with caplog.at_level("INFO", "dfrot_lab"):
        resumed = optrot.descended(recipe.rotation, Context(recipe, store)).R
    assert "going on with the descent at step 25" in caplog.text
    whole = optrot.descended(recipe.rotation, Context(recipe, Store(tmp_path / "other"))).R
    torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-4)


# ---- DuQuant


@pytest.mark.parametrize("channels", [1, 2, 64])
def test_b_is_helmert_s_matrix_with_all_rows_but_the_first_turned(channels):
    """Its rows by the definition: 1, ..., 1, -k, 0, ..., scaled to length 1; the first is constant, so a step
    spreads its channel evenly.
    """
    H = np.full((channels, channels), channels**-0.5)
    for k in range(1, channels):
        H[k] = [*[1] * k, -k, *[0] * (channels - k - 1)]
        H[k] /= np.linalg.norm(H[k])
    B = duquant.base(channels, seed=3)
    assert rotations.orthogonality_error(B) < 1e-12
    torch.testing.assert_close(B[0], torch.full((channels,), channels**-0.5).double())
    turn = B.numpy() @ H.T
    np.testing.assert_allclose(turn[0], np.eye(channels)[0], atol=1e-12)
    assert channels < 3 or np.abs(turn[1:, 1:] - np.eye(channels - 1)).max() > 0.3
    assert channels < 3 or not torch.equal(B, duquant.base(channels, seed=4))


def slow_steps(rows: np.ndarray, B: np.ndarray, count: int) -> list[tuple[int, np.ndarray, float]]:
    """Of each prefix of greedy steps its last channel, its product and the range after it."""
    R, found = np.eye(len(B)), []
    for _ in range(count):
        y = rows @ R
        channel = int(np.unravel_index(np.abs(y).argmax(), y.shape)[1])
        E = np.eye(len(B))
        E[[0, channel]] = E[[channel, 0]]
        R = R @ E @ B @ E
        found.append((channel, R, float(np.ptp(rows @ R))))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_greedy_steps_are_those_of_a_slow_loop_and_the_prefix_of_smallest_range_is_kept(seed):
    x, _ = planted(seed, heavy=4)
    B = duquant.base(C, seed)
    slow = slow_steps(x.numpy(), B.numpy(), 20)
    best = min(range(20), key=lambda step: slow[step][2])
    channels = duquant.greedy(x, B, 20)
    assert channels == [channel for channel, *_ in slow[: best + 1]] and 0 < best < 19
    R = duquant.product(B, channels)
    np.testing.assert_allclose(R.numpy(), slow[best][1], atol=1e-12)
    y = x @ R
    assert y.max() - y.min() < 0.5 * (x.max() - x.min())


def test_where_no_step_helps_nothing_is_turned_and_that_is_said(
    lively, text_file, store, monkeypatch, caplog
):
    rows = torch.where(draw(50, C) > 0, 1.0, -1.0)
    assert duquant.greedy(rows, duquant.base(C, 0), 5) == []
    monkeypatch.setattr(duquant, "greedy", lambda *_: [])
    assert torch.equal(
        duquant.spread(rotated_by("DuQuant R1", lively, text_file).rotation, store)[0], torch.eye(C).double()
    )
    assert "DuQuant R1 turns nothing" in caplog.text
    assert torch.equal(duquant.product(duquant.base(C, 0), []), torch.eye(C).double())


def test_the_steps_see_all_massive_rows_and_some_others(lively, text_file, store, monkeypatch):
    recipe = rotated_by("DuQuant R1", lively, text_file)
    recorded = capture(recipe.rotation.capture, store)
    mask = massive.find(recorded, recipe.rotation.rule).flatten()
    seen: list[Tensor] = []
    monkeypatch.setattr(offset, "ROWS", 10)
    monkeypatch.setattr(duquant, "greedy", lambda rows, *_: seen.append(rows) or [3])
    R, seconds = duquant.spread(recipe.rotation, store)
    every = {tuple(row) for row in seen[0].tolist()}
    assert len(seen[0]) == int(mask.sum()) + 10 and mask.any() and seconds > 0
    assert {tuple(row) for row in recorded.all_rows()[mask].tolist()} <= every
    B = duquant.base(CHANNELS, 0)
    torch.testing.assert_close(R, duquant.turned(torch.eye(CHANNELS).double(), B, 3))


# ---- AWQ and OS+


def test_awq_tries_powers_of_the_mean_and_os_plus_thresholds_of_the_largest():
    rows = draw(30, 8) * torch.arange(1, 9)
    mean, top = rows.abs().mean(0), rows.abs().amax(0)
    powers = list(scale_search.tried(rows, "powers"))
    assert len(powers) == 20 and torch.equal(powers[0], torch.ones(8).double())
    for a, s in zip(np.arange(20) / 20, powers, strict=True):
        torch.testing.assert_close(s / s[0], (mean / mean[0]) ** a)
        assert float(s.max() * s.min()) == pytest.approx(1)
    thresholds = list(scale_search.tried(rows, "thresholds"))
    assert torch.equal(thresholds[0], torch.ones(8).double())
    for s in thresholds:
        level = (top / s).max()
        torch.testing.assert_close(s, torch.where(top > level, top / level, 1))
    torch.testing.assert_close(top / thresholds[-1], torch.full((8,), 0.1).double())


def slow_error(rows: Tensor, weight: Tensor, s: Tensor, spec: ScaleSearchSpec) -> float:
    """By the quantizer's formula written out, output by output."""
    scaled = weight * s
    step = scaled.abs().amax(1, keepdim=True) / 7
    rounded = (scaled / step).round().clamp(-8, 7) * step
    total = 0.0
    for x in rows:
        seen = x / s
        if spec.activations.bits < 16:
            low, high = min(float(seen.min()), 0), max(float(seen.max()), 0)
            unit = (high - low) / 15
            zero = -round(low / unit)
            seen = (((seen / unit).round() + zero).clamp(0, 15) - zero) * unit
        total += float((rounded @ seen - weight @ x).square().sum())
    return total


def problem() -> tuple[Tensor, Tensor]:
    """Rows with a channel that is large in all of them, and weights."""
    rows, weight = draw(24, 16), draw(12, 16, seed=1)
    rows[:, 5] = 12 + rows[:, 5]
    return rows, weight


@pytest.mark.parametrize("row", ["AWQ", "OS+"])
def test_the_scales_are_those_of_least_error_by_a_slow_loop(row):
    spec, (rows, weight) = registry.spec_of(row), problem()
    each = {slow_error(rows, weight, s, spec): s for s in scale_search.tried(rows, spec.scales)}
    found = scale_search.searched(rows, weight, spec)
    torch.testing.assert_close(found, each[min(each)])
    none = slow_error(rows, weight, torch.ones(16), spec)
    assert min(each) < (0.9 if row == "AWQ" else 0.5) * none
    assert found[5] > 1.5 * found.median()


def test_awq_rounds_weights_alone_and_os_plus_inputs_too():
    awq, plus = (registry.spec_of(row) for row in ("AWQ", "OS+"))
    assert awq.activations.bits == 16 and plus.activations == ACTIVATIONS
    assert awq.weights == plus.weights == QuantSpec(granularity="per_channel")


@torch.no_grad()
@pytest.mark.parametrize("row", ["AWQ", "OS+"])
def test_what_the_linears_of_a_built_model_compute_is_nearer_with_the_scales(row, lively, text_file, store):
    """On the rows searched on, weights and inputs rounded as the search has them."""
    recipe = rotated_by(row, lively, text_file)
    spec = recipe.rotation
    recorded = capture(spec.capture, store)
    plain = build.build(recipe.with_(rotation=RotationSpec(kind="NR")), store)
    scaled = build.build(recipe, store)
    assert set(scaled.transforms.gains) == set(recorded.sites)
    errors = {False: 0.0, True: 0.0}
    for number in range(len(plain.loaded.layers)):
        pairs = zip(*(feeds(built.loaded, number).items() for built in (plain, scaled)), strict=True)
        for (site, (_, was)), (_, (_, now)) in pairs:
            rows = recorded.rows(site)[:: scale_search.EVERY]
            gain = scaled.transforms.gains[site].float()
            for before, after in zip(was, now, strict=True):
                for readers, x in ((before, rows), (after, rows * gain)):
                    y = fake_quantize(x, spec.activations) @ fake_quantize(readers.weight, spec.weights).T
                    errors[readers is after] += float((y - rows @ before.weight.T).square().sum())
    assert errors[True] < 0.9 * errors[False]


def test_no_router_is_rounded_in_the_search(tmp_path, text_file, store, monkeypatch):
    model = ModelSpec(source=str(folder_of("mixtral", tmp_path / "m")))
    seen: list[int] = []
    monkeypatch.setattr(
        scale_search,
        "searched",
        lambda rows, weight, _spec: seen.append(len(weight)) or torch.ones(rows.shape[1]),
    )
    build.build(rotated_by("AWQ", model, text_file), store)
    assert seen == [64 + 32 + 32, 4 * 2 * 96] * 3


@pytest.mark.parametrize("row", ["SmoothQuant", "AWQ", "OS+"])
def test_norms_without_gains_hold_no_scales_and_that_is_said(row, tmp_path, text_file, store, caplog):
    model = ModelSpec(source=str(folder_of("olmo", tmp_path / "m")))
    assert not build.build(rotated_by(row, model, text_file), store).transforms.gains
    assert "no norm of OlmoForCausalLM has a gain to hold a scale" in caplog.text


def test_channels_that_are_silent_get_a_finite_scale():
    rows = draw(10, 8)
    rows[:, 2] = 0
    for scales in scale_search.NAMES:
        for s in scale_search.tried(rows, scales):
            assert s.isfinite().all() and (s > 0).all()
    nothing = scale_search.searched(torch.zeros(4, 8), torch.ones(3, 8), registry.spec_of("OS+"))
    assert torch.equal(nothing, torch.ones(8).double())
