"""Experiments: tables that say what evaluating row by row says, computed once, and runs that are stopped or
killed and lose or double no row. Every experiment has a figure, which draws its table whole; table and
figure are kept together, and a stopped write leaves what was there.
"""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from again import FLIPPED_PERPLEXITY, sharing
from conftest import TEXT
from matplotlib.figure import Figure
from scipy import stats
from test_evaluate import resolved, save_lively

from dfrot_lab.disk import row_files
from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.maths import tables
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.model import corpus
from dfrot_lab.model.public import public
from dfrot_lab.observe import capture as capturing, errors, massive
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.keys import FORMULAS
from dfrot_lab.recipe.specs import (
    PAPER_RULE,
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    Recipe,
    RefineSpec,
    RotationSpec,
)
from dfrot_lab.rotate import dfrot
from dfrot_lab.rotate.steps import Refined
from dfrot_lab.score import build as building, perplexity
from dfrot_lab.show import figures, gallery
from dfrot_lab.show.experiment_figures import ORDER_COLOURS, ORDER_MARKERS
from dfrot_lab.study import experiments, keepout, leaderboard, main
from dfrot_lab.study.experiments import CALIBRATED, CHOSEN, EACH_CLIP, EXPERIMENTS, WHOLE
from dfrot_lab.study.main import Row
from dfrot_lab.study.progress import Progress
from dfrot_lab.study.setting import BUILDS, PROFILE, Setting
from dfrot_lab.weights import run as weighing

EVALUATING = (
    "main", "gamma-sweep", "keep-out", "main-table", "calibration", "clip-sweep", "symmetric-or-not",
    "variants", "massive-activations", "intervene", "gain", "offset",
    "free-options", "better-weights", "kv-caches", "transfer", "static-activations", "prefix", "block-floats",
)  # fmt: skip
LOOKING = (
    "token-errors-3d", "token-errors-2d", "token-orders", "massive-token", "massive-magnitudes",
    "spike-writers", "attention-sink", "token-costs",
)  # fmt: skip
ELSEWHERE = ("zero-shot", "measuring", "leaderboard", "leaderboard-weights")
FEW_ROWS = (3, 1)
"""Calibration rows for a tiny model, in units of the window: two layers have four sites, fewer than the least
of the paper's counts.
"""


@dataclass
class Lab:
    """A tiny model, a text and a store in which each experiment is run once for all tests of this file."""

    setting: Setting
    store: Store
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    asked: dict[str, list[list[Row]]] = field(default_factory=dict)

    def table(self, name: str) -> pd.DataFrame:
        if name not in self.tables:
            with pytest.MonkeyPatch.context() as patch:
                few_rows(patch)
                self.asked[name] = seen_rows(patch)
                self.tables[name] = experiments.run(name, self.setting, self.store)
        return self.tables[name]

    def distinct(self, name: str) -> list[Row]:
        """The rows that the experiment evaluates, build by build, each once, in order."""
        self.table(name)
        return evaluated_rows(self.asked[name])

    @property
    def refine(self) -> RefineSpec:
        """The refinement of experiments that reproduce the paper: by its rule."""
        return self.setting.with_(rule=PAPER_RULE).refine

    def result(self, spec: Recipe) -> perplexity.EvalResult:
        found = perplexity.stored(spec, self.store)
        assert found is not None, "a row of the table is not in the store"
        return found


def few_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(experiments, "ROW_COUNTS", FEW_ROWS)


def evaluated_rows(asked: list[list[Row]]) -> list[Row]:
    """Of the rows by build those that are evaluated: one that is enough `once` in the first build alone."""
    rows = [row for n, build in enumerate(asked) for row in build if n == 0 or not row.once]
    return [row for n, row in enumerate(rows) if row not in rows[:n]]


def seen_rows(patch: pytest.MonkeyPatch, then: type[Exception] | None = None) -> list[list[Row]]:
    """The rows, build by build, that the experiment hands over to be evaluated from now on; `then` stops it."""
    seen: list[list[Row]] = []
    rows_by_build = main.rows_by_build

    def listed(asks: main.Asks, setting: Setting) -> list[list[Row]]:
        asked = rows_by_build(asks, setting)
        seen.extend(asked)
        if then:
            raise then
        return asked

    patch.setattr(main, "rows_by_build", listed)
    return seen


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "text.txt").write_text(TEXT)
    model = save_lively(folder / "model")
    setting = Setting(
        model=model,
        corpus=str(folder / "text.txt"),
        windows=2,
        window=64,
        gptq_windows=2,
        builds=2,
        quick=True,
        limit=2,
    )
    yield Lab(setting, Store(folder / "store"))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, store: Store):
    """A function that returns the rows, build by build, of an experiment, and evaluates nothing."""

    class Enough(Exception):
        pass

    def rows_of(name: str, setting: Setting) -> list[list[Row]]:
        with monkeypatch.context() as patch:
            found = seen_rows(patch, then=Enough)
            patch.setattr(dfrot, "refined", lambda *_: Refined(torch.eye(64), pd.DataFrame(), 60.0))
            patch.setattr(experiments, "_final_losses", lambda *_: [])
            with pytest.raises(Enough):
                experiments.run(name, setting, store)
        return found

    return rows_of


def labels_of(table: pd.DataFrame) -> list[str]:
    return [column for column in table.columns if column not in tables.COLUMNS]


def assert_same_rows(found: pd.DataFrame, table: pd.DataFrame) -> None:
    """Of two runs, which take different times: all but the numbers is equal, and levels are but for what
    flipped codes make of them; comparisons follow from those.
    """
    other = ["value", "ci95", "verdict", "smallest", "by_build", "seconds", "extra_minutes"]
    pd.testing.assert_frame_equal(
        *(each.drop(columns=[column for column in other if column in each]) for each in (found, table))
    )
    level = table["metric"] == tables.PERPLEXITY
    assert level.any()
    for one, other in zip(found[level]["by_build"], table[level]["by_build"], strict=True):
        np.testing.assert_allclose(one, other, rtol=FLIPPED_PERPLEXITY)


EACH = tables.change(EACH_CLIP), tables.further(EACH_CLIP)
PERPLEXITIES = (tables.PERPLEXITY, f"{tables.PERPLEXITY} of the {CALIBRATED}")

# ---- tables of evaluations
# ------------------------------------------------------------------------------------------


