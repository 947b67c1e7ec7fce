"""What is it worth: stored rows at once and nothing computed, missing ones named, computed in the background,
stopped without loss.
"""

import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from explorers import remade
from test_evaluate import save_lively

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.worth import numbers
from dfrot_lab.explore.worth.numbers import Tally
from dfrot_lab.explore.worth.widget import Bars, Worth
from dfrot_lab.maths import tables
from dfrot_lab.maths.statistics import estimate
from dfrot_lab.recipe.specs import RELEASED_KEEP_OUT
from dfrot_lab.score import perplexity
from dfrot_lab.study import cost, experiments, main
from dfrot_lab.study.setting import Setting

PATIENCE = 120
"""Seconds after which a background job of a tiny model has hung."""


@pytest.fixture
def setting(tmp_path: Path, text_file: Path) -> Setting:
    model = save_lively(tmp_path / "lively")
    return Setting(
        model=model,
        corpus=str(text_file),
        windows=3,
        window=64,
        gptq_windows=2,
        builds=1,
        weights="rtn",
        steps=3,
    )


def keys(store: Store) -> set[str]:
    """Everything the store's folder holds that is finished, and what is in the making."""
    return {f"{path.parent.name}/{path.name}" for path in store.root.glob("*/*") if path.is_dir()}


def stored_row(
    setting: Setting, store: Store, kind: str, bits: str, keep_out: str | None = None
) -> perplexity.EvalResult:
    rotation = setting.refine if kind == "DFRot" else setting.rotation(kind)
    return perplexity.evaluate(setting.row(bits, rotation, keep_out=keep_out), store)


def computed(widget: Worth) -> None:
    widget.controls["compute"].click()
    widget.job.wait(PATIENCE)
    assert not widget.job.running


def test_stored_rows_are_shown_at_once_and_nothing_is_computed(setting, store):
    rh, ro = stored_row(setting, store, "RH", "4-4-4"), stored_row(setting, store, "RO", "4-4-4")
    before = keys(store)
    widget = Worth(setting, store)
    table = widget.table().set_index(["row", "bits"])
    assert keys(store) == before
    assert table.loc[("RO", "4-4-4"), "perplexity"] == ro.perplexity
    low, high = np.exp(estimate(ro.losses).ci95)
    assert tuple(table.loc[("RO", "4-4-4"), ["low", "high"]]) == pytest.approx((low, high))
    further = estimate(ro.losses - rh.losses)
    change = [100 * np.expm1(each) for each in (further.mean, *further.ci95)]
    assert list(table.loc[("RO", "4-4-4"), numbers.DIFFERENCE]) == pytest.approx(change)
    assert np.isnan(table.loc[("RH", "4-4-4"), "minus_rh"])
    assert table["stored"].sum() == 2
    bar = {trace.name: trace for trace in widget.plot.data}["RO"]
    assert (list(bar.x), list(bar.y), bar.visible) == (["4-4-4"], [pytest.approx(ro.perplexity)], True)
    assert bar.error_y.array[0] == pytest.approx(high - ro.perplexity)
    assert bar.error_y.arrayminus[0] == pytest.approx(ro.perplexity - low)
    assert f"{ro.perplexity:,.2f} [{low:,.2f}, {high:,.2f}]" in widget.rows.value


def test_one_window_has_no_interval(setting, store):
    setting = setting.with_(windows=1)
    ro, rh = stored_row(setting, store, "RO", "16-4-16"), stored_row(setting, store, "RH", "16-4-16")
    widget = Worth(setting, store)
    widget.controls["bits"].value = ("16-4-16",)
    row = widget.table().set_index("row").loc["RO"]
    assert row["perplexity"] == ro.perplexity
    assert row["minus_rh"] == pytest.approx(100 * (ro.perplexity / rh.perplexity - 1))
    assert row[["low", "high", "minus_rh_low", "minus_rh_high"]].isna().all()


def test_missing_rows_are_named_with_a_time_and_computed_in_the_background(setting, store):
    stored_row(setting, store, "RH", "4-4-16")
    widget = Worth(setting, store)
    widget.controls["rotations"].value, widget.controls["bits"].value = ("RO", "RH"), ("4-4-16", "16-16-16")
    assert [main.row_name(spec) for spec in widget.missing] == ["full precision", "RO (seed 0) 4-4-16"]
    assert "Not stored: full precision; RO (seed 0) 4-4-16. To compute: about" in widget.note.value
    computed(widget)
    assert not widget.missing and widget.status.text == "3 of 3 rows are stored"
    assert (
        widget.bar.value == 1.0 and widget.controls["compute"].disabled and widget.controls["cancel"].disabled
    )
    alone = perplexity.evaluate(
        setting.row("4-4-16", setting.rotation("RO")), Store(store.root.parent / "alone")
    )
    assert widget.table().set_index("row").loc["RO", "perplexity"] == alone.perplexity
    shapes = widget.plot.layout.shapes
    assert [shape.y0 for shape in shapes] == [
        pytest.approx(widget.table().set_index("row").loc["full precision", "perplexity"])
    ]


