"""Offset: what the plane map does to planted rows, to a tiny model's, and to a whole recipe."""

import logging
import math

import pytest
import torch
from again import FLOAT32, NOTICED, apart, assert_near
from conftest import CHANNELS, FAMILIES, save_tiny
from test_evaluate import save_lively, spec_for
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import offsets, rotations
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.model import door
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe import keys, registry
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, RotationSpec
from dfrot_lab.rotate import offset
from dfrot_lab.rotate.offset import OffsetSpec, Pointed, point, pointed, sample
from dfrot_lab.score.perplexity import evaluate

ASYM4 = QuantSpec(scheme="asymmetric")
SPEC = OffsetSpec()
C = 64


def planted(seed: int = 0, channels: int = C, heavy: int = 8, shared: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rows of a common mean and noise, of which the first `heavy` are a spike in one channel, of either sign, with
    a second one behind it; and the mask of these.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = shared * torch.randn(channels, dtype=torch.float64, generator=generator)
    x = mean + torch.randn(600, channels, dtype=torch.float64, generator=generator)
    if heavy:
        sign = torch.where(torch.arange(heavy) % 3 == 0, -1.0, 1.0)
        x[:heavy] *= 0.4
        x[:heavy, 3] += 20 * sign
        x[:heavy, 5] -= 4 * sign
    return x / x.square().mean(1, keepdim=True).sqrt(), torch.arange(600) < heavy


def made(x: Tensor, mask: Tensor, spec: OffsetSpec = SPEC) -> Pointed:
    return point(x, mask, x.mean(0), spec)


def rh(channels: int = C, seed: int = 0) -> Tensor:
    return rotations.make(RotationSpec(seed=seed), channels)


def means(x: Tensor, mask: Tensor, R: Tensor) -> tuple[float, float]:
    error = squared_error(x @ R, ASYM4)
    return float(error[~mask].mean()), float(error[mask].mean())


# ---- the plane map of planted rows


@pytest.mark.parametrize("seed", range(3))
def test_offset_loses_less_than_the_random_hadamard_on_ordinary_and_on_massive_rows(seed):
    x, mask = planted(seed)
    ordinary, heavy = means(x, mask, made(x, mask, SPEC.with_(seed=seed)).R)
    plain = means(x, mask, rh(seed=seed))
    assert ordinary < 0.6 * plain[0] and heavy < 0.7 * plain[1]


def test_the_all_ones_direction_carries_the_mixture_and_the_next_row_the_rest():
    x, mask = planted()
    found = made(x, mask)
    best = found.tried.loc[found.tried["objective"].idxmin(), "mixture"]
    before = offsets.plane(x.mean(0), offset.spike(x[mask]), best)
    assert len(before) == 2
    torch.testing.assert_close(before @ found.R, offsets.flat_rows(C), rtol=0, atol=1e-13)
    offset_of = (x @ found.R).mean(1)
    torch.testing.assert_close(offset_of, x @ before[0] / math.sqrt(C), rtol=0, atol=1e-12)


def test_the_mixture_is_the_one_of_least_error_and_every_trial_is_what_it_says():
    x, mask = planted()
    found = made(x, mask)
    assert found.tried["mixture"].tolist()[1:] == list(offset.MIXTURES) and math.isnan(
        found.tried["mixture"][0]
    )
    assert means(x, mask, rh()) == pytest.approx(tuple(found.tried.loc[0, ["ordinary", "massive"]]), rel=1e-9)
    best = found.tried.loc[found.tried["objective"].idxmin()]
    assert means(x, mask, found.R) == pytest.approx((best["ordinary"], best["massive"]), rel=1e-6)
    assert best["objective"] == pytest.approx(best["ordinary"] + best["massive"])
    assert 0 < best["mixture"] < max(offset.MIXTURES), "at an end: nothing was chosen"


@pytest.mark.parametrize("channels", [4, 7, 12, 26, 64, 94])
def test_it_is_a_rotation_to_1e_12_whatever_the_channels(channels):
    """A Hadamard matrix (4, 12, 64), blocks (26, 94), none (7)."""
    x, mask = planted(channels=max(channels, 6))
    x = x[:, :channels]
    found = made(x, mask)
    assert rotations.orthogonality_error(found.R) < 1e-12
    plain = rotations.make(RotationSpec(kind="RO" if channels == 7 else "RH"), channels)
    ours, theirs = sum(means(x, mask, found.R)), sum(means(x, mask, plain))
    assert ours < theirs


def test_channels_permuted_and_flipped_make_the_same_plane_and_nearly_the_same_errors():
    """The whole map turns with the rows where the Hadamard does; here only the rows do."""
    x, mask = planted()
    generator = torch.Generator().manual_seed(1)
    signs = (torch.randint(0, 2, (C,), generator=generator) * 2 - 1).double()
    order = torch.randperm(C, generator=generator)
    moved = (x * signs)[:, order]
    before = offsets.plane(x.mean(0), offset.spike(x[mask]), 0.3)
    after = offsets.plane(moved.mean(0), offset.spike(moved[mask]), 0.3)
    torch.testing.assert_close((before * signs)[:, order], after, rtol=0, atol=1e-12)
    start = (rh() * signs[:, None])[order]
    R, other = (offsets.carried(m, p @ m, offsets.flat_rows(C)) for m, p in ((rh(), before), (start, after)))
    torch.testing.assert_close(x @ R, moved @ other, rtol=0, atol=1e-11)
    assert sum(means(moved, mask, made(moved, mask).R)) == pytest.approx(
        sum(means(x, mask, made(x, mask).R)), rel=0.1
    )


def test_a_spike_is_the_direction_of_most_energy_whatever_the_signs():
    rows = torch.zeros(4, 6)
    rows[:, 2] = torch.tensor([9.0, -9, 9, -9])
    assert offset.spike(rows).abs().tolist() == pytest.approx([0, 0, 1, 0, 0, 0])
    assert offset.spike(rows[:0]).tolist() == [0] * 6


# ---- where something is missing


def test_without_a_massive_row_the_mean_alone_goes_to_ones():
    x, mask = planted(heavy=0)
    found = made(x, mask)
    assert found.tried["mixture"].tolist()[1:] == [0.0]
    mean = x.mean(0) / x.mean(0).norm()
    torch.testing.assert_close(mean @ found.R, offsets.flat_rows(C)[0], rtol=0, atol=1e-13)
    assert means(x, mask, found.R)[0] < 0.75 * means(x, mask, rh())[0]


def test_without_a_mean_the_massive_direction_alone_goes_to_ones(caplog):
    x, mask = planted(shared=0.0)
    found = point(x, mask, torch.zeros(C), SPEC)
    along = offset.spike(x[mask]) @ found.R
    torch.testing.assert_close(along * along.sign()[0], offsets.flat_rows(C)[0], rtol=0, atol=1e-13)
    assert not caplog.records


@pytest.mark.parametrize("mean", [0.0, 1e-12], ids=["none", "rounding"])
def test_with_neither_it_is_the_random_hadamard_and_says_so_in_one_line(mean, caplog):
    x, mask = planted(heavy=0, shared=0.0)
    with caplog.at_level(logging.WARNING, "dfrot_lab"):
        found = point(x, mask, torch.full((C,), mean), SPEC)
    assert torch.equal(found.R, rh())
    said = [record.getMessage() for record in caplog.records]
    assert said == ["rows share no direction: Offset is RH here"]


def test_where_no_offset_helps_it_is_the_random_hadamard_and_says_so(caplog):
    """A symmetric grid pays for an offset: rows that are nearly nothing else are at home on two levels."""
    x, mask = planted(heavy=0, shared=0.05)
    spec = SPEC.with_(quantizer=QuantSpec())
    with caplog.at_level(logging.WARNING, "dfrot_lab"):
        found = made(3 * torch.eye(C).double().roll(1, 0)[:1] + 0 * x, mask, spec)
    assert torch.equal(found.R, rh())
    assert [r.getMessage() for r in caplog.records] == [
        "no offset lowers the error on the grid sym4: Offset is RH here"
    ]


# ---- rows and keys


def test_a_sample_has_all_massive_rows_and_as_many_others_in_rising_order():
    mask = torch.arange(100) % 9 == 0
    found = sample(mask, 20, 0)
    assert found.tolist() == sorted(set(found.tolist()))
    assert int(mask[found].sum()) == int(mask.sum()) and int((~mask[found]).sum()) == 20
    assert torch.equal(sample(mask, 20, 0), found) and not torch.equal(sample(mask, 20, 1), found)
    assert torch.equal(sample(mask, 1000, 0), torch.arange(100))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed": -1}, r"OffsetSpec\.seed must be a whole number in 0\.\.2\^63; got -1"),
        ({"rule": "big"}, r"OffsetSpec\.rule must be one of ratio_8, .*; got 'big'"),
        (
            {"quantizer": QuantSpec(bits=16)},
            r"OffsetSpec\.quantizer must be per_token, of fewer than 16 bits",
        ),
        ({"quantizer": QuantSpec(granularity="per_tensor")}, r"OffsetSpec\.quantizer must be per_token"),
        ({"gamma": 1.0}, r"OffsetSpec has no field 'gamma'"),
    ],
)
def test_errors_name_the_field_the_rule_and_the_value(fields, said):
    with pytest.raises(ValueError, match=said):
        OffsetSpec(**fields)


