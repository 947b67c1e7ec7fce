"""The leaderboard: all rows of all groups, each beside RH of its own bits; ranked within its group; it goes on."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TEXT
from test_evaluate import save_lively
from typer.testing import CliRunner

from dfrot_lab.cli.app import app
from dfrot_lab.cli.options import Options
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import tables
from dfrot_lab.model import door
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.base import strict_json
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.rotate import klt, task, transforms
from dfrot_lab.score import perplexity
from dfrot_lab.show import ranks
from dfrot_lab.show.experiment_figures import FIGURES
from dfrot_lab.study import fits, leaderboard
from dfrot_lab.study.leaderboard import GROUPS, ranked, rows
from dfrot_lab.study.setting import Setting

FEW = ("fused R1", "no rotation")
SOME = ["RH", "DFRot", "KLT", "SpinQuant"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("board")
    text = folder / "text.txt"
    text.write_text(TEXT)
    model = save_lively(folder / "model")
    own = {"windows": 1, "window": 64, "gptq_windows": 2, "builds": 2, "weights": "rtn"}
    return Setting(model=model, corpus=str(text), **own)


@pytest.fixture(scope="module")
def board(setting, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "rows", lambda: ["NR", *SOME])
        patch.setattr(task, "spec", lambda *of, spec=task.spec, **how: spec(*of, **how).with_(updates=4))
        store = Store(tmp_path_factory.mktemp("store"))
        yield leaderboard.leaderboard(setting.with_(quick=True), store, FEW), store


def test_every_rotation_and_quantizer_is_in_a_group(setting):
    found = {group: [row.spec for row in rows(group, setting)] for group in GROUPS}
    apart = (*leaderboard.UNROTATED, *leaderboard.ONLINE)
    for group, bits in (("fused R1", "16-4-16"), ("fused R1, 4-bit weights", "4-4-16")):
        assert {spec.bits for spec in found[group]} == {bits}
        fused = [spec.rotation.name for spec in found[group]]
        assert sorted(fused) == sorted(name for name in registry.rows() if name not in apart)
    acting = [name for name in registry.rows() if registry.spec_of(name).acts_online]
    unrotated = {"NR", "SmoothQuant", "AWQ", "OS+"}
    for weights in ("", ", 4-bit weights"):
        assert {spec.rotation.name for spec in found["online" + weights]} == {*acting, "RH"}
        assert {spec.rotation.name for spec in found["no rotation" + weights]} == {*unrotated, "RH"}
    assert {spec.weights.method for spec in found["weight quantizers"]} == set(registry.WEIGHTS)
    assert {spec.rotation.name for spec in found["weight quantizers"]} == {"RH", "Offset+"}
    extras = [spec for spec in found["free extras"] if spec.clips or spec.scales]
    assert {spec.rotation.name for spec in extras} == {"RH", "DFRot", "Offset+"}


@pytest.mark.parametrize("group", GROUPS)
def test_each_row_is_once_and_is_compared_with_rh_of_its_bits(group, setting):
    found = list(rows(group, setting))
    assert len({row.spec for row in found}) == len(found)
    for row in found:
        is_reference = row.spec == setting.row(row.spec.bits, setting.rotation("RH"))
        name = row.spec.rotation.name
        others = {"RH": "RH"} | ({"all rows alike": name[:-10]} if name.endswith(" + massive") else {})
        assert {said: spec.rotation.name for said, spec in row.against.items()} == (
            {} if is_reference else others
        )
        assert {spec.bits for spec in row.against.values()} <= {row.spec.bits}
        assert row.labels["group"] == group


def test_the_table_says_seconds_needs_and_what_was_published(board):
    table, _ = board
    by = table.drop_duplicates("rotation").set_index("rotation")
    assert by.loc["RH", leaderboard.FIT] == 0 and by.loc["RH", "needs"] == "nothing"
    assert by[leaderboard.ONLINE_OPS].eq(0).all(), "of a fused R1, beside R3 and R4"
    for name in ("DFRot", "KLT", "SpinQuant", "OS+"):
        assert by.loc[name, leaderboard.FIT] > 0 and by.loc[name, "needs"] != "nothing"
        assert 0.1 < by.loc[name, leaderboard.PEAK] < 10, "torch, a tiny model and its rows"
    assert math.isnan(by.loc["RH", leaderboard.PEAK])
    assert by.loc["SpinQuant", list(leaderboard.COLUMNS)].tolist() == [5.9, 7.3]
    assert by.loc["KLT", list(leaderboard.COLUMNS)].isna().all()


def test_a_method_that_does_not_say_what_it_needs_has_its_row_all_the_same(board, setting, monkeypatch):
    _, store = board
    monkeypatch.delattr(klt, "NEEDS")
    recipe = setting.with_(quick=True, build=0).row("16-4-16", setting.method("KLT"))
    found = fits.cost(recipe, store)
    assert found.needs == "not said" and found.seconds > 0 and found.peak > 1e8


def test_of_a_fit_that_was_stored_before_no_peak_is_told(setting, tmp_path, monkeypatch):
    store, recipe = Store(tmp_path), setting.row("16-4-16", setting.method("KLT"))
    here = transforms.fit(door.resolved(recipe).canonical(), transforms.Context(recipe, store))
    found = fits.cost(recipe, store)
    assert found.seconds == here.seconds and math.isnan(found.peak)
    monkeypatch.setattr(fits.subprocess, "run", lambda *_, **__: pytest.fail("asked again"))
    again = fits.cost(recipe, store)
    assert again[::2] == found[::2] and math.isnan(again.peak)


def test_what_fails_in_a_process_of_its_own_is_tried_here_and_an_interrupt_is_one(
    setting, tmp_path, monkeypatch
):
    store, recipe = Store(tmp_path), setting.row("16-4-16", setting.method("KLT"))
    monkeypatch.setattr(fits, "CHILD", f"raise SystemExit({fits.INTERRUPTED})")
    with pytest.raises(KeyboardInterrupt):
        fits.cost(recipe, store)
    monkeypatch.setattr(fits, "CHILD", "raise SystemExit(1)")
    found = fits.cost(recipe, store)
    assert found.seconds > 0 and math.isnan(found.peak)


def test_it_is_ranked_by_divergence_within_group_and_bits(board):
    table, _ = board
    found = ranked(table)
    assert found["group"].drop_duplicates().tolist() == list(FEW)
    assert len(found) == len(SOME) + len(("NR", "OS+", "RH")) and set(found["bits"]) == {"16-4-16"}
    for _, own in found.groupby(["group", "bits"]):
        assert own["KL divergence"].is_monotonic_increasing and own["perplexity"].gt(1).all()
        reference = own[own["rotation"] == "RH"]
        assert len(reference) == 1 and math.isnan(reference["change, %"].iloc[0])
    line = found[(found["rotation"] == "KLT") & (found["bits"] == "16-4-16")].iloc[0]
    change = table[(table["rotation"] == "KLT") & (table["bits"] == "16-4-16")].set_index("metric")
    (name,) = [metric for metric in change.index if metric.startswith("change of perplexity")]
    assert (line["change, %"], line["verdict"]) == (change.loc[name, "value"], change.loc[name, "verdict"])


def test_what_is_stored_is_the_table_without_computing_anything(board, setting, tmp_path, monkeypatch):
    table, store = board
    quick = setting.with_(quick=True)
    before = sorted(path.name for path in store.root.glob("*/*"))
    for one in (perplexity.evaluate_all, transforms.fit, fits.subprocess.run):
        monkeypatch.setattr(f"{one.__module__}.{one.__name__}", lambda *_, **__: pytest.fail("computed"))
    found, _ = leaderboard.stored(quick, store)
    own = found[found["group"].isin(FEW)].reset_index(drop=True)
    pd.testing.assert_frame_equal(own[table.columns], table, check_dtype=False)
    assert sorted(path.name for path in store.root.glob("*/*")) == before
    empty, _ = leaderboard.stored(quick, Store(tmp_path))
    assert empty.empty and ranks.listed(quick, Store(tmp_path))["rows"] == []


def test_each_group_has_a_panel_of_its_own_least_change_first(board):
    table, _ = board
    drawn = FIGURES["leaderboard"](table)
    assert [ax.get_title() for ax in drawn.axes] == [f"{group}, 16-4-16" for group in FEW]
    for ax, group in zip(drawn.axes, FEW, strict=True):
        own = table[(table["group"] == group) & (table["metric"] == tables.change("RH"))]
        names = [label.get_text() for label in ax.get_yticklabels()]
        assert names == own.sort_values("value")["rotation"].tolist() and "RH" not in names
        assert ax.get_xlabel() == tables.change("RH")
    assert ranks._labels(pd.DataFrame({"rotation": ["RH", "RH"], "weights": [None, "gptq"], "option": "none"})) == [
        "RH", "RH, gptq"
    ]  # fmt: skip


def test_the_rows_listed_for_a_page_have_their_recipes_and_say_no_number_that_is_none(board, setting):
    table, store = board
    found = ranks.listed(setting.with_(quick=True), store)
    assert json.loads(strict_json(found)) == found
    lines = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    own = [line for line in lines if line["group"] in FEW]
    assert [line["rotation"] for line in own] == ranked(table)["rotation"].tolist()
    for line in own:
        recipe = Recipe.of(yaml.safe_load(found["recipes"][line["recipe"]]))
        assert recipe.rotation.name == line["rotation"] and recipe.bits == line["bits"]
        assert recipe.model.source.startswith("model@"), "no path"
        assert (line["interval"] is None) == (line["rotation"] == "RH") == (line["change, %"] is None)


def test_its_two_experiments_are_all_its_groups_each_once(setting):
    halves = leaderboard.FLOAT_WEIGHTS, leaderboard.LOW_BIT_WEIGHTS
    assert [len(half) for half in halves] == [4, 5] and list(GROUPS) == [*halves[0], *halves[1]]
    for half, is_float in zip(halves, (True, False), strict=True):
        specs = [row.spec for group in half for row in rows(group, setting)]
        assert {spec.weights.quantizer.bits == 16 for spec in specs} == {is_float}
    asked = [each.keywords["groups"] for *_, each in leaderboard.EXPERIMENTS.values()]
    assert asked == [tuple(half) for half in halves]


def test_quick_cuts_what_was_not_said(setting):
    said = Options(window=64, builds=3)
    found = said.quickened(setting.with_(window=64, builds=3))
    assert (found.window, found.builds, found.gptq_windows, found.quick) == (64, 3, 2, True)
    assert found.method("SpinQuant").updates == found.method("DartQuant").updates == found.steps // 4 == 5
    assert setting.method("DartQuant").updates == 100


def test_again_nothing_is_computed(board, setting, monkeypatch):
    table, store = board
    monkeypatch.setattr(perplexity, "build", lambda *_: pytest.fail("a row was built again"))
    monkeypatch.setattr(fits, "CHILD", "raise SystemExit(1)")
    monkeypatch.setattr(transforms, "fit", lambda *_: pytest.fail("a rotation was found again"))
    again = leaderboard.leaderboard(setting.with_(quick=True), store, FEW)
    np.testing.assert_array_equal(again["value"], table["value"])


def test_the_command_prints_a_group_and_refuses_another(setting, tmp_path, monkeypatch):
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path))
    said = ["--model", setting.model.source, "--corpus", setting.corpus, "--window", "64"]
    said += ["--windows", "1", "--builds", "1"]
    out = tmp_path / "board.csv"
    result = CliRunner().invoke(
        app, ["leaderboard", *said, "--group", "no rotation", "--json", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["rows"]
    assert {row["rotation"] for row in found} == {"NR", "SmoothQuant", "AWQ", "OS+", "RH"} and out.exists()
    nowhere = CliRunner().invoke(app, ["leaderboard", *said, "--out", str(out / "board.csv")])
    assert nowhere.exit_code != 0 and "--out must be where files can be written" in nowhere.output
    wrong = CliRunner().invoke(app, ["leaderboard", *said, "--group", "best"])
    assert wrong.exit_code != 0 and "--group must be one of fused R1" in wrong.output + str(wrong.exception)
