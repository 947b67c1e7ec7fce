"""Offset+: its descent on planted rows, what its rows weigh, and a run that was stopped and goes on."""

import pytest
import torch
from again import FLOAT32, NOTICED, apart, assert_near, stop_at_second
from conftest import save_tiny
from test_evaluate import save_lively, spec_for
from test_offset import C, means, planted
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import offsets, rotations
from dfrot_lab.observe import massive
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import WINDOW, CaptureSpec, CorpusSpec, RotationSpec, recipe_of
from dfrot_lab.rotate import downhill, offset, offset_plus
from dfrot_lab.rotate.downhill import Sample, State
from dfrot_lab.rotate.offset_plus import OffsetPlusSpec, descend, descended
from dfrot_lab.rotate.steps import HISTORY
from dfrot_lab.rotate.transforms import Context
from dfrot_lab.score.perplexity import evaluate

SPEC = OffsetPlusSpec(updates=60)


def problem(seed: int = 0, heavy: int = 8) -> tuple[Sample, Tensor]:
    """Planted rows whose massive ones weigh half of all, and where Offset starts."""
    x, mask = planted(seed, heavy=heavy)
    weights = torch.where(mask, 0.5 / max(heavy, 1), 0.5 / int((~mask).sum()))
    return Sample(x, weights.double(), mask), offset.point(x, mask, x.mean(0), SPEC.start).R


def objective(sample: Sample, R: Tensor) -> float:
    centred = sample.rows @ R - (sample.rows @ R).mean(1, keepdim=True)
    return float((sample.weights * torch.linalg.vector_norm(centred, 8, dim=1).square()).sum())


# ---- the descent


@pytest.mark.parametrize("heavy", [8, 0], ids=["massive", "none"])
def test_the_descent_lowers_the_objective_and_the_errors_and_stays_a_rotation(heavy):
    sample, start = problem(heavy=heavy)
    found = descend(sample, start, SPEC)
    assert rotations.orthogonality_error(found.R) < 1e-12
    assert objective(sample, found.R) < 0.9 * objective(sample, start)
    before, after = means(sample.rows, sample.mask, start), means(sample.rows, sample.mask, found.R)
    assert after[0] < before[0] and (not heavy or sum(after) < 0.95 * sum(before))


def test_the_history_has_a_line_a_look_and_its_best_never_rises():
    sample, start = problem()
    found = descend(sample, start, SPEC)
    assert list(found.history) == list(HISTORY) or set(found.history) == set(HISTORY)
    assert found.history["step"].tolist() == [0, 25, 50, 60]
    assert found.history["best"].tolist() == found.history["objective"].cummin().tolist()
    assert found.history["objective"][0] == pytest.approx(objective(sample, start), rel=1e-9)
    assert found.history["best"].iloc[-1] == pytest.approx(objective(sample, found.R), rel=1e-6)
    assert found.history["distance"].iloc[0] == 0 < found.history["distance"].iloc[-1]
    first = found.history.iloc[0]
    assert (first["ordinary"], first["massive"]) == pytest.approx(
        means(sample.rows, sample.mask, start), rel=1e-9
    )


def test_a_step_goes_down_and_its_angle_is_about_its_length():
    sample, start = problem()
    still = torch.zeros_like(start)
    state = State(start.clone(), start, still, still.clone(), [])
    downhill.adam(state, sample.rows, sample.weights, 0, offsets.spread, 0.02)
    assert rotations.orthogonality_error(state.R) < 1e-12
    assert objective(sample, state.R) < objective(sample, start)
    assert rotations.distance(state.R, start) == pytest.approx(0.02, rel=0.1)


def test_a_step_too_long_is_taken_back(monkeypatch):
    sample, start = problem()
    monkeypatch.setattr(offset_plus, "LENGTH", 30.0)
    found = descend(sample, start, SPEC.with_(updates=25))
    assert found.history["objective"].iloc[-1] > found.history["objective"].iloc[0], "nothing to take back"
    assert torch.equal(found.R, start)


def test_rows_of_no_weight_do_not_matter_and_heavier_ones_do():
    sample, start = problem()
    alone = Sample(sample.rows, torch.where(sample.mask, sample.weights, 0), sample.mask)
    lighter = Sample(sample.rows, torch.where(sample.mask, 0.0, sample.weights), sample.mask)
    errors = [means(sample.rows, sample.mask, descend(s, start, SPEC).R) for s in (alone, lighter)]
    assert errors[0][1] < errors[1][1] and errors[1][0] < errors[0][0]


def test_the_same_twice_is_the_same_to_the_bit():
    sample, start = problem()
    assert_near(descend(sample, start, SPEC).R, descend(sample, start, SPEC).R, 1e-9)


def test_a_stopped_descent_goes_on_from_its_last_look_to_the_same_r():
    sample, start = problem()
    kept: list[State] = []
    with pytest.raises(KeyboardInterrupt):
        descend(sample, start, SPEC, checkpoint=stop_at_second(kept))
    resumed, whole = descend(sample, start, SPEC, kept[-1]), descend(sample, start, SPEC)
    assert_near(resumed.R, whole.R, 1e-9)
    assert resumed.history["step"].tolist() == whole.history["step"].tolist()


# ---- rows, weights, keys


