"""The playground: its numbers are the quantizer's and the theory's, its plots show them, the model's spike
comes from the store.
"""

import math

import numpy as np
import pytest
import torch
from explorers import remade
from hypothesis import given, settings, strategies as st

from dfrot_lab.explore.playground import numbers
from dfrot_lab.explore.playground.widget import Playground
from dfrot_lab.maths import rotations, theory
from dfrot_lab.maths.quantizers import fake_quantize, levels, quantize, squared_error
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, RotationSpec

SYM4, ASYM4 = QuantSpec(), QuantSpec(scheme="asymmetric")


# ---- numbers


def test_one_angle_turns_the_first_channel_into_cosine_and_sine():
    turned = torch.tensor([1.0, 0.0], dtype=torch.float64) @ numbers.by_angles([30])
    torch.testing.assert_close(turned, torch.tensor([math.cos(math.pi / 6), 0.5], dtype=torch.float64))


@given(angles=st.lists(st.floats(0, 180), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_three_angles_are_a_rotation_and_the_first_is_the_one_of_two_channels(angles):
    R = numbers.by_angles(angles)
    assert rotations.orthogonality_error(R) < 1e-12 and float(torch.linalg.det(R)) == pytest.approx(1)
    torch.testing.assert_close(numbers.by_angles([angles[0], 0, 0])[:2, :2], numbers.by_angles(angles[:1]))


def test_two_angles_are_refused():
    with pytest.raises(ValueError, match="one angle \\(2 channels\\) or three \\(3 channels\\); got 2"):
        numbers.by_angles([1, 2])


@pytest.mark.parametrize(
    "quantizer",
    [SYM4, ASYM4, QuantSpec(bits=2), QuantSpec(bits=3, scheme="asymmetric")],
    ids=lambda q: q.name,
)
def test_every_rounded_value_is_a_level_and_the_levels_are_as_many_as_codes(quantizer):
    x = numbers.planted_token(0.5, 64, seed=4)
    grid = levels(x, quantizer)
    assert len(grid) == 2**quantizer.bits and bool((grid.diff() > 0).all())
    gaps = (fake_quantize(x[None], quantizer)[0][:, None] - grid).abs().min(1).values
    assert float(gaps.max()) < 1e-12
    codes = quantize(x[None], quantizer).codes[0].long()
    assert len(codes.unique()) > 2, "one level only: nothing would be checked"


@pytest.mark.parametrize("quantizer", [SYM4, ASYM4], ids=lambda q: q.name)
@pytest.mark.parametrize("degrees", [[0.0], [33.0], [20.0, 50.0, 70.0]])
def test_the_reading_is_the_quantizers(degrees, quantizer):
    R = numbers.by_angles(degrees)
    x = numbers.hand_token(5, len(R), seed=1)
    found, y = numbers.reading(x, R, quantizer), x @ R
    assert found["error"] == float(squared_error(y[None], quantizer)) and found["unrotated"] == float(
        squared_error(x[None], quantizer)
    )
    grid = levels(y, quantizer)
    assert found["step"] == pytest.approx(float(grid[1] - grid[0]))
    wanted = (
        y.abs().max()
        if quantizer.symmetric
        else max(y.max(), torch.tensor(0)) - min(y.min(), torch.tensor(0))
    )
    assert found["range"] == pytest.approx(float(wanted))
    assert found["range"] == pytest.approx(found["step"] * (7 if quantizer.symmetric else 15))


def test_a_spike_turned_to_all_ones_is_the_zero_point_s():
    """Nearly all of it is the same in both channels, and the asymmetric grid loses nothing of that; the
    symmetric one loses more. A quarter turn on nothing is the same any more.
    """
    x, asym = numbers.hand_token(50.0, 2), QuantSpec(scheme="asymmetric", bits=2)
    found = {angle: numbers.reading(x, numbers.by_angles([angle]), asym) for angle in (0, 45, 135)}
    assert found[45]["offset"] > 0.999 > 0.6 > found[0]["offset"] and found[135]["offset"] < 0.001
    symmetric = numbers.reading(x, numbers.by_angles([40]), QuantSpec(bits=2))
    assert numbers.reading(x, numbers.by_angles([40]), asym)["error"] < symmetric["error"]


def test_the_sweep_passes_through_the_reading():
    x = numbers.hand_token(5, 3, seed=1)
    line = numbers.sweep(x, [0, 40, 70], SYM4)
    for angle in (0, 45, 111):
        assert line.loc[angle, "error"] == pytest.approx(
            numbers.reading(x, numbers.by_angles([angle, 40, 70]), SYM4)["error"], rel=1e-12
        )


def test_the_fine_curve_shows_the_zeros_that_whole_degrees_miss():
    spike = torch.tensor([1.0, 0.0], dtype=torch.float64)
    zeros = [math.degrees(math.atan(k / 7)) for k in range(1, 7)]
    whole, fine = (numbers.sweep(spike, [0], SYM4, step) for step in (1.0, 0.1))
    for zero in zeros:
        near = [line.loc[line["angle"].sub(zero).abs() < 1, "error"].min() for line in (whole, fine)]
        assert near[1] < 1e-6 and near[1] < near[0]


def test_a_spike_alone_is_exact_at_45_degrees_and_at_none_but_not_between():
    line = numbers.sweep(torch.tensor([1.0, 0.0], dtype=torch.float64), [0], SYM4)["error"]
    assert line[0] < 1e-24 and line[45] < 1e-24 and line[90] < 1e-24
    assert line[1:45].max() > 1e-3


@pytest.mark.parametrize("channels", [4, 16, 64])
def test_measured_is_the_error_of_the_rotated_spike(channels):
    x = numbers.planted_token(8, channels)
    found = numbers.measured(x, SYM4, seeds=(0, 3))
    assert found["rotation"].tolist() == ["NR", "RO", "RO", "RH", "RH"]
    for row in found.itertuples():
        R = rotations.make(RotationSpec(kind=row.rotation, seed=row.seed), channels)
        assert row.error == float(squared_error((x @ R)[None], SYM4)) and row.largest == float(
            (x @ R).abs().max()
        )


@pytest.mark.parametrize("quantizer", [SYM4, ASYM4], ids=lambda q: q.name)
def test_the_why_panel_is_the_theory(quantizer):
    m, sigma = theory.unit_rms(8, 64)
    predicted = numbers.expected(8, 64, quantizer)
    assert predicted == {
        "NR": theory.error("NR", m, sigma, 64, quantizer),
        "RO": theory.error("RO", m, sigma, 64, quantizer),
        "RH": theory.error("RH", m, sigma, 64, quantizer),
    }
    x = numbers.planted_token(8, 64)
    table = numbers.why(numbers.measured(x, quantizer), predicted).set_index("rotation")
    assert table["predicted"].to_dict() == predicted
    assert table.loc["RO", "measured"] == pytest.approx(
        np.mean([squared_error((x @ numbers.matrix("RO", s, 64))[None], quantizer) for s in range(5)])
    )
    assert table["ratio"].tolist() == pytest.approx((table["measured"] / table["predicted"]).tolist())


def test_in_576_channels_the_closed_form_is_what_is_measured():
    table = numbers.why(numbers.measured(numbers.planted_token(8, 576), SYM4), numbers.expected(8, 576, SYM4))
    assert table["ratio"].between(0.9, 1.1).all()


def test_few_channels_have_no_prediction():
    assert all(math.isnan(value) for value in numbers.expected(8, 16, SYM4).values())
    assert not any(math.isnan(value) for value in numbers.expected(8, 32, SYM4).values())


# ---- the widget


def put(view: Playground, **values: object) -> None:
    for name, value in values.items():
        setattr(view.state, name, value)


@pytest.fixture(scope="module")
def shared() -> Playground:
    return Playground()


@pytest.fixture
def view(shared: Playground) -> Playground:
    put(
        shared,
        dims=2,
        angle=0.0,
        angle_02=0.0,
        angle_12=0.0,
        snr=8.0,
        seed=0,
        bits=4,
        symmetric=True,
        channels=64,
        source="planted",
    )
    return shared


def test_it_says_what_every_control_is(view):
    assert "dfrot-playground" in view._dom_classes
    assert all(control.description for control in view.controls.values())


def test_a_slider_turns_the_token_in_place(view):
    plot, trace = view.hand, view.hand.data[2]
    view.controls["angle"].value = 45
    y = view.state.token @ numbers.by_angles([45])
    assert view.hand is plot and plot.data[2] is trace
    assert (trace.x[1], trace.y[1]) == pytest.approx(tuple(y.tolist()))
    assert view.reading()["error"] == float(squared_error(y[None], SYM4))
    assert f"{view.reading()['error']:.4f}" in view.read.value
    assert f"<b>{view.reading()['offset']:.0%}</b> of its energy, which a symmetric grid" in view.read.value
    view.state.symmetric = False
    assert "which the zero point takes for nothing" in view.read.value
    view.state.symmetric = True
    assert view.sweep.data[1].y[0] == view.reading()["error"]
    corner = [view.hand.data[3].x[0], view.hand.data[3].y[0]]
    assert corner == pytest.approx(fake_quantize(y[None], SYM4)[0].tolist())


def test_three_channels_use_three_angles_and_the_other_plot(view):
    assert view.controls["angle_02"].disabled and view.stage.shown is view.hand
    put(view, dims=3, angle=10.0, angle_02=20.0, angle_12=30.0)
    assert not view.controls["angle_02"].disabled and view.stage.shown is view.space
    y = view.state.token @ numbers.by_angles([10, 20, 30])
    token = view.space.data[2]
    assert (token.x[1], token.y[1], token.z[1]) == pytest.approx(tuple(y.tolist()))
    assert len(view.space.data[0].x) == 3 * 16 + 8


def test_bits_and_kind_of_grid_reach_every_part(view):
    coarse = view.table()["measured"].sum()
    view.state.bits = 6
    assert view.table()["measured"].sum() < coarse / 4
    view.state.symmetric = False
    assert view.state.quantizer == QuantSpec(bits=6, scheme="asymmetric")
    y = view.token() @ numbers.matrix("RH", 0, 64)
    heights = view.values.data[4].y[::3]
    assert heights == pytest.approx(levels(y, view.state.quantizer).tolist())
    assert view.values.data[5].y == pytest.approx(y.numpy())


@pytest.mark.parametrize("channels", [4, 16, 64, 576])
def test_every_size_shows_its_errors_and_why(view, channels):
    view.state.channels = channels
    found = numbers.measured(view.token(), SYM4)
    assert len(view.token()) == channels
    assert list(view.errors.data[0].y) == found["error"].tolist()
    row = view.table().set_index("rotation").loc["RH"]
    assert f"{row['measured']:.3f}" in view.why.value
    assert ("no closed form" in view.why.value) == (channels < numbers.FEWEST)
    if channels >= numbers.FEWEST:
        assert f"{row['predicted']:.3f}" in view.why.value
    assert len(view.static().axes) == 2


def test_the_models_spike_is_its_first_token_at_a_middle_site(tiny_spec, text_file, store):
    spec = CaptureSpec(model=tiny_spec, corpus=CorpusSpec(name=str(text_file)), tokens=64)
    recorded = capture(spec, store)
    view = Playground(spec, store)
    view.controls["source"].value = "model"
    view.job.wait(60)
    x = recorded.rows(recorded.sites[2])[0].double()
    assert torch.equal(view.token(), x) and view.controls["channels"].disabled
    assert recorded.sites[2] in view.status.text and recorded.sites[2] in view.why.value
    assert view.table()["predicted"].tolist() == pytest.approx(
        theory.predict(x[None], SYM4, spikes=3).iloc[0].tolist()
    )
    view.controls["source"].value = "planted"
    assert len(view.token()) == 576 and not view.controls["channels"].disabled


def test_a_model_that_is_not_there_is_one_sentence_and_the_planted_spike_stays(tmp_path, store):
    view = Playground(CaptureSpec(model=ModelSpec(source=str(tmp_path / "nowhere"))), store)
    view.controls["source"].value = "model"
    view.job.wait(60)
    assert view.status.state == "error" and "ModelSpec.source must be" in view.status.text
    assert view.state.source == "planted" and len(view.token()) == 576


def test_the_line_makes_the_same_view(view):
    put(view, dims=3, angle=30.0, angle_02=10.0, snr=4.0, channels=64)
    assert Playground().line() == "explore.playground()"  # though the slider of snr knows no 8.0
    again = remade(view)
    assert again.state.trait_values() == view.state.trait_values() and again.reading() == view.reading()
