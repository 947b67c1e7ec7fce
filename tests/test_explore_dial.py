"""The dial: the way to a rotation is one of rotations, its ends are where they should be, and what is drawn is
what the quantizer makes of the turned token.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TEXT, save_tiny
from explorers import assert_safe, remade
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.dial.widget import NAMES, Dial
from dfrot_lab.maths import dial, rotations
from dfrot_lab.maths.quantizers import levels, squared_error
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import RotationSpec
from dfrot_lab.rotate import transforms
from dfrot_lab.study.setting import Setting

ASYM4 = QuantSpec(scheme="asymmetric")


def hadamard(channels: int) -> Tensor:
    """Sylvester's, symmetric: half of its eigenvalues are 1, the others -1."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < channels:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made / channels**0.5


def cycle(channels: int) -> Tensor:
    return torch.eye(channels, dtype=torch.float64).roll(1, 0)


CASES = {
    **{f"{kind} {seed}": rotations.make(RotationSpec(kind=kind, seed=seed), 24) for kind in ("RO", "RH", "GSR")
       for seed in (0, 1, 2)},
    "symmetric": hadamard(16), "identity": torch.eye(5, dtype=torch.float64),
    "reflected": -torch.eye(7, dtype=torch.float64), "even": cycle(8), "odd": cycle(9),
}  # fmt: skip


@pytest.mark.parametrize("R", CASES.values(), ids=CASES)
def test_the_way_is_one_of_rotations_from_none_to_the_whole(R):
    to, one = dial.way(R), torch.eye(len(R), dtype=torch.float64)
    start, third, half, end = dial.turned(one, to, [0, 1 / 3, 1 / 2, 1])
    for made in (start, third, half, end):
        torch.testing.assert_close(made @ made.T, one, rtol=0, atol=1e-10)
    signs = torch.ones(len(R), dtype=torch.float64)
    signs[-1] = torch.linalg.det(R).sign()
    torch.testing.assert_close(start, torch.diag(signs), rtol=0, atol=1e-10)
    torch.testing.assert_close(end, R, rtol=0, atol=1e-10)
    back = torch.diag(signs)  # shares add up
    torch.testing.assert_close(third @ back @ third @ back @ third, end, rtol=0, atol=1e-10)
    torch.testing.assert_close(half @ back @ half, end, rtol=0, atol=1e-10)


def test_it_is_the_shortest_way():
    """No plane turns by more than half a circle, and a small turn stays small all the way."""
    for R in CASES.values():
        assert (
            float(dial.way(R).angles.abs().max(dim=0, keepdim=False).values if len(R) > 5 else 0) <= math.pi
        )
    c, s = math.cos(0.3), math.sin(0.3)
    small = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    assert dial.way(small).angles.abs().tolist() == pytest.approx([0.3])
    made = dial.turned(torch.eye(2, dtype=torch.float64), dial.way(small), [0.5])[0]
    assert float(made[0, 1]) == pytest.approx(math.sin(0.15))


def test_what_is_no_rotation_is_refused():
    with pytest.raises(ValueError, match="orthogonal"):
        dial.way(2 * torch.eye(4))


def test_the_curve_is_the_quantizer_s():
    R, x = CASES["RO 1"], torch.randn(40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, 3] += 30
    found = dial.curve(x[0], x[1:], dial.way(R), ASYM4).set_index("share")
    assert found.loc[1.0, "token"] == pytest.approx(float(squared_error(x[:1] @ R, ASYM4)), rel=1e-9)
    assert found.loc[1.0, "ordinary"] == pytest.approx(
        float(squared_error(x[1:] @ R, ASYM4).mean()), rel=1e-9
    )
    assert len(found) == dial.STEPS + 1 and found.index[0] == 0
    half = dial.turned(x[:1], dial.way(R), [0.5])[0]
    assert found.loc[0.5, "token"] == pytest.approx(float(squared_error(half, ASYM4)))
    assert found.loc[0.5, "offset"] == pytest.approx(
        24 * float(half.mean()) ** 2 / float(half.square().sum())
    )


def test_few_ordinary_tokens_are_spread_and_none_is_massive():
    rows = torch.arange(1000.0)[:, None]
    heavy = torch.zeros(1000, dtype=torch.bool)
    heavy[::2] = True
    chosen = dial.ordinary(rows, heavy)[:, 0]
    assert 32 < len(chosen) <= dial.ORDINARY and bool((chosen % 2 == 1).all()) and chosen[-1] > 900
    assert len(dial.ordinary(rows[:3], heavy[:3])) == 1