@pytest.fixture
def own(tmp_path, text_file) -> OffsetPlusSpec:
    text = CorpusSpec(name=str(text_file), split="calibration")
    capture = CaptureSpec(model=save_tiny(tmp_path / "model"), corpus=text, tokens=96)
    return OffsetPlusSpec(capture=capture, updates=30)


@pytest.fixture
def context(own: OffsetPlusSpec, store: Store) -> Context:
    text = CorpusSpec(name=own.capture.corpus.name)
    return Context(recipe_of("16-4-16", model=own.capture.model, corpus=text, rotation=own), store)


def test_massive_rows_weigh_their_squared_gradients_and_a_sample_of_others_stands_for_all(own, context):
    recorded, squares = context.rows(own.capture), context.row_sensitivities(own.capture)
    weights = torch.cat([squares[site] for site in recorded.sites]).double()
    mask = massive.find(recorded, own.rule).flatten()
    whole = offset_plus._sample(own, context)
    roots, total = weights[~mask].sqrt(), weights.sum()
    torch.testing.assert_close(whole.weights[mask], weights[mask] / total, rtol=1e-9, atol=0)
    others = roots / roots.sum() * weights[~mask].sum() / total
    torch.testing.assert_close(whole.weights[~mask], others, rtol=1e-9, atol=0)
    assert torch.equal(whole.rows, recorded.all_rows()) and torch.equal(whole.mask, mask) and mask.any()
    part = offset_plus._sample(own.with_(rows=50), context)
    assert len(part.rows) == 50 + int(mask.sum()) and float(part.weights.sum()) == pytest.approx(1)
    heavy = float(whole.weights[whole.mask].sum())
    assert float(part.weights[part.mask].sum()) == pytest.approx(heavy)


def test_descended_starts_at_offset_and_is_kept(own, context):
    found = descended(own, context)
    start = offset.pointed(own.start, context.store).R
    sample = offset_plus._sample(own, context)
    assert_near(found.R, descend(sample, start, own).R, 1e-4)
    assert found.history["best"].iloc[-1] < found.history["objective"].iloc[0] and found.seconds > 0
    again = descended(own, context)
    assert torch.equal(again.R, found.R) and again.history.equals(found.history)
    kinds = {a.kind for a in context.store.list()}
    assert kinds >= {"offset", "offset-plus", "row-sensitivity", "capture"}
    [kept] = [a for a in context.store.list() if a.kind == "offset-plus"]
    assert kept.names == ["R1", "history"], "no state is left behind"


def test_a_killed_run_goes_on_at_its_last_look(own, context, tmp_path, caplog):
    def stop(state: State) -> None:
        if len(state.history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        descended(own, context, stop)
    with caplog.at_level("INFO", "dfrot_lab"):
        resumed = descended(own, context)
    assert "going on with the descent at step 25" in caplog.text
    other = Context(context.recipe, Store(tmp_path / "other"))
    assert_near(resumed.R, descended(own, other).R, 1e-4)


def test_the_row_offset_plus_takes_four_windows_where_it_is_given_a_whole_one():
    row = registry.spec_of("Offset+", seed=4, capture=CaptureSpec())
    assert row == OffsetPlusSpec(seed=4) and row.capture.tokens == 4 * WINDOW and row.first_seed == 4
    assert registry.spec_of("Offset+", capture=CaptureSpec(tokens=64)).capture.tokens == 64
    same = row.with_(rule="sun", quantizer=QuantSpec(bits=3, scheme="asymmetric"))
    start = {name: value for name, value in same if name not in ("updates", "rows")}
    assert dict(iter(same.start)) == start


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed": -1}, r"OffsetPlusSpec\.seed must be a whole number in 0\.\.2\^63; got -1"),
        ({"updates": 0}, r"OffsetPlusSpec\.updates must be a whole number >= 1; got 0"),
        ({"rows": 0}, r"OffsetPlusSpec\.rows must be a whole number >= 1; got 0"),
        ({"rule": "big"}, r"OffsetPlusSpec\.rule must be one of ratio_8, .*; got 'big'"),
        ({"quantizer": QuantSpec(bits=16)}, r"OffsetPlusSpec\.quantizer must be per_token, of fewer than 16"),
        ({"capture": CaptureSpec(tokens=1)}, r"OffsetPlusSpec\.capture must be of 2 tokens or more"),
    ],
)
def test_errors_name_the_field_the_rule_and_the_value(fields, said):
    with pytest.raises(ValueError, match=said):
        OffsetPlusSpec(**fields)


def test_the_model_stays_the_same_at_16_bits_and_not_at_4(tmp_path, store, text_file):
    base = spec_for(save_lively(tmp_path / "model"), text_file)
    text = CorpusSpec(name=str(text_file), split="calibration")
    rotation = OffsetPlusSpec(capture=CaptureSpec(model=base.model, corpus=text, tokens=64), updates=20)
    plain = evaluate(base.with_(rotation=RotationSpec(kind="NR")), store)
    assert_near(evaluate(base.with_(rotation=rotation), store).losses, plain.losses, FLOAT32)
    low = spec_for(base.model, text_file, "16-4-16")
    mine = evaluate(low.with_(rotation=rotation), store)
    started = evaluate(low.with_(rotation=rotation.start), store)
    assert apart(mine.losses, started.losses) > NOTICED


def test_the_spread_is_what_is_descended():
    sample, start = problem()
    assert offsets.spread(sample.rows @ start, sample.weights)[0] == pytest.approx(objective(sample, start))
    assert start.shape == (C, C)