def test_every_experiment_is_tested_here_or_where_it_is_said():
    assert sorted(EXPERIMENTS) == sorted((*EVALUATING, *LOOKING, *ELSEWHERE))
    assert all(reproduces and question.endswith("?") for reproduces, question, _ in EXPERIMENTS.values())


@pytest.mark.parametrize("name", EVALUATING)
def test_a_table_has_the_results_columns_and_a_line_a_row_and_metric(lab, name):
    table = lab.table(name)
    assert [column for column in table.columns if column in tables.COLUMNS] == list(tables.COLUMNS)
    evaluations = table[table["recipe"].notna()]
    assert not evaluations.duplicated([*labels_of(table), "recipe", "metric"]).any()
    levels = evaluations[evaluations["metric"].isin(PERPLEXITIES)]
    assert not levels["recipe"].duplicated().any()
    keys = {public(resolved(row.spec)).key for row in lab.asked[name][0]}
    assert set(evaluations["recipe"]) == set(levels["recipe"]) == keys, "the first build's"
    once = {public(resolved(row.spec)).key for row in lab.asked[name][0] if row.once}
    counts = set(zip(evaluations["recipe"].isin(once), evaluations["builds"], strict=True))
    assert counts == ({(True, 1), (False, 2)} if once else {(False, 2)})
    assert set(evaluations["model"]) == {public(lab.setting).model.source}
    assert set(evaluations["corpus"]) == {public(lab.setting).corpus}
    each = 2 * experiments.GAIN_WINDOWS if name == "gain" else 2
    assert set(evaluations["windows"]) == {each} and (evaluations["seconds"] >= 0).all()
    assert table["value"].notna().all() and table["metric"].notna().all()
    assert all(table[name].dtype == "Int64" for name in tables.WHOLE), "as in a file that is read back"


def by_hand(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and t interval of the builds' values; nan for one."""
    mean, count = float(np.mean(values)), len(values)
    half = (
        stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count) if count > 1 else math.nan
    )
    return mean, mean - half, mean + half


def expected_lines(lab: Lab, builds: Sequence[Row]) -> Iterator[tuple[str, list[float], str | None]]:
    """Metric, value with interval, verdict, of each line of a row, from the stored measures of its builds."""
    own = [lab.result(row.spec) for n, row in enumerate(builds) if n == 0 or not row.once]
    losses = [result.losses.mean() for result in own]
    yield tables.PERPLEXITY, [math.exp(each) for each in by_hand(losses)], None
    yield tables.DIVERGENCE, [*by_hand([result.divergences.mean() for result in own])], None
    yield tables.AGREEMENT, [*by_hand([result.agreements.mean() for result in own])], None
    for called in builds[0].against:
        others = [lab.result(row.against[called]) for row, _ in zip(builds, own, strict=False)]
        pairs = list(zip(own, others, strict=True))
        loss = by_hand([a.losses.mean() - b.losses.mean() for a, b in pairs])
        further = by_hand([a.divergences.mean() - b.divergences.mean() for a, b in pairs])
        for metric, found, scale in (
            (f"change of perplexity against {called}, %", loss, lambda x: 100 * (math.exp(x) - 1)),
            (f"KL divergence - {called}", further, lambda x: x),
        ):
            verdict = "better" if found[2] < 0 else "worse" if found[1] > 0 else "cannot tell"
            yield metric, [scale(each) for each in found], verdict if len(own) > 1 else None


