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
from matplotlib.figure import Figure
from test_evaluate import resolved, save_lively

from dfrot_lab.disk import row_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import tables
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.model import corpus
from dfrot_lab.model.public import public
from dfrot_lab.observe import capture as capturing, errors, massive
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.specs import (
    PAPER_RULE,
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    QuantSpec,
    Recipe,
    RefineSpec,
    RotationSpec,
)
from dfrot_lab.rotate import dfrot
from dfrot_lab.rotate.steps import Refined
from dfrot_lab.score import build as building, perplexity
from dfrot_lab.show import figures, gallery
from dfrot_lab.show.experiment_figures import ORDER_COLOURS, ORDER_MARKERS
from dfrot_lab.study import cost, experiments, main
from dfrot_lab.study.experiments import CALIBRATED, CHOSEN, EXPERIMENTS, SHARE
from dfrot_lab.study.main import Row
from dfrot_lab.study.setting import PROFILE, Setting
from dfrot_lab.weights import run as weighing

EVALUATING = (
    "main", "gamma-sweep", "keep-out", "main-table", "calibration", "clip-sweep", "symmetric-or-not",
    "variants", "massive-activations", "intervene",
)  # fmt: skip
LOOKING = ("token-errors-3d", "token-errors-2d", "token-orders", "massive-token", "massive-magnitudes")
ELSEWHERE = ("zero-shot",)
FEW_ROWS = (3, 1)
"""Calibration rows for a tiny model, in units of the window: two layers have four sites, fewer than the least
of the paper's counts.
"""
TEXT = "\n".join(f"{i} sheep and {i * 7 % 13} goats went over hill {i % 5};" for i in range(300))


@dataclass
class Lab:
    """A tiny model, a text and a store in which each experiment is run once for all tests of this file."""

    setting: Setting
    store: Store
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)

    def table(self, name: str) -> pd.DataFrame:
        if name not in self.tables:
            with pytest.MonkeyPatch.context() as patch:
                few_rows(patch)
                self.rows[name] = seen_rows(patch)
                self.tables[name] = experiments.run(name, self.setting, self.store)
        return self.tables[name]

    def distinct(self, name: str) -> list[Row]:
        """The experiment's rows, each once, in order."""
        self.table(name)
        rows = self.rows[name]
        return [row for n, row in enumerate(rows) if row not in rows[:n]]

    @property
    def refine(self) -> RefineSpec:
        """The refinement of all experiments but the main job: by the paper's rule."""
        return self.setting.with_(rule=PAPER_RULE).refine

    def result(self, spec: Recipe) -> perplexity.EvalResult:
        found = perplexity.stored(spec, self.store)
        assert found is not None, "a row of the table is not in the store"
        return found


def few_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(experiments, "ROW_COUNTS", FEW_ROWS)


def seen_rows(patch: pytest.MonkeyPatch) -> list[Row]:
    """The rows that experiments hand over to be evaluated, from now on."""
    seen: list[Row] = []
    evaluated = main.evaluated

    def listed(rows: Sequence[Row], *others: object) -> tuple[pd.DataFrame, main.Found]:
        seen.extend(rows)
        return evaluated(rows, *others)

    for module in (experiments, main):  # the main job asks the runner itself
        patch.setattr(module, "evaluated", listed)
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
        seeds=2,
        quick=True,
        limit=2,
    )
    yield Lab(setting, Store(folder / "store"))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, store: Store):
    """A function that returns the rows an experiment would evaluate, and evaluates nothing."""

    class Enough(Exception):
        pass

    def rows_of(name: str, setting: Setting) -> list[Row]:
        found: list[Row] = []

        def only_list(rows: Sequence[Row], *_others: object) -> None:
            found.extend(rows)
            raise Enough

        with monkeypatch.context() as patch:
            patch.setattr(experiments, "evaluated", only_list)
            patch.setattr(main, "evaluated", only_list)
            patch.setattr(dfrot, "refined", lambda *_: Refined(torch.eye(64), pd.DataFrame(), 60.0))
            patch.setattr(experiments, "_final_losses", lambda *_: [])
            with pytest.raises(Enough):
                experiments.run(name, setting, store)
        return found

    return rows_of


