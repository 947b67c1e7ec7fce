"""The errors explorer without a browser: its numbers are the error table's, brush and click do what a reader
means, token text is safe.
"""

import functools
import re
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYERS, save_tiny
from explorers import MALICIOUS, Page, assert_safe, event, remade, shown_text

from dfrot_lab import explore
from dfrot_lab.disk import rotation_files
from dfrot_lab.explore.errors.widget import KEPT, ErrorRows
from dfrot_lab.explore.page import contexts, html_table, number
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize, levels
from dfrot_lab.model import door
from dfrot_lab.observe import errors
from dfrot_lab.observe.capture import Capture, capture
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, RefineSpec, RotationSpec
from dfrot_lab.rotate import dfrot

TOKENS = 128
ASYM4 = RefineSpec().quantizer  # what it opens on


@pytest.fixture
def acts(tiny_spec, text_file, store) -> Capture:
    return capture(
        CaptureSpec(
            model=tiny_spec, corpus=CorpusSpec(name=str(text_file), split="calibration"), tokens=TOKENS
        ),
        store,
    )


@pytest.fixture
def top(acts, store):
    return explore.errors(acts, store=store)


def expected(acts: Capture, matrices: dict, site: str, quantizer: QuantSpec) -> pd.DataFrame:
    return errors.wide(errors.token_errors(acts, matrices, [quantizer], sites=[site]))