# ---- the widget


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Dial:
    folder: Path = tmp_path_factory.mktemp("dial")
    (folder / "text.txt").write_text(TEXT)
    own = {"corpus": str(folder / "text.txt"), "window": 64, "steps": 3, "quick": True}
    return Dial(Setting(model=save_tiny(folder / "model"), **own), Store(folder / "store"))


@pytest.fixture
def view(shared: Dial) -> Dial:
    shared.job.wait()
    for name, value in {"to": "RH", "turned": 0, "bits": 4, "symmetric": False, "token": 0}.items():
        setattr(shared.state, name, value)
    shared.job.wait()
    return shared


def R1(view: Dial, name: str) -> Tensor:
    recipe = view.setting.row("16-4-16", view.setting.method(name))
    made = transforms.fit(recipe, transforms.Context(recipe, view.store)).R1
    assert made is not None
    return made


def test_it_starts_at_the_most_massive_token_not_turned(shared):
    acts = shared.acts
    assert shared.state.turned == 0 and "dfrot-dial" in shared._dom_classes
    assert all(control.description for control in shared.controls.values())
    assert shared.state.token == int(acts.residual_max[acts.sites.index(shared.state.site)].argmax())


def test_the_whole_way_is_the_rotation(view):
    view.controls["turned"].value = 100
    x = view.acts.rows(view.state.site)[0].double()
    torch.testing.assert_close(view.values(), x @ R1(view, "RH"), rtol=0, atol=1e-5)
    error = float(squared_error(view.values()[None], view.state.quantizer))
    assert view.errors.data[2].y[0] == error and view.errors.data[2].x[0] == 100
    assert f"<b>{error:.3f}</b>" in view.read.value and "the whole of RH" in view.read.value
    assert view.table()["token"].iloc[-1] == pytest.approx(error)


def test_each_channel_is_in_the_histogram_and_the_levels_are_the_grid_s(view):
    view.state.turned = 40
    y = view.values()
    assert np.nansum(view.plot.data[1].y) == len(y)
    drawn = view.plot.data[0].x[::3]
    assert list(drawn) == pytest.approx(levels(y, view.state.quantizer).tolist())
    view.state.symmetric = True
    assert list(view.plot.data[0].x[::3]) == pytest.approx(levels(y, QuantSpec()).tolist())
    assert "a symmetric grid pays for" in view.read.value


@pytest.mark.parametrize("name", ["DFRot", "Offset"])
def test_a_rotation_that_is_to_be_found_is_found_in_the_background(view, name):
    view.state.turned = 100
    view.controls["to"].value = name
    view.job.wait()
    assert view.status.state == "ready", view.status.text
    x = view.acts.rows(view.state.site)[0].double()
    torch.testing.assert_close(view.values(), x @ R1(view, name), rtol=0, atol=1e-5)
    assert list(view.errors.data[0].y) == view.table()["token"].tolist()


def test_what_cannot_be_found_is_said_and_the_view_stays(view, monkeypatch):
    view.ways.pop("Offset+", None)
    before = list(view.errors.data[0].y)
    monkeypatch.setattr(transforms, "fit", lambda *_: (_ for _ in ()).throw(ValueError("nothing to point")))
    view.controls["to"].value = "Offset+"
    view.job.wait()
    assert view.status.state == "error" and "nothing to point" in view.status.text
    assert list(view.errors.data[0].y) == before


def test_another_token_is_drawn_and_none_is_beyond_the_last(view):
    view.state.token = 64
    assert view.state.token == 63 and "Token 63" in view.read.value
    view.state.token = 5
    assert "Token 5" in view.read.value
    error = squared_error(view.acts.rows(view.state.site)[5:6].double(), view.state.quantizer)
    assert view.table()["token"].iloc[0] == pytest.approx(float(error), rel=0.2), "but for one channel's sign"


def test_nothing_of_a_text_is_a_tag(view):
    assert_safe(view)


def test_it_is_a_picture_too(view):
    assert len(view.static().axes) == 2
    assert set(NAMES) == set(view.controls["to"].options)


def test_the_line_makes_the_same_view(view: Dial):
    for name, value in {"to": "RO", "turned": 40, "bits": 3, "token": 5}.items():
        setattr(view.state, name, value)
    again = remade(view)
    assert again.state.trait_values() == view.state.trait_values()
    pd.testing.assert_frame_equal(again.table(), view.table())
    assert again.texts == view.acts.texts