def labels_of(table: pd.DataFrame) -> list[str]:
    return [column for column in table.columns if column not in tables.COLUMNS]


def assert_same_rows(found: pd.DataFrame, table: pd.DataFrame) -> None:
    """Of two runs, which take different times: all but the numbers is equal, and they are but for what
    flipped codes make of them.
    """
    other = ["value", "ci95", "seconds", "extra_minutes"]
    pd.testing.assert_frame_equal(
        *(each.drop(columns=[column for column in other if column in each]) for each in (found, table))
    )
    plain = table["metric"] != SHARE  # a quotient of differences, which may be as small as what a code makes
    level = table.loc[table["metric"] == tables.PERPLEXITY, "value"].max()
    for ends in (lambda each: each["value"].to_list(), lambda each: each["ci95"].to_list()):
        np.testing.assert_allclose(
            ends(found[plain]), ends(table[plain]), rtol=0, atol=FLIPPED_PERPLEXITY * level
        )


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
    perplexity = evaluations[evaluations["metric"].isin([tables.PERPLEXITY, CALIBRATED])]
    assert not perplexity["recipe"].duplicated().any()
    assert (
        set(evaluations["recipe"])
        == set(perplexity["recipe"])
        == {public(resolved(row.spec)).key for row in lab.rows[name]}
    )
    assert set(evaluations["model"]) == {public(lab.setting).model.source}
    assert set(evaluations["corpus"]) == {public(lab.setting).corpus}
    assert set(evaluations["windows"]) == {2} and (evaluations["seconds"] >= 0).all()
    assert table["value"].notna().all() and table["metric"].notna().all()
    assert all(table[name].dtype == "Int64" for name in tables.WHOLE), "as in a file that is read back"


@pytest.mark.parametrize("name", EVALUATING)
def test_each_line_is_what_its_row_s_losses_say(lab, name):
    """Perplexities and differences by hand from the stored losses, in the rows' order; a paired difference
    has the reference's own windows.
    """
    table = lab.table(name)
    expected = []
    for row in lab.distinct(name):
        losses = lab.result(row.spec).losses
        metric = "perplexity" if row.spec.corpus.split == "evaluation" else CALIBRATED
        expected.append((public(resolved(row.spec)).key, dict(row.labels), metric, math.exp(losses.mean())))
        for called, reference in row.against.items():
            difference = math.exp(losses.mean()) - math.exp(lab.result(reference).losses.mean())
            expected.append(
                (public(resolved(row.spec)).key, dict(row.labels), f"perplexity - {called}", difference)
            )
    lines = table[table["recipe"].notna() & ~table["metric"].isin([SHARE, CHOSEN])].to_dict("records")
    assert len(lines) == len(expected)
    for line, (key, labels, metric, value) in zip(lines, expected, strict=True):
        assert (line["recipe"], line["metric"]) == (key, metric)
        assert line["value"] == pytest.approx(value, rel=1e-12, abs=1e-12)
        assert {n: None if pd.isna(line[n]) else line[n] for n in labels} == labels
        low, high = line["ci95"]
        assert low <= line["value"] <= high