@pytest.mark.parametrize("name", EVALUATING)
def test_each_line_is_what_its_builds_say(lab, name):
    """Levels and comparisons by hand from the stored measures, in the rows' order; a comparison has the
    reference's own windows.
    """
    table = lab.table(name)
    expected = []
    for builds in zip(*lab.asked[name], strict=True):
        for metric, values, verdict in expected_lines(lab, builds):
            text = f" of the {CALIBRATED}" if builds[0].spec.corpus.split == "calibration" else ""
            said = public(resolved(builds[0].spec)).key, dict(builds[0].labels)
            expected.append((*said, metric + text, values, verdict))
    lines = table[table["recipe"].notna() & ~table["metric"].isin([tables.SHARE, CHOSEN, *EACH])].to_dict(
        "records"
    )
    assert len(lines) == len(expected)
    for line, (key, labels, metric, (value, *ends), verdict) in zip(lines, expected, strict=True):
        assert (line["recipe"], line["metric"]) == (key, metric)
        assert line["value"] == pytest.approx(value, rel=1e-12, abs=1e-12)
        assert {n: None if pd.isna(line[n]) else line[n] for n in labels} == labels
        assert (None if pd.isna(line["verdict"]) else line["verdict"]) == verdict
        if line["builds"] == 1:
            assert line["ci95"] is None
        else:
            assert line["ci95"] == pytest.approx(ends, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", EVALUATING)
def test_rows_equal_those_evaluated_alone_in_another_store(lab, name, tmp_path):
    """The first build of the first row, the last build of the last, and one between, with no built model and
    no weights of the experiment's; refinements run twice are compared elsewhere.
    """
    lab.table(name)
    asked = lab.asked[name]
    other = sharing(lab.store, tmp_path / "alone", "capture", "refine")
    lines = lab.tables[name]
    lines = lines[lines["metric"].isin(PERPLEXITIES)].to_dict("records")
    assert len(lines) == len(asked[0])
    for place, build in ((0, 0), (len(lines) // 2, -1), (len(lines) - 1, -1)):
        build = 0 if asked[build][place].once else build
        alone = perplexity.evaluate(asked[build][place].spec, other)
        assert lines[place]["by_build"][build] == pytest.approx(alone.perplexity, rel=FLIPPED_PERPLEXITY)


@pytest.mark.parametrize("name", EVALUATING)
def test_a_second_run_computes_nothing_and_gives_an_equal_table(lab, name, monkeypatch):
    first = lab.table(name)

    def never(*_arguments: object, **_options: object) -> None:
        raise AssertionError("computed although it is stored")

    few_rows(monkeypatch)
    for module, function in [
        (building, "build"),
        (perplexity, "window_measures"),
        (dfrot, "refine"),
        (weighing, "quantize_weights"),
        (capturing, "record"),
    ]:
        monkeypatch.setattr(module, function, never)
    pd.testing.assert_frame_equal(experiments.run(name, lab.setting, Store(lab.store.root)), first, rtol=1e-6)


def test_rows_that_experiments_share_are_evaluated_once(lab, tmp_path, monkeypatch):
    """RO and RH at 16-4-16 are clip-sweep's rows at clip 1, and those of intervene with nothing kept out."""
    shared = {row.spec.key for row in lab.distinct("clip-sweep")} & {
        row.spec.key for row in lab.distinct("intervene")
    }
    assert len(shared) >= 2
    calls: list[int] = []
    score = perplexity.window_measures
    monkeypatch.setattr(perplexity, "window_measures", lambda *of: calls.append(1) or score(*of))
    few_rows(monkeypatch)
    store = Store(tmp_path / "both")
    for name in ("clip-sweep", "intervene"):
        experiments.run(name, lab.setting, store)
    distinct = {resolved(row.spec).key for name in ("clip-sweep", "intervene") for row in lab.distinct(name)}
    assert len(calls) == lab.setting.windows * len(distinct)


def test_equal_rows_are_one_line_and_the_same_spec_with_other_labels_is_another(lab):
    def asks(own: Setting) -> list[Row]:
        spec = own.row("16-16-16", own.rotation("NR"))
        return [Row(spec, {"as": "a"}), Row(spec, {"as": "b"}), Row(spec, {"as": "a"})]

    table, found = main.evaluated(asks, lab.setting, lab.store)
    levels = table[table["metric"] == tables.PERPLEXITY]
    assert levels["as"].tolist() == ["a", "b"] and len(set(levels["value"])) == 1
    assert list(found) == [asks(own)[0].spec for own in lab.setting.each()]


def test_what_is_found_so_far_makes_a_table_of_the_builds_that_are_whole(lab):
    """A comparison is of the builds in which both rows are there; a row of which nothing is has no line."""
    setting = experiments.setting_of("gain", lab.setting.resolved())
    asked = main.rows_by_build(lambda own: experiments.gain(own, lab.store), setting)
    found = {row.spec: lab.result(row.spec) for row in lab.distinct("gain")}
    (rh_0, dfrot_0), (rh_1, _) = ([row.spec for row in build] for build in asked)
    both = main.table_of(asked, {spec: found[spec] for spec in (rh_0, dfrot_0, rh_1)})
    assert dict(zip(both["metric"] + " " + both["rotation"], both["builds"], strict=True)) == {
        **{f"{metric} RH": 2 for metric in tables.LEVELS},
        **{f"{metric} DFRot": 1 for metric in (*tables.LEVELS, tables.change("RH"), tables.further("RH"))},
    }
    alone = main.table_of(asked, {rh_1: found[rh_1]})
    assert alone["metric"].tolist() == list(tables.LEVELS) and set(alone["builds"]) == {1}


# ---- single experiments
# ------------------------------------------------------------------------------------------


def test_the_share_is_of_the_builds_own_rows(lab, monkeypatch):
    """Which evaluations it is made of, whatever it comes to: tests/test_keepout.py."""
    table, seen = lab.table("keep-out"), []
    monkeypatch.setattr(keepout, "closed_share", lambda *four: seen.append(four) or [])
    found = experiments.run("keep-out", lab.setting, lab.store)
    pd.testing.assert_frame_equal(found, table[table["metric"] != tables.SHARE], rtol=1e-6)
    assert len(seen) == 4
    for four, bits in zip(seen, ("16-4-16", "4-4-4", "4-4-16", "4-8-16"), strict=True):
        kinds = [[(r.spec.rotation.name, r.spec.keep_out) for r in builds] for builds in four]
        rule = "nr_error_9.5"
        assert kinds == [[(kind, kept)] * 2 for kind in ("RO", "RH") for kept in (None, rule)]
        for builds in four:
            assert [(r.spec.sample, r.spec.rotation.seed, r.spec.jitter) for r in builds] == [
                (0, 0, None),
                (1, 1, 1),
            ]
            assert {r.spec.bits for r in builds} == {bits}


def test_keep_out_has_every_build_at_every_setting(lab):
    table = lab.table("keep-out")
    levels = table[(table["metric"] == tables.PERPLEXITY) & (table["rotation"] != "NR")]
    found = {(r["rotation"], r["bits"], r["keep_out"], r["builds"]) for r in levels.to_dict("records")}
    bits = ("16-4-16", "4-4-4", "4-4-16", "4-8-16")
    assert found == set(itertools.product(("RO", "RH"), bits, (True, False), (2,)))
    unrotated = table[(table["metric"] == tables.PERPLEXITY) & (table["rotation"] == "NR")]
    assert dict(zip(unrotated["bits"], unrotated["builds"], strict=True)) == {
        "16-16-16": 2,
        **dict.fromkeys(bits, 1),
    }


def test_main_table_says_the_minutes_of_what_is_fitted_and_has_gptq_in_the_full_profile(lab, planned):
    table = lab.table("main-table")
    minutes = dfrot.refined(lab.refine, lab.store).seconds / 60
    assert set(table.loc[table["rotation"] == "DFRot", "extra_minutes"]) == {minutes} and minutes > 0
    assert set(table.loc[table["rotation"].isin(["NR", "RO", "RH"]), "extra_minutes"]) == {0.0}
    assert (table.loc[table["rotation"].isin(["Offset", "Offset+"]), "extra_minutes"] > 0).all()
    for quick, by in ((True, ["rtn"]), (False, ["rtn", "gptq"])):
        (first, *_) = planned("main-table", lab.setting.with_(quick=quick))
        asked = {
            (r.spec.rotation.name, r.spec.weights.method, r.spec.bits)
            for r in first
            if r.spec.bits != "16-16-16"
        }
        assert asked == set(
            itertools.product(("NR", "RO", "RH", *leaderboard.FITTED), by, ("4-4-4", "4-4-16"))
        )


def test_variants_compares_the_losses_of_all_under_one_quantizer(lab):
    """By hand: the rows of the capture under the evaluation's asymmetric quantizer, whatever the refinement
    used.
    """
    table = lab.table("variants")
    lines = table[table["recipe"].isna()].set_index(["variant", "seed", "metric"])["value"].sort_index()
    assert len(lines) == 3 * lab.setting.builds * 4
    for row in lab.distinct("variants"):
        spec = row.spec.rotation
        if isinstance(spec, RefineSpec):
            recorded = capture(spec.capture, lab.store)
            mask = massive.find(recorded, PAPER_RULE).flatten()
            error = squared_error(
                recorded.all_rows() @ dfrot.refined(spec, lab.store).R.float(), QuantSpec(scheme="asymmetric")
            ).double()
            named = lines[row.labels["variant"], spec.init.seed]
            weighted = error * torch.where(mask, lab.setting.gamma**2, 1.0)
            for metric, value in {
                "objective": weighted.mean(),
                "ordinary": error[~mask].mean(),
                "massive": error[mask].mean(),
            }.items():
                assert named[metric] == pytest.approx(float(value), rel=1e-4)
            assert named["seconds of refinement"] == dfrot.refined(spec, lab.store).seconds > 0


def test_massive_activations_has_evaluations_then_the_profile(lab):
    table = lab.table("massive-activations")
    evaluations = table[table["recipe"].notna()]
    assert evaluations.loc[evaluations["metric"] == "perplexity", "set_massive"].tolist() == [
        "left alone",
        "zero",
        "mean",
    ]
    profile = table[table["recipe"].isna()]
    assert len(profile) == 2 * 4 and set(profile["metric"]) == {"top 1", "top 2", "top 3", "median"}


def test_calibration_on_one_text_is_tested_on_the_other(lab, tmp_path, monkeypatch):
    """Fitted on both, tested on both, each against RH on the text that it is tested on."""
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"The {i}th of many lines about nothing at all" for i in range(200)))
    texts = [lab.setting.corpus, str(other)]
    monkeypatch.setattr(Setting, "texts", lambda _setting: texts)
    few_rows(monkeypatch)
    asked = seen_rows(monkeypatch)
    table = experiments.run("calibration", lab.setting.with_(quick=False, builds=1), lab.store)
    exchanged = [row for row in asked[0] if row.labels["varied"] == "text"]
    assert len(exchanged) == 2 * 4
    for row in exchanged:
        fitted, tested = row.labels["level"].split(" -> ")
        assert row.spec.rotation.capture.corpus == CorpusSpec(name=fitted, split="calibration")
        assert row.spec.corpus == CorpusSpec(name=tested) and row.spec.weights.corpus == CorpusSpec(
            name=tested, split="calibration"
        )
        assert row.against["RH"].corpus == row.spec.corpus and row.against[
            "RH"
        ].rotation == lab.setting.rotation("RH")
    lines = table[(table["varied"] == "text") & (table["metric"] == tables.change("RH"))]
    assert lines["level"].tolist() == [f"{a} -> {b}" for a, b in itertools.product(texts, texts)] * 2
    assert (
        lines["corpus"].tolist()
        == [public(CorpusSpec(name=b)).name for _, b in itertools.product(texts, texts)] * 2
    )


def test_one_text_where_there_is_no_other(lab, monkeypatch):
    monkeypatch.setattr(corpus, "resolve", lambda spec: spec.with_(name="wikipedia-sample"))
    assert lab.setting.with_(quick=False).texts() == [lab.setting.corpus]


def test_panels_that_share_labels_show_each_row_beside_its_own():
    """One panel lacks the label that the other begins with."""
    rows = pd.DataFrame(
        {"label": ["b", "c", "a", "b", "c"], "panel": [1, 1, 2, 2, 2], "value": [2.0, 3, 1, 2, 3]}
    ).assign(rotation="RH", keep_out=False)
    fig = figures.panels_of_rows(rows.assign(low=rows["value"], high=rows["value"]), "panel")
    names = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    for ax in fig.axes:
        for line in ax.lines:
            [value], [place] = line.get_data()
            assert {"a": 1, "b": 2, "c": 3}[names[round(place)]] == value
    figures.plt.close(fig)


def test_what_was_fitted_on_one_text_is_scored_on_all(lab, planned, monkeypatch):
    """Each method's rotation is of the setting's text wherever it is scored; our own are of the other, too."""
    texts = [lab.setting.corpus, "wikipedia-sample"]
    monkeypatch.setattr(Setting, "texts", lambda _setting: texts)
    [rows] = planned("transfer", lab.setting.with_(quick=False, builds=1))
    by_text = [[row for row in rows if row.spec.corpus.name == text] for text in texts]
    for text, own in zip(texts, by_text, strict=True):
        rh, *others = own
        assert rh.spec.rotation == lab.setting.rotation("RH") and not rh.against
        assert all(row.against["RH"] == rh.spec for row in others)
        fitted = [row.spec.rotation.capture.corpus.name for row in others]
        there = {row.spec.rotation.name for row, name in zip(others, fitted, strict=True) if name != texts[0]}
        assert there == (set() if text == texts[0] else set(leaderboard.FITTED))
        compared = {row.spec.rotation.name for row in others if leaderboard.FITTED_THERE in row.against}
        assert compared == there
        assert all(
            row.against[leaderboard.FITTED_THERE].rotation.capture.corpus
            == CorpusSpec(name=text, split="calibration")
            for row in others
            if leaderboard.FITTED_THERE in row.against
        )
    same = [
        {row.spec.rotation for row in own[1:] if row.spec.rotation.capture.corpus.name == texts[0]}
        for own in by_text
    ]
    assert same[0] == same[1] and {"SpinQuant", "KurTail", "KLT"} < {spec.name for spec in same[0]}


# ---- the full profile, planned but not run
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVALUATING)
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_every_reference_is_itself_a_row_and_no_label_is_lost(lab, planned, name, quick):
    asked = planned(name, lab.setting.with_(quick=quick, builds=3))
    assert len(asked) == 3 and len(set(map(len, asked))) == 1
    for rows in asked:
        keys = {row.spec.key for row in rows}
        assert all(reference.key in keys for row in rows for reference in row.against.values())
        assert all(row.spec.key != reference.key for row in rows for reference in row.against.values())
        said = [(row.spec.key, tuple(row.labels.items())) for row in rows]
        assert len(set(said)) == len(said), "each once"
        assert all(list(row.labels) == list(rows[0].labels) for row in rows) or name == "keep-out"