@pytest.fixture
def own(tmp_path, text_file) -> OffsetSpec:
    """Of a tiny model with planted massive tokens."""
    text = CorpusSpec(name=str(text_file), split="calibration")
    return OffsetSpec(capture=CaptureSpec(model=save_tiny(tmp_path / "model"), corpus=text, tokens=96))


def test_pointed_is_the_plane_map_of_the_capture_s_rows_and_is_kept(own: OffsetSpec, store: Store):
    found = pointed(own, store)
    recorded = capture(own.capture, store)
    rows, mask = recorded.all_rows(), massive.find(recorded, own.rule).flatten()
    expected = point(rows, mask, rows.double().mean(0), own)
    assert_near(found.R, expected.R, 1e-9)
    assert list(found.tried) == list(offset.TRIED) and found.seconds > 0
    again = pointed(own, store)
    assert torch.equal(again.R, found.R) and again.tried.equals(found.tried)
    assert len([a for a in store.list() if a.kind == offset.KIND]) == 1


def test_the_mean_row_of_a_capture_is_that_of_all_its_rows(own: OffsetSpec, store: Store):
    recorded = capture(own.capture, store)
    assert_near(offset.mean_row(recorded), recorded.all_rows().double().mean(0), 1e-12)


def test_every_field_is_in_the_key_and_seed_and_rows_change_the_rotation(own: OffsetSpec, store: Store):
    changes = {
        "seed": 1,
        "rule": "nr_error_9.5",
        "quantizer": QuantSpec(bits=2, scheme="asymmetric"),
        "capture": own.capture.with_(tokens=64),
    }
    base, found = pointed(own, store).R, {str(keys.identity(door.resolved(own), door.prints))}
    for name, value in changes.items():
        other = own.with_(**{name: value})
        found.add(str(keys.identity(door.resolved(other), door.prints)))
        assert name in ("rule", "quantizer") or not torch.equal(pointed(other, store).R, base), name
    assert len(found) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_the_same_at_16_bits_and_not_at_4(tmp_path, store, text_file, family):
    base = spec_for(save_lively(tmp_path / "model", family), text_file)
    rotation = registry.spec_of("Offset", capture=CaptureSpec(
        model=base.model, corpus=CorpusSpec(name=str(text_file), split="calibration"), tokens=64
    ))  # fmt: skip
    plain = evaluate(base.with_(rotation=RotationSpec(kind="NR")), store)
    assert_near(evaluate(base.with_(rotation=rotation), store).losses, plain.losses, FLOAT32)
    low = spec_for(base.model, text_file, "16-4-16")
    mine = evaluate(low.with_(rotation=rotation), store)
    assert apart(mine.losses, evaluate(low.with_(rotation=RotationSpec()), store).losses) > NOTICED


def test_the_row_offset():
    own = CaptureSpec(model=ModelSpec(), tokens=64)
    assert registry.spec_of("Offset", seed=5, capture=own) == OffsetSpec(seed=5, capture=own)
    assert OffsetSpec(seed=5).first_seed == 5 and CHANNELS == C