@pytest.mark.parametrize("name", EVALUATING)
def test_rows_equal_those_evaluated_alone_in_another_store(lab, name, tmp_path):
    """The first, the last and one between, with no built model and no weights of the experiment's;
    refinements run twice are compared elsewhere.
    """
    rows, table = lab.distinct(name), lab.table(name)
    other = sharing(lab.store, tmp_path / "alone", "capture", "refine")
    for row in {id(r): r for r in (rows[0], rows[len(rows) // 2], rows[-1])}.values():
        alone = perplexity.evaluate(row.spec, other)
        perplexities = table[table["metric"].isin([tables.PERPLEXITY, CALIBRATED])]
        lines = perplexities[perplexities["recipe"] == public(alone.spec).key]
        assert lines["value"].tolist() == [pytest.approx(alone.perplexity, rel=FLIPPED_PERPLEXITY)]
        assert tuple(lines["ci95"].iloc[0]) == pytest.approx(alone.ci95, rel=FLIPPED_PERPLEXITY)


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
    spec = lab.setting.row("16-16-16", lab.setting.rotation("NR"))
    table, found = main.evaluated(
        [Row(spec, {"as": "a"}), Row(spec, {"as": "b"}), Row(spec, {"as": "a"})], lab.store
    )
    assert table["as"].tolist() == ["a", "b"] and len(set(table["value"])) == 1
    assert list(found) == [spec]


# ---- single experiments
# ------------------------------------------------------------------------------------------


def test_the_share_is_the_one_computed_by_hand_from_the_tables_perplexities(lab):
    table = lab.table("keep-out")
    shares = table[table["metric"] == SHARE]
    gaps = table[(table["metric"] == "perplexity - RH") & ~table["keep_out"].astype(bool)].to_dict("records")
    wide = [(gap["seed"], gap["bits"]) for gap in gaps if not gap["ci95"][0] <= 0 <= gap["ci95"][1]]
    assert [(line["seed"], line["bits"]) for line in shares.to_dict("records")] == wide
    assert len(gaps) == 3 * lab.setting.seeds and wide, "no gap is off zero: nothing was tested"
    perplexity = table[table["metric"] == tables.PERPLEXITY]
    for line in shares.itertuples():
        same = perplexity[
            (perplexity["seed"] == line.seed)
            & (perplexity["w_bits"] == line.w_bits)
            & (perplexity["a_bits"] == line.a_bits)
        ]
        same = same[same["kv_bits"] == line.kv_bits]
        [ro], [kept_ro], [rh], [kept_rh] = (
            same.loc[(same["rotation"] == kind) & (same["keep_out"] == kept), "value"]
            for kind in ("RO", "RH")
            for kept in (False, True)
        )
        assert line.value == pytest.approx(1 - (kept_ro - kept_rh) / (ro - rh), rel=1e-9)
        assert (line.rotation, line.keep_out) == ("RO", True)
        low, high = line.ci95
        assert low <= line.value <= high


def test_a_gap_that_may_be_zero_has_no_share(lab, monkeypatch):
    monkeypatch.setattr(perplexity, "paired_difference", lambda *_: (0.1, (-1.0, 1.2)))
    table = lab.table("keep-out")
    found = experiments.run("keep-out", lab.setting, lab.store)
    pd.testing.assert_frame_equal(found, table[table["metric"] != SHARE], rtol=1e-6)


def test_keep_out_has_every_seed_at_every_setting(lab):
    table = lab.table("keep-out")
    perplexity = table[table["metric"] == tables.PERPLEXITY]
    found = {
        (r["rotation"], r["bits"], r["keep_out"], r["seed"])
        for r in perplexity.to_dict("records")
        if r["rotation"] != "NR"
    }
    assert found == set(itertools.product(("RO", "RH"), ("4-4-4", "4-4-16", "4-8-16"), (True, False), (0, 1)))
    unrotated = perplexity[perplexity["rotation"] == "NR"]
    assert {r["bits"] for r in unrotated.to_dict("records")} == {"16-16-16", "4-4-4", "4-4-16", "4-8-16"}


def test_main_table_says_the_minutes_of_dfrot_alone(lab):
    table = lab.table("main-table")
    minutes = dfrot.refined(lab.refine, lab.store).seconds / 60
    assert set(table.loc[table["rotation"] == "DFRot", "extra_minutes"]) == {minutes} and minutes > 0
    assert set(table.loc[table["rotation"] != "DFRot", "extra_minutes"]) == {0.0}
    perplexity = table[(table["metric"] == tables.PERPLEXITY) & (table["w_bits"] == 4)]
    assert len(perplexity) == 16 and set(perplexity.groupby("rotation").size()) == {4}
    assert {r["bits"] for r in perplexity.to_dict("records")} == {"4-4-4", "4-4-16"} and set(
        perplexity["weights"]
    ) == {"rtn", "gptq"}


def test_variants_compares_the_losses_of_all_under_one_quantizer(lab):
    """By hand: the rows of the capture under the evaluation's asymmetric quantizer, whatever the refinement
    used.
    """
    table = lab.table("variants")
    lines = table[table["recipe"].isna()].set_index(["variant", "seed", "metric"])["value"].sort_index()
    assert len(lines) == 3 * lab.setting.seeds * 4
    recorded = capture(lab.setting.capture, lab.store)
    mask = massive.find(recorded, PAPER_RULE).flatten()
    for row in lab.distinct("variants"):
        spec = row.spec.rotation
        if isinstance(spec, RefineSpec):
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
    monkeypatch.setattr(experiments, "_texts", lambda _setting: texts)
    few_rows(monkeypatch)
    rows = seen_rows(monkeypatch)
    table = experiments.run("calibration", lab.setting.with_(quick=False), lab.store)
    exchanged = [row for row in rows if row.labels["varied"] == "text"]
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
    lines = table[(table["varied"] == "text") & (table["metric"] == "perplexity - RH")]
    assert lines["level"].tolist() == [f"{a} -> {b}" for a, b in itertools.product(texts, texts)] * 2
    assert (
        lines["corpus"].tolist()
        == [public(CorpusSpec(name=b)).name for _, b in itertools.product(texts, texts)] * 2
    )


def test_one_text_where_there_is_no_other(lab, monkeypatch):
    monkeypatch.setattr(corpus, "resolve", lambda spec: spec.with_(name="wikipedia-sample"))
    assert experiments._texts(lab.setting.with_(quick=False)) == [lab.setting.corpus]


# ---- the full profile, planned but not run
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVALUATING)
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_every_reference_is_itself_a_row_and_no_label_is_lost(lab, planned, name, quick):
    rows = planned(name, lab.setting.with_(quick=quick, seeds=3))
    keys = {row.spec.key for row in rows}
    assert all(reference.key in keys for row in rows for reference in row.against.values())
    assert all(row.spec.key != reference.key for row in rows for reference in row.against.values())
    said = [(row.spec.key, tuple(row.labels.items())) for row in rows]
    repeated = {said[n] for n in range(len(said)) if said[n] in said[:n]}
    for what in repeated:  # listed again, but as the very same row, so that it is one line
        assert (
            len({tuple(row.against) for row in rows if (row.spec.key, tuple(row.labels.items())) == what})
            == 1
        )
    assert all(list(row.labels) == list(rows[0].labels) for row in rows) or name == "keep-out"


def test_the_full_profile_has_all_values_of_each_sweep(lab, planned, monkeypatch):
    full = lab.setting.with_(quick=False, seeds=3)
    gammas = {
        row.spec.rotation.gamma
        for row in planned("gamma-sweep", full)
        if isinstance(row.spec.rotation, RefineSpec)
    }
    assert gammas == {1, 5, 10, 20, 50, 100, 200, 500, math.inf}
    seeds = {(row.spec.bits, row.spec.rotation.first_seed) for row in planned("gamma-sweep", full)}
    assert seeds == {("16-4-16", 0), ("16-4-16", 1), ("16-4-16", 2), ("4-4-16", 0)}
    rows = planned("clip-sweep", full)
    assert (
        len({(r.spec.rotation.name, r.labels["clip"]) for r in rows}) == 3 * 9
        and max(r.labels["clip"] for r in rows) == 1
    )
    assert experiments.ROW_COUNTS == (48, 32, 24, 16, 8)
    monkeypatch.setattr(experiments, "ROW_COUNTS", (5, 4, 3, 1))
    fitted = [
        row.spec.rotation for row in planned("calibration", full) if isinstance(row.spec.rotation, RefineSpec)
    ]
    assert {spec.capture.skip for spec in fitted} == {0, 1, 2, 3, 4}
    assert {spec.rows for spec in fitted} == {
        None,
        4 * 64,
        3 * 64,
        64,
    }  # 5 windows of rows are more than the model's four sites have
    kept = {(row.spec.keep_out, row.spec.keep_out_tokens) for row in planned("intervene", full)}
    assert kept == {
        (None, None),
        ("nr_error_9.5", None),
        *itertools.product(("most_massive", "worst", "random"), (1, 4, 16, 64)),
    }


def test_the_quick_profile_has_the_first_and_the_last(lab, planned):
    gammas = {
        row.spec.rotation.gamma
        for row in planned("gamma-sweep", lab.setting)
        if isinstance(row.spec.rotation, RefineSpec)
    }
    assert gammas == {1, math.inf}
    assert {row.spec.bits for row in planned("variants", lab.setting)} == {"16-4-16"}, "of two the first"
    assert {row.labels["clip"] for row in planned("clip-sweep", lab.setting)} == {0.6, 1.0}


def test_a_clipped_rotation_is_refined_with_the_clip_it_is_tested_with(lab, planned):
    for row in planned("clip-sweep", lab.setting):
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
        table[table["metric"] == metric].set_index(["rotation", "clip"])
        for metric in (tables.PERPLEXITY, CALIBRATED, CHOSEN)
    )
    names = ["RO", "RH", "DFRot"]
    assert list(chosen.index) == [(name, best) for name in names]
    assert set(told.index) == set(chosen_by.index) == set(itertools.product(names, (0.6, 1.0)))
    assert chosen["value"].tolist() == pytest.approx([math.exp(2)] * 3), "told as it is, not as chosen"
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
    begin, begun = cost.Progress.begin, []

    def stop_there(self, what):
        if len(begun) == at:
            raise KeyboardInterrupt
        begun.append(what)
        begin(self, what)

    store = sharing(lab.store, tmp_path / "store", "capture", "refine")
    with monkeypatch.context() as patch:
        patch.setattr(cost.Progress, "begin", stop_there)
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
sizes = dict(windows=2, window=64, gptq_windows=2, seeds=2, quick=True)
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
    assert setting.rotation("RO", 2) == RotationSpec(kind="RO", seed=6)
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


def test_the_main_job_s_keys_are_those_of_the_default_windows():
    """A setting of the defaults makes the specs that results are stored under."""
    row = Setting(corpus="wikitext2").row("4-4-16", RotationSpec())
    text = CorpusSpec(name="wikitext2")
    assert row == Recipe(corpus=text, weights=Recipe().weights.with_(corpus=text.with_(split="calibration")))


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
    assert [path.name for path in written] == [f"{stem}.{ending}", f"{stem}.recipes.yaml", "clip-sweep.png"]
    recipes = yaml.safe_load(written[1].read_text())
    assert set(recipes) == set(table["recipe"]) == {Recipe.of(plain).key for plain in recipes.values()}
    if ending == "jsonl":
        lines = [json.loads(line) for line in written[0].read_text().splitlines()]
        assert [line["value"] for line in lines] == pytest.approx(table["value"].tolist())
    else:
        assert pd.read_parquet(written[0])["value"].tolist() == table["value"].tolist()
    about = json.loads(written[2].with_suffix(".json").read_text())
    assert (about["experiment"], about["rows"]) == ("clip-sweep", len(table))
    assert set(about["recipes"]) == set(table["recipe"])
    assert written[2].with_suffix(".svg").exists()


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