@pytest.mark.parametrize("name", EVALUATING)
def test_builds_of_a_row_differ_in_all_that_is_random_and_in_nothing_else(lab, planned, name):
    """And a reference is of the same build."""
    asked = planned(name, lab.setting.with_(builds=3))
    for builds in zip(*asked, strict=True):
        for n, row in enumerate(builds):
            spec, first = row.spec, builds[0].spec
            assert (spec.sample, spec.jitter) == (n, n or None)
            assert {reference.sample for reference in row.against.values()} <= {n}
            assert (
                spec.rotation.first_seed == (first.rotation.first_seed or 0) + n or spec.rotation.name == "NR"
            )
            assert spec.weights.sample == (n or None)
            assert all(text.sample == (n or None) for text in (spec.clips, spec.scales, spec.static) if text)
            caches = ((spec.keys, first.keys), (spec.values, first.values))
            assert all(
                own == of.with_(seed=of.seed if of.seed is None else of.seed + n) for own, of in caches
            )
            drawn = ("rotation", "weights", "sample", "jitter", "clips", "scales", "static", "keys", "values")
            same = {name: getattr(first, name) for name in drawn}
            assert spec.with_(**same) == first
            assert (row.labels, list(row.against), row.once) == (
                builds[0].labels,
                list(builds[0].against),
                builds[0].once,
            )
            if isinstance(spec.rotation, RefineSpec) and name != "calibration":
                assert spec.rotation.capture.sample == (n or None)


