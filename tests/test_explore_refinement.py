"""The live refinement: it is `refine.refine`, however often it is paused; cancel ends it; what it saves can
be loaded.
"""

import functools
import json
import math
import time
from collections.abc import Callable

import pytest
import torch
from again import REFINED, assert_same_refinement
from explorers import remade
from safetensors import safe_open
from test_evaluate import save_lively

from dfrot_lab.disk import rotation_files
from dfrot_lab.explore.refinement import WATCHED, Refinement, choices, watched
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.model import door
from dfrot_lab.model.public import public
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import Capture, capture
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import DEFAULT_RULE, CaptureSpec, CorpusSpec, ModelSpec, RefineSpec, RotationSpec
from dfrot_lab.rotate import dfrot

VARIANTS = ["accelerated", "guarded", "as_paper", "as_released"]


@pytest.fixture
def lively(tmp_path, in_float64) -> ModelSpec:
    """A model whose rows fix R, refined on in float64: else any rounding makes another R."""
    return save_lively(tmp_path / "lively")


@pytest.fixture
def recorded(lively, text_file, store) -> Capture:
    return capture(CaptureSpec(model=lively, corpus=CorpusSpec(name=str(text_file)), tokens=128), store)


@pytest.fixture
def view(recorded, tmp_path) -> Refinement:
    made = Refinement(recorded, path=str(tmp_path / "R1.safetensors"))
    made.job.wait(60)
    return made


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for a condition; a test that would wait for ever fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def finish(view: Refinement) -> None:
    view.job.wait(120)
    assert not view.job.running


# ---- refine's own seam


@pytest.mark.parametrize("variant", VARIANTS)
def test_watching_every_step_changes_nothing(variant, recorded):
    rows, mask = recorded.all_rows().double(), massive.find(recorded, DEFAULT_RULE).flatten()
    spec = RefineSpec(variant=variant, steps=30, quantizer=QuantSpec())
    seen: list[tuple[int, torch.Tensor]] = []
    plain = dfrot.refine(rows, spec, mask)
    followed = dfrot.refine(rows, spec, mask, on_step=lambda step, R: seen.append((step, R())))
    assert_same_refinement(followed, plain)
    steps = [step for step, _ in seen]
    assert steps == sorted(set(steps)) and steps[-1] == int(plain.history["step"].iloc[-1])
    assert len(steps) == (30 if variant == "accelerated" else len(plain.history))
    assert all(rotations.orthogonality_error(R) < 1e-4 for _, R in seen)


# ---- pure parts


def test_the_spec_of_a_capture_is_the_one_it_was_made_with(recorded, lively, text_file):
    spec = recorded.spec
    assert spec == door.resolved(
        CaptureSpec(model=lively, corpus=CorpusSpec(name=str(text_file)), tokens=128)
    )


def test_watched_rows_keep_massive_ones():
    x = torch.arange(3.0 * WATCHED)[:, None].repeat(1, 2)
    mask = torch.arange(len(x)) % 500 == 0
    rows, heavy = watched(x, mask)
    assert (
        len(rows) == WATCHED and int(heavy.sum()) == int(mask.sum()) and len(rows[:, 0].unique()) == WATCHED
    )
    assert torch.equal(mask[rows[:, 0].long()], heavy)
    few, none = watched(x[:10], mask[:10])
    assert len(few) == len(none) == 10
    many, half = watched(x, torch.ones(len(x), dtype=torch.bool))
    assert len(many) == WATCHED // 4 and bool(half.all())


def test_the_list_of_tokens_begins_with_the_most_massive(recorded):
    site = recorded.sites[1]
    labels, places = zip(*choices(recorded, site), strict=True)
    assert places[0] == int(recorded.residual_max[1].argmax()) and len(set(places)) == len(places)
    assert "\u21b5" in labels[0] and "\n" not in "".join(labels), (
        "the massive token is the newline, shown as a sign"
    )


# ---- the widget