def test_dfrot_and_kept_out_rows_are_computed_too(setting, store):
    widget = Worth(setting, store)
    widget.controls["keep_out"].value = (RELEASED_KEEP_OUT,)
    widget.controls["rotations"].value, widget.controls["bits"].value = ("DFRot",), ("16-4-16",)
    computed(widget)
    assert widget.table()["row"].tolist() == ["DFRot, kept out"] and widget.table()["stored"].all()
    assert (
        widget.table()["perplexity"][0]
        == stored_row(setting, store, "DFRot", "16-4-16", RELEASED_KEEP_OUT).perplexity
    )


def test_a_cancelled_evaluation_keeps_its_windows_and_the_widget_goes_on(setting, store, monkeypatch):
    """The first window is let through, then cancel is pressed while the second is on its way."""
    widget = Worth(setting, store)
    widget.controls["rotations"].value, widget.controls["bits"].value = ("RH",), ("16-4-16",)
    real, scored, reached, go = perplexity.window_measures, [], threading.Event(), threading.Event()

    def slow(*of):
        scored.append(len(scored))
        if len(scored) == 2:
            reached.set()
            assert go.wait(PATIENCE)
        return real(*of)

    monkeypatch.setattr(perplexity, "window_measures", slow)
    widget.controls["compute"].click()
    assert reached.wait(PATIENCE)
    widget.controls["cancel"].click()
    go.set()
    widget.job.wait(PATIENCE)
    assert "Stopped. What is finished is kept" in widget.status.text and widget.status.state == "ready"
    partial = [name for name in keys(store) if name.endswith(".partial")]
    assert len(partial) == 1 and len(list((store.root / partial[0]).glob("window-*"))) == 2
    assert len(widget.missing) == 1 and not widget.controls["compute"].disabled
    computed(widget)
    assert len(scored) == 3, "windows that were finished are not scored again"
    whole = perplexity.evaluate(
        setting.row("16-4-16", setting.rotation("RH")), Store(store.root.parent / "alone")
    )
    assert widget.table()["perplexity"][0] == whole.perplexity


def test_cancel_stops_while_weights_are_made_and_keeps_their_layers(setting, store):
    widget = Worth(setting, store)
    widget.controls["rotations"].value, widget.controls["bits"].value = ("RH",), ("4-4-16",)
    told: list[str] = []
    tell = widget._tell

    def cancel_at_first(specs, tally, what):
        tell(specs, tally, what)
        if what.startswith("layer"):  # references come before
            told.append(what)
            widget.job.cancel()

    widget._tell = cancel_at_first
    computed(widget)
    assert told == ["layer 1 of 2"] and "Stopped" in widget.status.text
    assert list(store.root.glob("weights/*.partial/layer-000.safetensors"))
    widget._tell = tell
    computed(widget)
    assert widget.table()["stored"].all()


def test_an_error_is_one_sentence_and_the_widget_goes_on(setting, store):
    widget = Worth(setting, store)
    widget.controls["rotations"].value, widget.controls["bits"].value = ("RH",), ("16-4-16",)
    widget.controls["windows"].value = 200
    computed(widget)
    assert widget.status.state == "error" and "windows must be at most" in widget.status.text
    widget.controls["windows"].value = 3
    computed(widget)
    assert widget.table()["stored"].all() and widget.status.state == "ready"


def test_a_text_that_is_not_there_is_one_sentence(setting, store, monkeypatch):
    monkeypatch.setenv("DFROT_LAB_DATA", "nowhere")
    widget = Worth(setting, store)
    Path(setting.corpus).unlink()
    widget.controls["windows"].value = 2
    assert widget.status.state == "error" and "which is no file here" in widget.status.text


def test_rows_picked_once_at_full_precision_and_models_side_by_side(setting):
    specs = numbers.specs_of(
        setting, ("RO", "DFRot"), ("16-16-16", "4-4-16", "16-4-16"), "rtn", (None, RELEASED_KEEP_OUT)
    )
    names = [main.row_name(spec) for spec in specs]
    assert (
        names[:3] == ["full precision", "RO (seed 0) 4-4-16", "RO (seed 0) 4-4-16, kept out"]
        and len(names) == len(set(names)) == 9
    )