def test_calibration_s_samples_are_no_other_build_s(lab, planned):
    asked = planned("calibration", lab.setting.with_(quick=False, builds=3))
    of = [
        {
            row.spec.rotation.capture.sample
            for row in build
            if isinstance(row.spec.rotation, RefineSpec) and row.labels["varied"] == "sample"
        }
        for build in asked
    ]
    assert all(len(each) == 5 for each in of) and len(set.union(*of)) == 15


def test_the_full_profile_has_all_values_of_each_sweep(lab, planned, monkeypatch):
    full = lab.setting.with_(quick=False, builds=3)
    rows = evaluated_rows(planned("gamma-sweep", full))
    gammas = {row.spec.rotation.gamma for row in rows if isinstance(row.spec.rotation, RefineSpec)}
    assert gammas == {1, 5, 10, 20, 50, 100, 200, 500, math.inf}
    seeds = {(row.spec.bits, row.spec.rotation.first_seed) for row in rows}
    assert seeds == {("16-4-16", 0), ("16-4-16", 1), ("16-4-16", 2), ("4-4-16", 0)}
    rows = planned("clip-sweep", full)[0]
    assert (
        len({(r.spec.rotation.name, r.labels["clip"]) for r in rows}) == 3 * 9
        and max(r.labels["clip"] for r in rows) == 1
    )
    assert experiments.ROW_COUNTS == (48, 32, 24, 16, 8)
    monkeypatch.setattr(experiments, "ROW_COUNTS", (5, 4, 3, 1))
    fitted = [
        row.spec.rotation
        for row in planned("calibration", full)[0]
        if isinstance(row.spec.rotation, RefineSpec)
    ]
    assert {spec.capture.sample for spec in fitted} == {None, 1000, 2000, 3000, 4000}
    assert {spec.rows for spec in fitted} == {
        None,
        4 * 64,
        3 * 64,
        64,
    }  # 5 windows of rows are more than the model's four sites have
    kept = {(row.spec.keep_out, row.spec.keep_out_tokens) for row in planned("intervene", full)[0]}
    assert kept == {
        (None, None),
        ("nr_error_9.5", None),
        *itertools.product(("most_massive", "worst", "random"), (1, 4, 16, 64)),
    }


def test_the_quick_profile_has_the_first_and_the_last(lab, planned):
    gammas = {
        row.spec.rotation.gamma
        for row in planned("gamma-sweep", lab.setting)[0]
        if isinstance(row.spec.rotation, RefineSpec)
    }
    assert gammas == {1, math.inf}
    assert {row.spec.bits for row in planned("variants", lab.setting)[0]} == {"16-4-16"}, "of two the first"
    assert {row.labels["clip"] for row in planned("clip-sweep", lab.setting)[0]} == {0.6, 1.0}
    schemes = [row.labels for row in planned("symmetric-or-not", lab.setting)[0]]
    assert [(each["tested_with"], each["refined_with"]) for each in schemes] == [
        ("asymmetric", "not refined"), ("asymmetric", "asymmetric"), ("asymmetric", "symmetric"),
    ]  # fmt: skip


def test_a_clipped_rotation_is_refined_with_the_clip_it_is_tested_with(lab, planned):
    for row in evaluated_rows(planned("clip-sweep", lab.setting)):
        assert row.spec.activations == QuantSpec(scheme="asymmetric", clip_ratio=row.labels["clip"])
        if isinstance(row.spec.rotation, RefineSpec):
            assert row.spec.rotation.quantizer == row.spec.activations


@pytest.mark.parametrize("best", [0.6, 1.0])
def test_a_clip_is_chosen_on_the_calibration_text_and_told_on_the_other(lab, monkeypatch, best):
    """The losses are scripted: the text that is scored likes another clip than the one it is chosen on."""
    lab.table("clip-sweep")
    evaluate_all = perplexity.evaluate_all

    def scripted(specs: Sequence[Recipe], *others: object, **options: object) -> list[perplexity.EvalResult]:
        likes = [
            (spec.activations.clip_ratio == best) == (spec.corpus.split == "calibration") for spec in specs
        ]
        done = evaluate_all(specs, *others, **options)
        return [
            dataclasses.replace(result, losses=np.full(len(result.losses), 1.0 if liked else 2.0))
            for result, liked in zip(done, likes, strict=True)
        ]

    monkeypatch.setattr(perplexity, "evaluate_all", scripted)
    table = experiments.run("clip-sweep", lab.setting, lab.store)
    told, chosen_by, chosen = (
        table[table["metric"] == metric].set_index(["rotation", "clip"]) for metric in (*PERPLEXITIES, CHOSEN)
    )
    names = ["RH", "DFRot"]  # the quick profile's
    each = table[table["metric"] == tables.change(EACH_CLIP)].set_index(["rotation", "clip"])
    assert each["value"].to_dict() == {("DFRot", best): 0.0}, "of the chosen clips, both told 2.0"
    assert list(chosen.index) == [(name, best) for name in names]
    assert set(told.index) == set(chosen_by.index) == set(itertools.product(names, (0.6, 1.0)))
    assert chosen["value"].tolist() == pytest.approx([math.exp(2)] * len(names)), (
        "told as it is, not as chosen"
    )
    assert (chosen["key"] == told.loc[chosen.index, "key"]).all()
    assert set(chosen_by["parameters"].str.contains("split=calibration")) == {True}
    assert not told["parameters"].str.contains("split").any()
    assert not set(chosen_by["key"]) & set(told["key"])