def test_it_opens_ready_and_every_control_says_what_it_is(view, recorded):
    assert view.status.text == "ready: press Start" and "dfrot-refinement" in view._dom_classes
    assert all(control.description for control in view.controls.values())
    assert view.controls["site"].value == recorded.sites[2]
    enabled = {
        name for name in ("start", "pause", "resume", "cancel", "save") if not view.controls[name].disabled
    }
    assert enabled == {"start"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_refinement_of_the_same_spec(view, store, variant):
    for name, value in {
        "variant": variant,
        "gamma": 30.0,
        "kind": "RO",
        "seed": 2,
        "steps": 25,
        "symmetric": True,
        "rows": 0,
    }.items():
        view.controls[name].value = value
    view.controls["start"].click()
    finish(view)
    wanted = dfrot.refined(view.make_spec(), store)
    assert_same_refinement(view.result, wanted)
    assert view.spec == RefineSpec(
        capture=view.spec.capture,
        variant=variant,
        gamma=30.0,
        init=RotationSpec(kind="RO", seed=2),
        steps=25,
        quantizer=QuantSpec(),
    )
    table = view.table()
    assert (
        table["step"].iloc[0] == 0
        and table["distance"].iloc[0] == 0
        and table["step"].is_monotonic_increasing
    )
    assert table["step"].iloc[-1] == wanted.history["step"].iloc[-1]
    assert view.status.text.startswith("done: ")


def test_the_history_is_the_losses_of_each_steps_rotation(view, recorded):
    view.state.variant = "as_paper"
    view.state.steps = 3
    view.start()
    finish(view)
    rows, mask = recorded.all_rows().double(), massive.find(recorded, DEFAULT_RULE).flatten()
    for steps in (1, 3):
        R = dfrot.refine(rows, view.spec.with_(steps=steps), mask).R
        error = squared_error(rows @ R, view.spec.quantizer)
        row = view.table().set_index("step").loc[steps]
        assert row["ordinary"] == pytest.approx(float(error[~mask].mean()), rel=1e-4)
        assert row["massive"] == pytest.approx(float(error[mask].mean()), rel=1e-4)
        assert row["distance"] == pytest.approx(
            rotations.distance(R, rotations.make(RotationSpec(), recorded.channels)), rel=REFINED
        )


def test_pause_stops_the_history_resume_goes_on_and_the_end_is_the_same(view):
    view.state.steps = 25
    view.start()
    finish(view)
    straight, length = view.result, len(view.history)
    view.start()
    for part in (4, 9, 16):
        until(lambda part=part: len(view.history) >= part)
        view.controls["pause"].click()
        until(lambda: view.job.paused)
        time.sleep(0.1)  # the step that ran may still be noted
        held = len(view.history)
        time.sleep(0.3)
        assert len(view.history) == held < length and view.job.running
        assert (
            "paused" in view.status.text
            and not view.controls["resume"].disabled
            and view.controls["pause"].disabled
        )
        view.controls["resume"].click()
    finish(view)
    assert_same_refinement(view.result, straight)
    assert len(view.history) == length == 26


@pytest.mark.parametrize("paused", [False, True])
def test_cancel_ends_it_and_another_can_start(view, paused):
    view.state.steps = 1000
    view.start()
    until(lambda: len(view.history) >= 5)
    if paused:
        view.pause()
    view.controls["cancel"].click()
    finish(view)
    assert view.result is None and 5 <= len(view.history) < 900
    assert view.status.text == f"cancelled after step {view.history[-1]['step']}"
    assert view.controls["save"].disabled and not view.controls["start"].disabled
    view.state.steps = 5
    view.start()
    finish(view)
    assert view.result is not None and len(view.history) == 6


def test_a_saved_r1_loads_with_its_spec_and_is_not_overwritten(view, tmp_path):
    view.save()
    assert view.status.state == "error" and "no finished refinement" in view.status.text
    view.state.steps = 5
    view.start()
    finish(view)
    view.controls["save"].click()
    path = tmp_path / "R1.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["spec"]) == public(view.spec).to_dict()
    assert torch.equal(rotation_files.load(path), view.result.R)
    assert "saved as" in view.status.text
    before = path.read_bytes()
    view.controls["save"].click()
    assert (
        view.status.state == "error"
        and "choose another name" in view.status.text
        and path.read_bytes() == before
    )


def test_plots_are_changed_in_place_and_show_the_chosen_token(view, recorded):
    losses, entries = view.plot, view.entries
    view.state.steps = 40
    view.start()
    finish(view)
    assert view.plot is losses and view.entries is entries
    table = view.table()
    assert (
        list(losses.data[1].y) == table["massive"].tolist()
        and list(losses.data[2].y) == table["distance"].tolist()
    )
    view.controls["site"].value = recorded.sites[1]
    token = view.controls["token"].options[1][1]
    view.controls["token"].value = token
    x = recorded.rows(recorded.sites[1])[token].double()
    error = float(squared_error((x @ view.result.R)[None], view.spec.quantizer))
    assert f"{error:.2f} now" in entries.layout.xaxis.title.text
    assert sum(entries.data[1].y) == sum(entries.data[2].y) == recorded.channels
    assert len(view.static().axes) == 2


def test_errors_are_one_sentence(view):
    view.state.rule, view.state.gamma = "sun", float("inf")
    view.state.variant = "as_released"
    view.start()
    assert view.status.state == "error" and "finite with variant as_released" in view.status.text
    view.state.variant, view.state.gamma, view.state.steps = "accelerated", 10.0, 1000
    view.start()
    until(lambda: len(view.history) >= 2)
    view.start()
    assert view.status.state == "error" and "one refinement at a time" in view.status.text
    assert len(view.history) >= 2, "the one that runs is not disturbed"
    view.cancel()
    finish(view)


def test_a_capture_that_cannot_be_made_is_said(tmp_path, store):
    view = Refinement(CaptureSpec(model=ModelSpec(source=str(tmp_path / "nowhere"))), store=store)
    view.job.wait(60)
    assert view.status.state == "error" and "ModelSpec.source must be" in view.status.text
    view.start()
    assert view.status.state == "error" and "not open yet" in view.status.text


def test_the_line_makes_the_same_view(view, recorded, store):
    view.state.site, view.state.gamma = recorded.sites[0], math.inf
    view.state.token = view.controls["token"].options[2][1]
    again = remade(view, capture=functools.partial(capture, store=store))
    assert again.state.trait_values() == view.state.trait_values()
    assert "gamma=float('inf')" in view.line()