def assert_same(found: pd.DataFrame, table: pd.DataFrame) -> None:
    assert set(found.columns) == set(table.columns)
    for name in found.columns:
        if found[name].dtype.kind == "f":  # an error is continuous where a code flips
            np.testing.assert_allclose(found[name], table[name], rtol=1e-4, atol=1e-6, err_msg=name)
        else:
            assert found[name].tolist() == table[name].tolist(), name


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def assert_same_view(found: tuple, wanted: tuple) -> None:
    """Two drawings of the same numbers: arrays to rounding, texts to the last digit that they show."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, bytes):
            np.testing.assert_allclose(
                *(np.frombuffer(each, np.float32).astype(float) for each in (one, other)),
                rtol=1e-4,
                atol=1e-5,
            )
        elif isinstance(one, str):
            assert NUMBER.sub("#", one) == NUMBER.sub("#", other)
            numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(each)] for each in (one, other)]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.01)
        else:
            assert one == other


def view_of(top) -> tuple:
    data = top.plot.data[0]
    return (
        data.x.tobytes(),
        data.y.tobytes(),
        top.about.value,
        top.listed.value,
        top.fig4.data[1].y.tobytes(),
        tuple(top.table().columns),
    )


# ---- the numbers


def test_its_table_is_the_error_table(acts, top):
    assert "dfrot-errors" in top._dom_classes
    assert_same(top.table(), expected(acts, errors.default_rotations(64), "layers.1.input_norm", ASYM4))
    moves = {"site": "layers.1.post_attention_norm", "bits": 3, "symmetric": True, "clip": 0.8, "seed": 5}
    for name, value in moves.items():
        top.controls[name].value = value
    quantizer = QuantSpec(bits=3, clip_ratio=0.8)
    table = expected(acts, errors.default_rotations(64, seed=5), "layers.1.post_attention_norm", quantizer)
    assert_same(top.table(), table)
    assert np.array_equal(top.plot.data[0].x, top.table()["RO"]) and np.array_equal(
        top.plot.data[0].y, top.table()["RH"]
    )
    assert "layers.1.post_attention_norm, sym3-c0.8: 128 tokens" in top.status.text


def test_it_opens_on_the_grid_that_dfrot_is_refined_for_and_says_so(acts, top, store):
    """On a symmetric grid DFRot looks worse than RH: it is refined for another."""
    assert QuantSpec(scheme="asymmetric") == top.quantizer == RefineSpec(capture=acts.spec).quantizer
    assert "is refined for" not in top.status.text  # the store has no DFRot yet
    dfrot.refined(RefineSpec(capture=acts.spec), store)
    opened = explore.errors(acts, store=store)
    assert ", asym4, the grid DFRot is refined for: " in opened.status.text
    opened.controls["symmetric"].value = True
    assert ", sym4: " in opened.status.text


def test_going_back_gives_the_first_view_again(top):
    before = view_of(top)
    for name, there in (
        ("site", "layers.0.input_norm"),
        ("bits", 2),
        ("symmetric", True),
        ("clip", 0.5),
        ("seed", 1),
    ):
        back = top.controls[name].value
        top.controls[name].value = there
        assert view_of(top)[:2] != before[:2], name
        top.controls[name].value = back
    assert_same_view(view_of(top), before)


def test_a_change_moves_the_data_in_place(top):
    kept = (top.plot, top.plot.data[0], top.fig4, top.space)
    before = view_of(top)
    top.controls["bits"].value = 6
    assert all(a is b for a, b in zip(kept, (top.plot, top.plot.data[0], top.fig4, top.space), strict=True))
    assert view_of(top)[:2] != before[:2]


def test_bits_and_clip_do_not_rotate_again(acts, top, monkeypatch):
    def never(self, site):
        raise AssertionError(f"the rows of {site} were read again")

    top.controls["bits"].value = 3
    monkeypatch.setattr(ErrorRows, "put", never)
    rotated = {name: top.rows.rotated(top.state.site, name) for name in ("RO", "RH")}
    top.controls["clip"].value = 0.9
    assert all(top.rows.rotated(top.state.site, name) is x for name, x in rotated.items())


def test_only_the_newest_rotated_rows_are_kept(acts):
    rows = ErrorRows(acts, {f"R{i}": torch.eye(64, dtype=torch.float64) for i in range(2 * KEPT)})
    for name in rows.matrices:
        rows.rotated(acts.sites[0], name)
    assert rows.rotated.cache_info().currsize == KEPT


def test_given_rotations_are_used_as_they_are_and_have_no_seed(acts, store):
    R = rotations.make(RotationSpec(kind="RO", seed=7), 64)
    top = explore.errors(acts, {"mine": R, "NR": torch.eye(64)}, store=store)
    assert top.controls["seed"].disabled and top.controls["x"].options == ("mine", "NR")
    wanted = expected(acts, {"mine": R, "NR": torch.eye(64)}, top.state.site, ASYM4)
    assert_same(top.table(), wanted)
    with pytest.raises(ValueError, match=r"rotation\.shape must be \(64, 64\)"):
        explore.errors(acts, {"wrong": torch.eye(32)}, store=store)
    with pytest.raises(ValueError, match="rotation must name at least one matrix"):
        explore.errors(acts, {}, store=store)


# ---- massive tokens, three axes


def test_massive_tokens_are_drawn_larger_and_in_the_other_colour(top):
    newline = (top.table()["text"] == "\n").to_numpy()
    marker = top.plot.data[0].marker
    assert np.array_equal(marker.color == 1, newline) and np.array_equal(marker.size > 5, newline)
    assert f"{newline.sum()} massive" in top.status.text
    assert top.table()["text"].iloc[top.state.token] == "\n"  # it opens on a massive token's Fig. 4


def test_three_axes_are_a_plot_in_space_and_back(top):
    top.controls["z"].value = "NR"
    assert top.stage.shown is top.space
    table = top.table()
    for letter, name in (("x", "RO"), ("y", "RH"), ("z", "NR")):
        assert np.array_equal(top.space.data[0][letter], table[name])
        assert top.space.layout.scene[f"{letter}axis"].title.text == f"E({name})"
    assert len(top.static().axes) == 1 and top.static().axes[0].get_zlabel() == "E(NR)"
    event(top.space, "plotly_click", [9])
    assert top.state.token == 9
    top.controls["z"].value = "none"
    assert top.stage.shown is top.plot


def test_hover_shows_the_token_in_its_context():
    found = contexts(["a", "<b>", "c", "d"], around=1)
    assert found[1] == "\u2068a\u2069 \u25b8<b>\u2068&lt;b&gt;\u2069</b>\u25c2 \u2068c\u2069"
    assert found[0].startswith(" \u25b8<b>\u2068a") and found[3].endswith("d\u2069</b>\u25c2 ")
    assert "\u2026" in contexts(["x" * 100])[0]


def test_hover_has_every_rotations_error(top):
    data = top.plot.data[0]
    assert np.array_equal(data.customdata, top.table()[["NR", "RO", "RH"]])
    assert all(
        f"E({name}) %{{customdata[{i}]" in data.hovertemplate for i, name in enumerate(("NR", "RO", "RH"))
    )
    assert list(data.text) == contexts(top.table()["text"].tolist())


# ---- brush and click


def test_brushing_lists_exactly_the_points_inside(top):
    table = top.table()
    low, high = table["RO"].quantile([0.3, 0.6])
    inside = table.index[table["RO"].between(low, high)].tolist()
    assert 10 < len(inside) < TOKENS
    event(top.plot, "plotly_selected", inside[::-1])
    assert top.selected()["token"].tolist() == inside
    page = Page(top.listed.value).text
    assert page.startswith(f"{len(inside)} brushed tokens, largest E(RH) first")
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", top.listed.value)
    assert heads[:4] == ["token", "text", *top.axes[:2]] and heads[-1] == "massive"
    rows = top.listed.value.count("<tr>") - 1
    assert rows == len(inside)
    top.controls["bits"].value = 3
    assert top.selected()["RO"].tolist() == top.table()["RO"].iloc[inside].tolist()
    event(top.plot, "plotly_deselect", [])
    assert top.selected().empty and "Brush a region" in top.listed.value


def test_a_click_opens_fig_4_of_that_token(acts, top):
    quantizer, R = ASYM4, errors.default_rotations(64)
    event(top.plot, "plotly_click", [17])
    assert top.state.token == top.controls["token"].value == 17
    values = errors.massive_values(acts, top.state.site, 17, R, quantizer)
    for i, name in enumerate(("NR", "RO", "RH")):
        part = values[values["rotation"] == name]
        dots, rungs = top.fig4.data[2 * i + 1], top.fig4.data[2 * i]
        for drawn, wanted in ((dots.x, part["value"]), (dots.y, part["quantized"])):
            np.testing.assert_allclose(drawn, wanted, rtol=1e-4, atol=1e-5)
        rungs = rungs.y[~np.isnan(rungs.x)]
        assert np.abs(dots.y[:, None] - rungs).min(1).max() < 1e-4
        error = ((part["value"] - part["quantized"]) ** 2).sum()
        assert float(top.fig4.layout.annotations[i].text.removeprefix(f"{name}: E = ")) == pytest.approx(
            error, rel=0.01
        )
        assert error == pytest.approx(top.table()[name].iloc[17], rel=1e-4)
    assert top.fig4.layout.xaxis4.visible is False and top.fig4.layout.annotations[3].text == ""
    assert Page(top.about.value).text.startswith(
        f"Token 17 \u2018{shown_text(acts.texts[17])}\u2019 before and after quantization"
    )
    top.controls["token"].value = 18
    np.testing.assert_allclose(
        top.fig4.data[1].x,
        errors.massive_values(acts, top.state.site, 18, R)["value"].iloc[:64],
        rtol=1e-4,
        atol=1e-5,
    )


def test_fig_4_shows_the_rotations_chosen_for_it(top):
    top.controls["panels"].value = ("RH",)
    assert (
        top.fig4.layout.annotations[0].text.startswith("RH: E = ") and top.fig4.layout.xaxis2.visible is False
    )
    assert top.fig4.layout.xaxis.domain[1] > 0.9 and len(top.fig4.data[3].x) == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_are_all_values_the_quantizer_gives(bits, symmetric):
    quantizer = QuantSpec(bits=bits, scheme="symmetric" if symmetric else "asymmetric", clip_ratio=0.9)
    row = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)) + 1
    found = levels(row[0], quantizer).numpy()
    assert len(found) == 2**bits and (np.diff(found) > 0).all()
    given = np.unique(fake_quantize(row, quantizer).numpy())
    assert np.abs(given[:, None] - found).min(1).max() < 1e-5


# ---- saved rotations, refinement


def add(top, path: Path | str) -> None:
    top.controls["path"].value = str(path)
    top.controls["load"].click()


def test_a_saved_rotation_joins_the_axes(acts, top, tmp_path):
    R = rotations.make(RotationSpec(kind="RO", seed=9), 64)
    rotation_files.save(R, tmp_path / "mine.safetensors", None)
    add(top, tmp_path / "mine.safetensors")
    assert (top.state.x, top.state.y, top.state.z) == ("RO", "mine.safetensors", "none")
    assert top.controls["x"].options == ("NR", "RO", "RH", "mine.safetensors")
    matrices = {**errors.default_rotations(64), "mine.safetensors": R}
    assert_same(top.table(), expected(acts, matrices, top.state.site, ASYM4))
    assert np.array_equal(top.plot.data[0].y, top.table()["mine.safetensors"])
    assert top.fig4.layout.annotations[3].text.startswith("mine.safetensors: E = ")
    rotation_files.save(R.T, tmp_path / "mine.safetensors", None)
    add(top, tmp_path / "mine.safetensors")
    assert_same(top.table(), expected(acts, {**matrices, "mine.safetensors": R.T}, top.state.site, ASYM4))


def test_a_files_name_is_text_and_no_template(top, tmp_path):
    name = "%{x}<b>'\".safetensors"
    rotation_files.save(torch.eye(64), tmp_path / name, None)
    add(top, tmp_path / name)
    assert top.status.state == "ready" and top.state.y == name
    assert_safe(top)
    assert "&#37;{x}&lt;b&gt;" in top.plot.data[0].hovertemplate
    assert top.plot.layout.yaxis.title.text == "E(%{x}&lt;b&gt;&#x27;&#34;.safetensors)"


@pytest.mark.parametrize(
    ("control", "value", "sentence"),
    [
        ("path", "nowhere.safetensors", "must be an existing safetensors file; got nowhere.safetensors"),
        ("path", "", "must be an existing safetensors file"),
        ("clip", 0.0, "QuantSpec.clip_ratio must be in (0, 1]; got 0.0"),
        ("clip", -1.0, "QuantSpec.clip_ratio must be in (0, 1]; got -1.0"),
    ],
)
def test_an_error_is_one_sentence_and_leaves_the_view(top, control, value, sentence):
    before = view_of(top)
    top.controls[control].value = value
    if control == "path":
        top.controls["load"].click()
    assert top.status.state == "error" and sentence in top.status.text
    assert view_of(top) == before
    top.controls["clip"].value = 0.95
    assert top.status.state == "ready" and view_of(top)[:2] != before[:2]


def test_a_rotation_of_another_size_and_a_matrix_that_is_none_are_refused(top, tmp_path):
    before = view_of(top)
    rotation_files.save(torch.eye(32), tmp_path / "small.safetensors", None)
    add(top, tmp_path / "small.safetensors")
    assert "rotation.shape must be (64, 64); got (32, 32)" in top.status.text
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    add(top, tmp_path / "broken.safetensors")
    assert "must be a complete safetensors file" in top.status.text and view_of(top) == before


def test_dfrot_is_taken_from_the_store_or_made_by_the_button(acts, top, store):
    spec = RefineSpec(capture=acts.spec)
    assert "DFRot" not in top.table().columns and dfrot.stored(spec, store) is None
    top.controls["refine"].click()
    top.job.wait(120)
    assert top.status.state == "ready", top.status.text
    R = dfrot.refined(spec, store).R
    assert_same(
        top.table(), expected(acts, {**errors.default_rotations(64), "DFRot": R}, top.state.site, ASYM4)
    )
    assert top.state.y == "DFRot" and top.controls["refine"].disabled
    again = explore.errors(acts, store=store)
    assert_same(again.table(), top.table())
    assert again.controls["refine"] not in [
        part for box in again.children for part in getattr(box, "children", ())
    ]


def test_a_refinement_can_be_cancelled_and_goes_on_where_it_was(acts, top, store, monkeypatch):
    reached, go, done = threading.Event(), threading.Event(), dfrot.refined

    def slow(spec, store, checkpoint):
        def seen(state):
            reached.set()
            assert go.wait(20)
            checkpoint(state)

        return done(spec, store, checkpoint=seen)

    monkeypatch.setattr(dfrot, "refined", slow)
    before = view_of(top)
    top.controls["refine"].click()
    assert reached.wait(60) and top.job.running and top.controls["refine"].disabled
    top.controls["cancel"].click()
    go.set()
    top.job.wait(60)
    assert "cancelled" in top.status.text and view_of(top) == before and not top.controls["refine"].disabled
    steps = []
    done(
        RefineSpec(capture=acts.spec), store, checkpoint=lambda state: steps.append(state.history[-1]["step"])
    )
    assert steps[0] == 20  # step 0 was saved before it was stopped


# ---- safe text, table and figure


def test_token_text_never_becomes_markup(acts, store, monkeypatch):
    texts = [MALICIOUS[i % len(MALICIOUS)] for i in range(TOKENS)]
    monkeypatch.setattr(acts, "texts", texts)
    top = explore.errors(acts, store=store)
    event(top.plot, "plotly_selected", list(range(40)))
    for token, text in enumerate(MALICIOUS):
        top.state.token = token
        assert_safe(top)
        assert shown_text(text) in Page(top.about.value).text
        assert shown_text(text) in Page(top.listed.value).text
    assert "onerror" in top.plot.data[0].text[0] and "<img" not in top.plot.data[0].text[0]
    assert "<b>\u2068&lt;b&gt;\u2069</b>" in top.plot.data[0].text[1]


def test_table_and_static_agree_with_the_view(top):
    top.controls["y"].value = "NR"
    top.controls["bits"].value = 3
    axes = top.static().axes[0]
    offsets = np.concatenate([part.get_offsets() for part in axes.collections])
    table = top.table()
    assert np.allclose(np.sort(offsets[:, 0]), np.sort(table["RO"])) and np.allclose(
        np.sort(offsets[:, 1]), np.sort(table["NR"])
    )
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("E(RO)", "E(NR)")
    figure = top.static_token()
    assert [ax.get_title().split(":")[0] for ax in figure.axes] == ["NR", "RO", "RH"]
    assert np.allclose(
        figure.axes[1].collections[0].get_offsets(), np.column_stack([top.fig4.data[3].x, top.fig4.data[3].y])
    )
    table["RO"] = 0
    assert top.table()["RO"].min() > 0  # a copy: a reader's changes do not reach the view


def test_every_control_has_a_description(top):
    assert all(control.description for control in top.controls.values())
    assert top.controls["bits"].min == 2 and top.controls["bits"].max == 8
    assert len(top.controls["site"].options) == 2 * LAYERS


def test_tables_write_numbers_and_names():
    made = Page(
        html_table(pd.DataFrame({"token": [3], "text": ["<i>"], "value": [np.float32(24816.1)]}), "A caption")
    )
    assert made.text == "A captiontokentextvalue3<i>24,816" and "i" not in made.tags
    assert [number(v) for v in (24816.1, 100, 99.95, 2.1495, -0.0031234)] == [
        "24,816",
        "100",
        "100",
        "2.15",
        "-0.00312",
    ]


def test_the_captures_spec_comes_back(tmp_path, text_file, store):
    model = save_tiny(tmp_path / "other")
    spec = CaptureSpec(
        model=model, corpus=CorpusSpec(name=str(text_file), split="evaluation"), tokens=64, skip=1
    )
    assert capture(spec, store).spec == door.resolved(spec)


# ---- the view taken away, the token in all views


def test_the_line_makes_the_same_view(acts, top, store, tmp_path):
    R = rotations.make(RotationSpec(kind="RO", seed=9), 64)
    top.state.path = str(tmp_path / "mine.safetensors")
    rotation_files.save(R, Path(top.state.path), None)
    top.load()
    for name, value in {"bits": 3, "z": "RH", "token": 7, "seed": 2, "brushed": (3, 5)}.items():
        setattr(top.state, name, value)
    again = remade(top, capture=functools.partial(capture, store=store))
    assert again.state.trait_values() == top.state.trait_values()
    assert_same(again.table(), top.table())
    assert again.plot.data[0].selectedpoints == (3, 5) and again.listed.value == top.listed.value


@pytest.mark.parametrize("z", ["none", "NR"])
def test_the_token_that_is_picked_has_a_ring_and_a_frame_in_the_list(top, z):
    top.state.z, top.state.brushed = z, (3, 7)
    plot = top.plot if z == "none" else top.space
    for token in (7, 3):
        top.state.token = token
        row = top.table().loc[token]
        assert [plot.data[-1][axis][0] for axis in "xyz"[: len(top.axes)]] == pytest.approx(
            row[top.axes].tolist(), rel=1e-6
        )
        framed = re.findall(r"<tr style=[^>]*><td>(\d+)", top.listed.value)
        assert framed == [str(token)]
    top.state.bits = 2
    assert plot.data[-1].y[0] == pytest.approx(top.table()[top.axes[1]][3], rel=1e-6)


def test_explorers_of_one_text_pick_a_token_together(acts, top, store):
    seen = explore.massive(acts, store=store, tokens=64)
    explore.together(seen, top)
    seen.pick(9)
    assert top.state.token == 9 and "Token 9 " in top.about.value
    top.state.token = 100  # which the other does not show
    assert seen.state.token == 9
    top.state.token = 11
    assert seen.state.token == seen.film.token == 11