def test_costs_count_gptq_builds_and_the_refinement_once(setting, store):
    refined = numbers.specs_of(
        setting.with_(weights="gptq"), ("DFRot",), ("4-4-16", "4-4-4"), "gptq", (None,)
    )
    first, second = cost.seconds(refined, store)
    rounded = cost.seconds(numbers.specs_of(setting, ("DFRot",), ("4-4-16",), "rtn", (None,)), store)[0]
    assert first > rounded > second > 0


def test_the_tally_reaches_the_end_and_never_goes_back():
    tally = Tally([18.0, 10.0], scoring=10.0)
    seen = []
    for part, count in (("layer", 2), ("window", 2)):
        for done in range(1, count + 1):
            tally.at(part, done, count)
            seen.append(tally.share)
    tally.next()
    tally.at("window", 2, 2)
    assert seen == sorted(seen) and seen[0] == pytest.approx(4 / 28) and seen[-1] == pytest.approx(18 / 28)
    assert tally.share == pytest.approx(1.0)


def far_table() -> pd.DataFrame:
    nan = float("nan")
    rows = pd.DataFrame(
        [("NR", 20000.0, 15000.0, 30000.0), ("RH", 40.0, 35.0, 45.0)],
        columns=["row", "perplexity", "low", "high"],
    )
    rows = rows.assign(
        rotation=rows["row"], kept_out=False, bits="4-4-16", weights="rtn", windows=6, stored=True
    )
    return rows.assign(minus_rh=nan, minus_rh_low=nan, minus_rh_high=nan)


def test_a_perplexity_off_the_scale_is_cut_and_written_out():
    plot = Bars()
    plot.draw(far_table(), "title")
    bars = {trace.name: trace for trace in plot.data if trace.visible}
    top = plot.layout.yaxis.range[1]
    assert top == pytest.approx(1.08 * 45) and bars["NR"].y == (top,) and bars["NR"].error_y.array == (0,)
    assert bars["NR"].text == ("20,000, off the scale",) and bars["RH"].text == ("40.00",)


def test_the_papers_numbers_stand_beside_the_same_rows(setting):
    specs = numbers.specs_of(
        setting.with_(weights="gptq"), ("RO", "RH"), ("4-4-16",), "gptq", (None, RELEASED_KEEP_OUT)
    )
    beside = numbers.paper_table(specs, lambda _spec: None).set_index("row")
    assert beside.loc["RO", "LLaMA2-7B"] == "7.71" and beside.loc["RO, kept out", "LLaMA2-7B"] == "6.10"
    rtn = numbers.specs_of(setting, ("RO",), ("4-4-4",), "rtn", (None,))
    assert len(numbers.paper_table(rtn, lambda _spec: None)) == 0, "the paper has no RTN number at 4-4-4"


def test_markup_in_a_row_is_inert(setting, store):
    table = far_table().assign(row="<img src=x onerror=alert(1)>")
    assert "<img" not in numbers.shown(table) and "&lt;img" in numbers.shown(table)
    assert tables.PERPLEXITY in numbers.shown(table)


def test_the_static_figure_draws_the_stored_rows_and_says_when_there_are_none(setting, store):
    widget = Worth(setting, store)
    with pytest.raises(ValueError, match="nothing to draw"):
        widget.static()
    stored_row(setting, store, "RO", "4-4-4")
    assert [ax.get_title() for ax in widget.static().axes] == ["4-4-4"]


def test_the_leaderboard_is_listed_as_far_as_it_is_stored(setting, store):
    widget = Worth(setting, store)
    assert widget.board.data["rows"] == [] and "dfrot-lab leaderboard" in widget.beyond.value
    own = experiments.setting_of("leaderboard", widget.chosen).with_(build=0)
    perplexity.evaluate(own.row("16-4-16", own.rotation("RH")), store)
    widget.rank()
    ((name, *_),) = [row for row in widget.board.data["rows"] if "fused R1" in row]
    assert name == "RH" and "under one pipeline" in widget.beyond.value


def test_the_line_makes_the_same_view(setting, store):
    widget = Worth(setting, store)
    widget.state.bits, widget.state.paper_model, widget.state.windows = ("4-4-4",), "LLaMA3-8B", 3
    again = remade(widget)
    assert again.state.trait_values() == widget.state.trait_values()
    pd.testing.assert_frame_equal(again.table(), widget.table())