# ---- errors, token by token
# ------------------------------------------------------------------------------------------


def rotations_of(lab: Lab) -> dict[str, torch.Tensor]:
    return {**errors.default_rotations(64), "DFRot": dfrot.refined(lab.refine, lab.store).R}


@pytest.mark.parametrize("name", ["token-errors-3d", "token-errors-2d"])
def test_token_errors_are_those_of_the_four_rotations(lab, name):
    table = lab.table(name)
    recorded = capture(lab.setting.capture, lab.store)
    assert list(table.columns) == ["site", "token", "text", "massive", "NR", "RO", "RH", "DFRot", "order"]
    assert len(table) == len(recorded.sites) * 64
    for kind, R in rotations_of(lab).items():
        expected = squared_error(recorded.all_rows() @ R.float(), QuantSpec(scheme="asymmetric")).numpy()
        np.testing.assert_allclose(table[kind], expected, rtol=1e-3)
    assert table["order"].tolist() == errors.orders(table).tolist()
    mask = massive.find(recorded, PAPER_RULE).flatten().tolist()
    assert table["massive"].tolist() == mask and 0 < sum(mask) < len(mask)


def test_token_orders_count_the_tokens_of_each_site(lab):
    table, tokens = lab.table("token-orders"), lab.table("token-errors-3d")
    counted = {
        (site, order): part for (site, order), part in tokens.groupby(["site", "order"], observed=True)
    }
    assert {(row.site, row.order) for row in table.itertuples()} == set(counted)
    for row in table.itertuples():
        part = counted[row.site, row.order]
        assert row.tokens == len(part)
        assert (row.NR, row.RO, row.RH, row.DFRot) == pytest.approx(
            tuple(part[["NR", "RO", "RH", "DFRot"]].mean()), rel=1e-5
        )
    assert table["tokens"].sum() == len(tokens)


def test_the_massive_token_is_a_newline_at_the_sites_where_it_is_massive(lab):
    table = lab.table("massive-token")
    recorded = capture(lab.setting.capture, lab.store)
    [token] = set(table["token"])
    assert (
        set(table["text"]) == {"\n"} and recorded.residual_max[:, token].max() == recorded.residual_max.max()
    )
    heavy = [
        float(most[token]) > max(100, 1000 * float(median))
        for most, median in zip(recorded.residual_max, recorded.residual_median, strict=True)
    ]
    expected = {
        site
        for site, is_heavy in zip(recorded.sites, heavy, strict=True)
        if is_heavy and site.endswith("input_norm")
    }
    assert set(table["rotation"]) == {"NR", "RO", "RH", "DFRot"} and set(table["site"]) == expected
    for (site, kind), part in table.groupby(["site", "rotation"]):
        R = rotations_of(lab)[kind].float()
        row = recorded.rows(site)[token][None] @ R
        np.testing.assert_allclose(part["value"], row[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            part["quantized"],
            fake_quantize(torch.tensor(part["value"].to_numpy())[None], QuantSpec(scheme="asymmetric"))[0],
        )


def test_massive_magnitudes_are_of_the_middle_layer(lab):
    table = lab.table("massive-magnitudes")
    assert len(table) == 32 * 64 and set(table.columns) >= {"token", "channel", "text", "magnitude"}
    seen = capture(lab.setting.capture, lab.store).residual_max[2]  # before layer 1
    assert table.groupby("token")["magnitude"].max().tolist() == pytest.approx(seen[:32].tolist(), rel=1e-5)


# ---- stopped, killed, resumed
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stop"), [("keep-out", KeyboardInterrupt), ("intervene", RuntimeError)])
def test_a_run_stopped_again_and_again_ends_with_the_same_table(lab, name, stop, tmp_path, monkeypatch):
    """Seven windows at a time: each window is scored once in all, and no row is lost or doubled."""
    whole = lab.table(name)
    score, scored, left = perplexity.window_measures, [], [0]

    def until_stopped(*of):
        if not left[0]:
            raise stop
        left[0] -= 1
        scored.append(1)
        return score(*of)

    monkeypatch.setattr(perplexity, "window_measures", until_stopped)
    stops, store = 0, sharing(lab.store, tmp_path / "store", "capture", "refine")
    while True:
        left[0] = 7
        try:
            found = experiments.run(name, lab.setting, store)
            break
        except stop:
            stops += 1
    assert stops == math.ceil(len(scored) / 7) - 1 >= 4
    assert len(scored) == lab.setting.windows * len({resolved(row.spec).key for row in lab.distinct(name)})
    assert_same_rows(found, whole)


@pytest.mark.parametrize("at", [1, 9])
def test_a_run_stopped_between_two_rows_goes_on_at_the_next(lab, at, tmp_path, monkeypatch):
    """Where progress is said: the rows before are stored, and none after."""
    begin, begun = Progress.begin, []

    def stop_there(self, what):
        if len(begun) == at:
            raise KeyboardInterrupt
        begun.append(what)
        begin(self, what)

    store = sharing(lab.store, tmp_path / "store", "capture", "refine")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "begin", stop_there)
        with pytest.raises(KeyboardInterrupt):
            experiments.run("main-table", lab.setting, store)
    rows = lab.distinct("main-table")
    assert [perplexity.stored(row.spec, store) is not None for row in rows] == [
        n < at for n in range(len(rows))
    ]
    found = experiments.run("main-table", lab.setting, store)
    assert_same_rows(found, lab.table("main-table"))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from dfrot_lab.score import perplexity
from dfrot_lab.study import experiments
from dfrot_lab.study.setting import Setting
from dfrot_lab.recipe.specs import ModelSpec
from dfrot_lab.disk.artefacts import Store
root, model, text, windows = sys.argv[1:]
torch.set_num_threads(1)
score, left = perplexity.window_measures, [int(windows)]
def and_die(*of):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return score(*of)
perplexity.window_measures = and_die
sizes = dict(windows=2, window=64, gptq_windows=2, builds=2, quick=True)
setting = Setting(model=ModelSpec(source=model), corpus=text, **sizes)
experiments.run("keep-out", setting, Store(Path(root)))
"""


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX has them")
def test_a_run_killed_in_the_middle_of_a_row_loses_nothing_it_had(lab, tmp_path, monkeypatch):
    whole = lab.table("keep-out")
    store = Store(tmp_path / "store")
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(store.root),
        lab.setting.model.source,
        lab.setting.corpus,
        "9",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = [perplexity.stored(row.spec, store) is not None for row in lab.distinct("keep-out")]
    assert kept == [True] * 4 + [False] * (len(kept) - 4), "nine windows are four rows of two and half a row"
    assert len(list(store.root.glob("evaluation/*.partial"))) == 1
    score, scored = perplexity.window_measures, []
    monkeypatch.setattr(perplexity, "window_measures", lambda *of: scored.append(1) or score(*of))
    found = experiments.run("keep-out", lab.setting, store)
    assert len(scored) == 2 * len(kept) - 9
    assert not list(store.root.glob("*/*.partial"))
    assert_same_rows(found, whole)


# ---- names and settings
# ------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_names(store):
    with pytest.raises(
        KeyError, match=r"no experiment 'table-1'; there are .*keep-out, main-table, "
    ) as caught:
        experiments.run("table-1", Setting(), store)
    assert all(name in str(caught.value) for name in EXPERIMENTS)
    assert not store.root.exists()


@pytest.mark.parametrize("value", ["fast", "", "Quick"])
def test_a_profile_of_another_name_is_refused(value, store, monkeypatch):
    monkeypatch.setenv(PROFILE, value)
    with pytest.raises(ValueError, match=rf"DFROT_LAB_PROFILE must be quick or full; got '{value}'"):
        Setting.of_profile()
    with pytest.raises(ValueError, match="DFROT_LAB_PROFILE must be quick or full"):
        experiments.run("keep-out", store=store)


def test_profiles_and_choices(text_file, monkeypatch):
    chosen = {"corpus": str(text_file), "seed": 5}
    monkeypatch.delenv(PROFILE, raising=False)
    assert Setting.of_profile(**chosen) == Setting(**chosen).resolved()
    monkeypatch.setenv(PROFILE, "full")
    assert Setting.of_profile(**chosen) == Setting(**chosen).resolved()
    monkeypatch.setenv(PROFILE, "quick")
    found = Setting.of_profile(**chosen)
    assert (
        found.quick
        and found.seed == 5
        and found.window < Setting().window
        and found.windows < Setting().windows
    )
    assert Setting.of_profile(windows=7, **chosen) == found.with_(windows=7)


def test_a_setting_s_specs_are_of_its_model_text_and_windows():
    setting = Setting(
        model=ModelSpec(source="m"), corpus="t", seed=4, windows=3, gamma=7, window=64, gptq_windows=5
    )
    calibration = CorpusSpec(name="t", split="calibration")
    assert setting.capture == CaptureSpec(model=ModelSpec(source="m"), corpus=calibration, tokens=64)
    assert setting.refine == RefineSpec(
        capture=setting.capture, gamma=7, init=RotationSpec(kind="RH", seed=4)
    )
    row = setting.row("4-4-16", setting.rotation("RH"), weights="rtn", keep_out="nr_error_9.5")
    assert (row.model, row.corpus, row.windows, row.window) == (setting.model, CorpusSpec(name="t"), 3, 64)
    assert (row.weights.method, row.weights.corpus, row.weights.windows, row.weights.window) == (
        "rtn",
        calibration,
        5,
        64,
    )
    assert (row.bits, row.keep_out, row.rotation) == (
        "4-4-16",
        "nr_error_9.5",
        RotationSpec(kind="RH", seed=4),
    )
    by_rtn = setting.with_(weights="rtn")
    assert [s.row("4-4-16", RotationSpec()).weights.method for s in (setting, by_rtn)] == ["gptq", "rtn"]
    assert by_rtn.row("4-4-16", RotationSpec(), weights="gptq").weights.method == "gptq"


def test_a_build_is_another_seed_sample_and_jitter_of_everything():
    setting = Setting(model=ModelSpec(source="m"), corpus="t", seed=4, window=64)
    first, third = setting.each()[0], setting.each()[2]
    assert [own.build for own in setting.each()] == [*range(BUILDS)] and first == setting
    assert (first.capture.sample, third.capture.sample) == (None, 2), "the first is the published one"
    assert third.refine.capture == third.capture and third.refine.first_seed == 6
    assert third.rotation("RO") == RotationSpec(kind="RO", seed=6)
    assert third.method("DFRot") == third.refine
    rows = [own.row("4-4-16", own.rotation("RH")) for own in (first, third)]
    assert [(row.sample, row.jitter, row.weights.sample) for row in rows] == [(0, None, None), (2, 2, 2)]


def test_an_experiment_has_its_own_number_of_builds_where_none_is_chosen():
    setting = Setting()
    assert [
        experiments.setting_of(name, setting).builds
        for name in ("gain", "gamma-sweep", "main-table", "offset")
    ] == [26, 3, 5, BUILDS]
    assert experiments.setting_of("gain", setting.with_(builds=2)).builds == 2
    assert experiments.setting_of("main", setting) == setting.with_(builds=BUILDS)
    for name in EXPERIMENTS:
        assert experiments.setting_of(name, setting.with_(builds=BUILDS)).builds == BUILDS, "it is chosen"
    papers = {name for name in EXPERIMENTS if experiments.setting_of(name, setting).rule == PAPER_RULE}
    assert papers == set(EXPERIMENTS) - set(experiments.OWN_RULE) and "gamma-sweep" in papers
    assert set(EXPERIMENTS) >= WHOLE and set(EXPERIMENTS) >= set(experiments.BUILDS_OF)


def test_the_main_job_s_keys_are_those_of_the_default_windows():
    """A setting of the defaults makes the specs that results are stored under."""
    row = Setting(corpus="wikitext2").row("4-4-16", RotationSpec())
    text = CorpusSpec(name="wikitext2")
    weights = Recipe().weights.with_(corpus=text.with_(split="calibration"))
    assert row == Recipe(corpus=text, weights=weights, sample=0)


# ---- the figures, and how table and figure are kept


def test_every_experiment_has_a_figure_and_every_figure_an_experiment():
    assert set(gallery.FIGURES) == {*EXPERIMENTS, "compare"}


def drawn(name: str, table: pd.DataFrame) -> Figure:
    with figures.theme():
        figure = gallery.FIGURES[name](table)
        figure.canvas.draw()  # what cannot be laid out or labelled fails here
    return figure


def marks(figure: Figure) -> int:
    """Lines and scattered collections that hold data."""
    return sum(len(ax.lines) + len(ax.collections) for ax in figure.axes)


@pytest.mark.parametrize("name", [*EVALUATING, *LOOKING])
def test_each_figure_draws_its_experiment_s_table(lab: Lab, name):
    figure = drawn(name, lab.table(name))
    assert marks(figure) > 0
    assert all(ax.get_xlabel() or ax.get_title() for ax in figure.axes), "an axis says what it shows"
    plt.close(figure)


def test_tasks_are_drawn_with_their_errors():
    tasks = ("piqa", "winogrande", "average of six")
    rows = [
        {"row": row, "task": task, "metric": "acc", "value": value, "stderr": 0.05, "items": 100}
        | {"rotation": row.split()[0] if "4-4" in row else None}
        for row, value in (("plain transformers", 0.5), ("RO 4-4-16", 0.4), ("DFRot 4-4-16", 0.45))
        for task in tasks
    ]
    figure = drawn("zero-shot", pd.DataFrame(rows))
    assert [ax.get_title() for ax in figure.axes] == list(tasks)
    ax = figure.axes[0]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["plain transformers", "RO 4-4-16", "DFRot 4-4-16"]
    assert [float(line.get_xdata()[0]) for line in ax.lines] == pytest.approx([50, 40, 45])
    bars = [bar.get_segments()[0][:, 0] for bar in ax.collections]
    assert np.concatenate(bars) == pytest.approx([45, 55, 35, 45, 40, 50])
    plt.close(figure)


def test_colours_and_markers_tell_the_orders_apart():
    assert len(set(ORDER_COLOURS.values())) == len(set(ORDER_MARKERS.values())) == 6


@pytest.mark.parametrize(("limit", "ending"), [(5000, "jsonl"), (3, "parquet")])
def test_table_and_figure_are_kept_with_what_they_were_made_from(
    lab: Lab, tmp_path, monkeypatch, limit, ending
):
    monkeypatch.setattr(gallery, "SMALL", limit)
    table = lab.table("clip-sweep")
    at, pictures = tmp_path / "tables", tmp_path / "figures"
    written = gallery.save_experiment("clip-sweep", table, lab.setting, at, pictures, lab.store)
    stem = f"clip-sweep-text-{Path(lab.setting.model.source).name}-quick"
    beside = [f"{stem}.{name}" for name in (ending, "setting.yaml", "recipes.yaml")]
    assert [path.name for path in written] == [*beside, "clip-sweep.png"]
    said = yaml.safe_load(written[1].read_text())
    assert (said["experiment"], said["setting"]["builds"], said["formulas"]) == ("clip-sweep", 2, FORMULAS)
    recipes = yaml.safe_load(written[2].read_text())
    assert set(recipes) == set(table["recipe"]) == {Recipe.of(plain).key for plain in recipes.values()}
    if ending == "jsonl":
        lines = [json.loads(line) for line in written[0].read_text().splitlines()]
        assert [line["value"] for line in lines] == pytest.approx(table["value"].tolist())
    else:
        assert pd.read_parquet(written[0])["value"].tolist() == table["value"].tolist()
    about = json.loads(written[3].with_suffix(".json").read_text())
    assert (about["experiment"], about["rows"]) == ("clip-sweep", len(table))
    assert set(about["recipes"]) == set(table["recipe"])
    assert written[3].with_suffix(".svg").exists()


def test_a_table_is_kept_beside_evaluations_of_another_version(lab: Lab, tmp_path):
    """Whose recipe has a field that this one does not know."""
    table = lab.table("clip-sweep")

    def put(writer: Writer) -> None:
        writer.save_json("recipe", {"spec": "Recipe", "warp": 1})

    with pytest.raises(ValueError, match="Recipe has no field 'warp'"):
        Recipe.of({"spec": "Recipe", "warp": 1})
    lab.store.get_or_make(perplexity.KIND, {"by": "another version"}, put)
    written = gallery.save_experiment("clip-sweep", table, lab.setting, tmp_path, tmp_path, lab.store)
    assert set(yaml.safe_load(written[2].read_text())) == set(table["recipe"])


def test_replacing_a_table_leaves_the_old_one_where_writing_fails(tmp_path):
    path = tmp_path / "rows.jsonl"
    row_files.replace(path, [{"value": 1}])
    with pytest.raises(TypeError):
        row_files.replace(path, [{"value": 2}, {"value": object()}])
    assert path.read_text() == '{"value": 1}\n'
    row_files.replace(path, [{"value": 3}])
    assert path.read_text() == '{"value": 3}\n'


def test_a_kept_table_is_read_where_its_setting_is_the_same_and_computed_where_not(
    lab: Lab, tmp_path, monkeypatch
):
    table = lab.table("gamma-sweep")
    gallery.save_experiment(
        "gamma-sweep", table, lab.setting, tmp_path / "data" / "results", tmp_path / "figures" / "text"
    )
    computed = []
    monkeypatch.setattr(
        gallery.experiments, "run", lambda name, setting: computed.append((name, setting)) or table
    )
    read = gallery.table("gamma-sweep", lab.setting, tmp_path)
    assert not computed and list(read.columns) == list(table.columns)
    assert read["value"].tolist() == pytest.approx(table["value"].tolist())
    assert (
        read["gamma"].fillna(-1).tolist() == table["gamma"].fillna(-1).tolist()
        and float("inf") in read["gamma"].tolist()
    )
    assert {name: str(read[name].dtype) for name in tables.WHOLE} == {name: "Int64" for name in tables.WHOLE}
    plt.close(drawn("gamma-sweep", read))
    other = lab.setting.with_(seed=7)
    gallery.table("gamma-sweep", other, tmp_path)
    gallery.table("clip-sweep", lab.setting, tmp_path)
    assert computed == [("gamma-sweep", other), ("clip-sweep", lab.setting)]
