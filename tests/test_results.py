"""Results: rows that carry their provenance, a file that survives a killed writer, and tables as the paper
prints them.
"""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dfrot_lab.disk import row_files
from dfrot_lab.disk.provenance import commit
from dfrot_lab.disk.row_files import append, load
from dfrot_lab.maths import tables
from dfrot_lab.maths.statistics import estimate
from dfrot_lab.maths.tables import COLUMNS, change, comparison, further, markdown
from dfrot_lab.recipe.base import Spec, content_key
from dfrot_lab.recipe.grids import KV_CACHE, QuantSpec
from dfrot_lab.recipe.keys import FORMULAS
from dfrot_lab.recipe.specs import (
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    Recipe,
    RefineSpec,
    RotationSpec,
    WeightSpec,
    recipe_of,
)
from dfrot_lab.score import rows as score_rows
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.score.rows import compared
from dfrot_lab.study import main

COMMIT = commit()


def result(
    bits: str = "4-4-16",
    losses: tuple[float, ...] = (3.0, 3.2, 3.1),
    seconds: float = 12.345,
    key: str = "0123",
    **fields: object,
) -> EvalResult:
    """An evaluation with divergences and agreements made of its losses."""
    spec: Recipe = recipe_of(bits, **fields)
    versions = {"dfrot_lab": "0.2", "torch": "2.13", "transformers": "5.23", "numpy": "2.4"}
    told = (versions, "LlamaForCausalLM", COMMIT, key)
    found = np.array(losses)
    measures = {"divergences": found - 2.5, "agreements": 1 - found / 10, "reference_losses": found - 0.5}
    return EvalResult(spec, found, seconds, "made here", *told, **measures)


def builds(losses: tuple[tuple[float, ...], ...], bits: str = "4-4-16", **fields: object) -> list[EvalResult]:
    """Evaluations of one recipe, a build each: other windows and another seed for each."""
    kind = fields.pop("kind", "RH")
    return [
        result(bits, each, key=f"key {n}", rotation=RotationSpec(kind=kind, seed=n), sample=n, **fields)
        for n, each in enumerate(losses)
    ]


def row(made: EvalResult) -> dict[str, object]:
    """The perplexity row of one build."""
    return score_rows.rows([made])[0]


THREE = ((3.0, 3.2), (3.3, 3.5), (2.9, 3.1))


# ---- rows
# ------------------------------------------------------------------------------------------


def test_a_row_has_the_columns_in_order_and_their_values():
    made = result(rotation=RotationSpec(kind="RO", seed=7), keep_out="nr_error_9.5")
    found = row(made)
    assert tuple(found) == COLUMNS
    assert found["value"] == pytest.approx(math.exp(3.1))
    expected = {
        "model": "smollm2-135m", "family": "LlamaForCausalLM", "corpus": "auto", "method": "random",
        "rotation": "RO", "gamma": None, "rule": None, "parameters": "", "seed": 7, "weights": "gptq",
        "weight_quantizer": "sym4-channel", "calibration": "auto (calibration), 16 x 2048",
        "activations": "asym4", "keys": "none", "values": "none", "w_bits": 4, "a_bits": 4, "kv_bits": 16,
        "bits": "4-4-16", "keep_out": True, "keep_out_rule": "nr_error_9.5",
        "keep_out_tokens": None, "set_massive": None, "windows": 2, "window": 2048, "device": "auto",
        "builds": 1, "metric": "perplexity", "ci95": None, "verdict": None, "smallest": None,
        "seconds": 12.35, "recipe": made.spec.key, "formulas": FORMULAS, "commit": COMMIT, "key": "0123",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["by_build"] == pytest.approx([math.exp(3.1)])
    assert found["versions"] == {"dfrot_lab": "0.2", "torch": "2.13", "transformers": "5.23"}
    assert {*expected, "value", "by_build", "versions"} == set(COLUMNS)


def test_builds_have_a_row_a_measure_with_the_interval_over_builds():
    """Perplexity is exp of the mean loss over builds, its interval that of the loss: not of the windows."""
    made = builds(THREE)
    perplexity, divergence, agreement = found = score_rows.rows(made)
    assert [each["metric"] for each in found] == list(tables.LEVELS)
    loss = estimate([3.1, 3.4, 3.0])
    assert perplexity["value"] == pytest.approx(math.exp(9.5 / 3))
    assert perplexity["ci95"] == pytest.approx([math.exp(end) for end in loss.ci95])
    assert perplexity["by_build"] == pytest.approx([math.exp(each) for each in (3.1, 3.4, 3.0)], rel=1e-6)
    assert divergence["value"] == pytest.approx(9.5 / 3 - 2.5)
    assert divergence["ci95"] == pytest.approx([end - 2.5 for end in loss.ci95])
    assert divergence["by_build"] == pytest.approx([0.6, 0.9, 0.5])
    assert agreement["value"] == pytest.approx(1 - 9.5 / 30)
    assert agreement["by_build"] == pytest.approx([0.69, 0.66, 0.70])
    for each in found:
        assert tuple(each) == COLUMNS and each["builds"] == 3
        assert each["ci95"][0] < each["value"] < each["ci95"][1]
        assert (each["seed"], each["recipe"]) == (0, made[0].spec.key), "the first build's"
        assert (each["verdict"], each["smallest"]) == (None, None)
        assert each["seconds"] == pytest.approx(3 * 12.345, abs=0.01)
        assert each["key"] == content_key(["key 0", "key 1", "key 2"])


def test_rows_of_other_builds_have_another_key():
    every, fewer = score_rows.rows(builds(THREE))[0], score_rows.rows(builds(THREE[:2]))[0]
    assert every["recipe"] == fewer["recipe"] and every["key"] != fewer["key"]


OTHERS: dict[str, dict[str, object]] = {
    "model": {"model": ModelSpec(source="other")},
    "corpus": {"corpus": CorpusSpec(name="wikitext2")},
    "method": {"rotation": RefineSpec()},
    "rotation": {"rotation": RotationSpec(kind="RO")},
    "gamma": {"rotation": RefineSpec(gamma=5)},
    "rule": {"rotation": RefineSpec(rule="sun")},
    "parameters": {"rotation": RefineSpec(steps=7)},
    "seed": {"rotation": RotationSpec(seed=3)},
    "weights": {"weights": WeightSpec(method="rtn")},
    "weight_quantizer": {"weights": WeightSpec(quantizer=QuantSpec(bits=3, granularity="per_channel"))},
    "calibration": {"weights": WeightSpec(windows=4)},
    "activations": {"activations": QuantSpec(clip_ratio=0.9)},
    "keys": {"keys": KV_CACHE.with_(bits=2)},
    "values": {"values": KV_CACHE.with_(bits=3, group_size=32)},
    "w_bits": {"weights": WeightSpec(quantizer=QuantSpec(bits=3, granularity="per_channel"))},
    "a_bits": {"activations": QuantSpec(bits=5)},
    "kv_bits": {"keys": KV_CACHE.with_(bits=4), "values": KV_CACHE.with_(bits=4)},
    "bits": {"values": KV_CACHE.with_(bits=2)},
    "keep_out": {"keep_out": "ro_vs_nr"},
    "keep_out_rule": {"keep_out": "nr_error_8.5"},
    "keep_out_tokens": {"keep_out": "worst", "keep_out_tokens": 4},
    "set_massive": {"rotation": RotationSpec(kind="NR"), "set_massive": "zero"},
    "windows": {"windows": 3},
    "window": {"window": 64},
    "device": {"model": ModelSpec(device="cuda")},
}
"""A recipe unlike the default one in each column that a recipe decides on."""


@pytest.mark.parametrize("name", OTHERS)
def test_what_makes_a_recipe_another_shows_in_its_column(name):
    plain, other = (row(EvalResult(r, np.ones(2), 1.0, "", {})) for r in (Recipe(), Recipe(**OTHERS[name])))
    assert plain[name] != other[name] and plain["recipe"] != other["recipe"]


def test_every_column_that_a_recipe_decides_on_is_tested():
    """So a column that is added must be said here, and one that is lost is missed."""
    assert set(OTHERS) == set(score_rows.columns(Recipe()))
    told = {"family", "builds", "metric", "value", "ci95", "verdict", "smallest", "by_build"}
    told |= {"seconds", "recipe", "key", "versions", "formulas", "commit"}
    assert set(OTHERS) | told == set(COLUMNS) and len(COLUMNS) == len(set(COLUMNS))


@pytest.mark.parametrize(
    "change",
    [
        {"weights": WeightSpec(clip_search=False)},
        {"weights": WeightSpec(damping=0.1)},
        {"weights": WeightSpec(window=64)},
        {"weights": WeightSpec(corpus=CorpusSpec(split="train"))},
        {"model": ModelSpec(dtype="bfloat16")},
        {"model": ModelSpec(revision="main")},
        {"corpus": CorpusSpec(split="valid")},
        {"keys": KV_CACHE.with_(bits=4, scheme="symmetric"), "values": KV_CACHE.with_(bits=4)},
        {"activations": QuantSpec(scheme="free")},
        {"rotation": RotationSpec(block=64)},
        {"rotation": RefineSpec(quantizer=QuantSpec(clip_ratio=0.9))},
        {"rotation": RefineSpec(capture=CaptureSpec(skip=1))},
        {"rotation": RefineSpec(capture=CaptureSpec(corpus=CorpusSpec(name="wikitext2")))},
        {"rotation": RefineSpec(capture=CaptureSpec(corpus=CorpusSpec(split="train")))},
        {"rotation": RefineSpec(rows=99)},
        {"rotation": RotationSpec(kind="file", path="a/R1.safetensors")},
        {"rotation": RefineSpec(init=RotationSpec(kind="RO"))},
        {"rotation": RefineSpec(init=RotationSpec(block=8))},
        {"rotation": RefineSpec(variant="as_paper")},
        {"rotation": RefineSpec(capture=CaptureSpec(sample=1))},
        {"weights": WeightSpec(sample=1)},
        {"sample": 1},
        {"jitter": 1},
    ],
    ids=str,
)
def test_two_recipes_that_differ_never_look_alike_in_a_row(change):
    """Every field of a recipe and of all specs in it shows in some column but for the key."""
    base: dict[str, object] = {}
    if isinstance(change.get("rotation"), RefineSpec):
        base = {"rotation": RefineSpec()}
    if getattr(change.get("rotation"), "kind", None) == "file":
        base = {"rotation": RotationSpec(kind="file", path="b/R1.safetensors")}
    plain, other = (score_rows.columns(Recipe(**fields)) for fields in (base, change))
    assert plain != other


def test_a_refined_rotation_has_gamma_rule_and_the_seed_of_its_start():
    found = row(result(rotation=RefineSpec(gamma=50, rule="ro_vs_nr", init=RotationSpec(kind="RH", seed=3))))
    assert [found[name] for name in ("method", "rotation", "gamma", "rule", "seed", "keep_out")] == [
        "dfrot",
        "DFRot",
        50,
        "ro_vs_nr",
        3,
        False,
    ]


def test_weights_of_16_bits_have_no_method():
    assert row(result("16-4-16"))["weights"] is None
    assert row(result("4-16-16", weights="rtn"))["weights"] == "rtn"


def test_the_commit_is_a_hash_or_none():
    assert COMMIT is None or len(COMMIT.rstrip("+")) == 12


def test_a_comparison_is_of_builds_side_by_side():
    """In percent of the reference's perplexity: exp of the mean difference in loss; and in KL divergence."""
    worse = builds(((3.0, 3.2), (3.3, 3.5), (2.9, 3.1)), kind="RO")
    better = builds(((2.8, 3.0), (3.2, 3.4), (2.8, 2.8)))
    difference = estimate([0.2, 0.1, 0.2])
    percent, further_row = found = compared(worse, better, "RH")
    assert [each["metric"] for each in found] == [change("RH"), further("RH")]
    assert all(tuple(each) == COLUMNS and each["builds"] == 3 for each in found)
    assert percent["rotation"] == "RO" and percent["recipe"] == worse[0].spec.key
    assert percent["value"] == pytest.approx(100 * (math.exp(0.5 / 3) - 1))
    assert percent["ci95"] == pytest.approx([100 * (math.exp(end) - 1) for end in difference.ci95])
    assert percent["smallest"] == pytest.approx(100 * (math.exp(difference.smallest) - 1))
    assert further_row["value"] == pytest.approx(0.5 / 3)
    assert further_row["ci95"] == pytest.approx(difference.ci95)
    assert further_row["smallest"] == pytest.approx(difference.smallest)
    assert {each["verdict"] for each in found} == {"worse"}
    assert {each["by_build"] for each in found} == {None}, "it follows from the levels'"
    turned = compared(better, worse, "RO")
    assert {each["verdict"] for each in turned} == {"better"}
    assert turned[0]["value"] == pytest.approx(100 * (math.exp(-0.5 / 3) - 1))


def test_builds_that_lie_far_apart_are_compared_as_surely_as_others():
    """What builds share, such as their windows, is not in the interval of a comparison."""
    far = compared(builds(((9.1,), (1.2,), (4.1,)), kind="RO"), builds(((9.0,), (1.0,), (4.0,))), "RH")[0]
    near = compared(builds(((3.1,), (3.2,), (3.1,)), kind="RO"), builds(((3.0,), (3.0,), (3.0,))), "RH")[0]
    assert far["ci95"] == pytest.approx(near["ci95"]) and far["value"] == pytest.approx(near["value"])


def test_a_comparison_of_one_build_has_a_value_and_no_verdict():
    for found in compared(builds(THREE[:1], kind="RO"), builds(((2.0, 2.1),)), "RH"):
        assert found["value"] > 0 and found["builds"] == 1
        assert found["ci95"] is found["verdict"] is found["smallest"] is None


@pytest.mark.parametrize(
    "other",
    [
        {"sample": 5},
        {"windows": 3},
        {"window": 64},
        {"corpus": CorpusSpec(name="wikitext2")},
        {"model": ModelSpec(device="cuda")},
    ],
    ids=str,
)
def test_what_shares_no_windows_or_device_is_not_compared(other):
    one, two = result(), result(**other)
    rule = "compared results must share corpus, windows, window and device; got "
    with pytest.raises(ValueError, match=rule):
        compared([one], [two], "RH")


def test_builds_that_have_no_partner_are_not_compared():
    with pytest.raises(ValueError, match="shorter"):
        compared(builds(THREE, kind="RO"), builds(THREE[:2]), "RH")
    with pytest.raises(ValueError, match="must share corpus"):
        compared(builds(THREE, kind="RO"), builds(THREE)[::-1], "RH")


# ---- the file
# ------------------------------------------------------------------------------------------


def test_append_and_load_round_trip(tmp_path: Path):
    path = tmp_path / "new" / "rows.jsonl"
    rows = [
        row(result(bits, rotation=rotation))
        for bits in ("4-4-16", "16-4-16")
        for rotation in (RotationSpec(kind="RO"), RefineSpec())
    ]
    append(path, rows[:1])
    append(path, rows[1:])
    table = load(path)
    assert tuple(table.columns) == COLUMNS
    read = table.astype(object).where(table.notna(), None).to_dict("records")
    assert read == rows


def test_one_window_has_no_interval_and_comes_back_so(tmp_path: Path):
    append(tmp_path / "rows.jsonl", [row(result(losses=(3.0,)))])
    assert load(tmp_path / "rows.jsonl")["ci95"].isna().all()
    assert "NaN" not in (tmp_path / "rows.jsonl").read_text()


def test_infinite_gamma_comes_back(tmp_path: Path):
    append(tmp_path / "rows.jsonl", [row(result(rotation=RefineSpec(gamma=math.inf)))])
    assert load(tmp_path / "rows.jsonl")["gamma"].tolist() == [math.inf]


@pytest.mark.parametrize("keep", [1, 40, -2])
def test_a_last_line_cut_short_is_left_out(tmp_path: Path, keep: int):
    path = tmp_path / "rows.jsonl"
    append(path, [row(result("4-4-16")), row(result("16-4-16"))])
    first, last = path.read_text().splitlines()
    path.write_text(f"{first}\n{last[:keep]}")
    assert load(path)["w_bits"].tolist() == [4]


def test_rows_appended_behind_a_line_cut_short_are_not_lost(tmp_path: Path):
    """What the next run does after a killed one: its rows must not be glued to the rest of the torn line."""
    path = tmp_path / "rows.jsonl"
    append(path, [row(result("4-4-16")), row(result("16-4-16"))])
    path.write_text(path.read_text()[:-30])
    append(path, [row(result("4-4-4")), row(result("4-16-16"))])
    assert load(path)[["w_bits", "a_bits", "kv_bits"]].to_numpy().tolist() == [
        [4, 4, 16],
        [4, 4, 4],
        [4, 16, 16],
    ]


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    append(path, [row(result())])
    good = path.read_text()
    path.write_text(f'{good}{{"model": half\n{good}')
    with pytest.raises(
        ValueError, match=r"rows\.jsonl line 2 must be one JSON object; got '\{\"model\": half'"
    ):
        load(path)


def test_an_empty_file_is_a_table_without_rows(tmp_path: Path):
    (tmp_path / "rows.jsonl").touch()
    table = load(tmp_path / "rows.jsonl")
    assert len(table) == 0 and tuple(table.columns) == COLUMNS


# ---- tables
# ------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    ro = {bits: builds(((3.5,), (3.6,)), bits, kind="RO") for bits in ("16-4-16", "4-4-16")}
    made = [
        builds(((3.0,), (3.1,)), "16-16-16", kind="NR"),
        *ro.values(),
        builds(((3.4,), (3.5,)), "16-4-16", kind="RO", keep_out="nr_error_9.5"),
        *([result(bits, (3.3,), rotation=RefineSpec(gamma=100), sample=0)] for bits in ("16-4-16", "4-4-16")),
    ]
    against = compared(ro["16-4-16"], builds(((3.0,), (3.0,)), "16-4-16", kind="NR"), "NR")
    append(tmp_path / "rows.jsonl", [line for each in made for line in score_rows.rows(each)] + against)
    return load(tmp_path / "rows.jsonl")


def test_comparison_has_a_row_a_rotation_and_a_column_a_setting(table: pd.DataFrame):
    found = comparison(table)
    assert found.index.tolist() == ["full precision", "RO", "RO, kept out", "DFRot gamma=100"]
    assert found.columns.tolist() == ["16-16-16", "16-4-16", "4-4-16"]
    value, (low, high) = math.exp(3.55), map(math.exp, estimate([3.5, 3.6]).ci95)
    assert found.loc["RO", "16-4-16"] == f"{value:.2f} [{low:.2f}, {high:.2f}]"
    assert found.loc["DFRot gamma=100", "4-4-16"] == f"{math.exp(3.3):.2f}"  # one build: no interval
    assert found.loc["RO, kept out", "4-4-16"] == ""


def test_comparison_is_by_any_two_columns_that_tell_its_rows_apart(table: pd.DataFrame):
    every, ro = comparison(table), table[table["rotation"] == "RO"]
    found = comparison(ro, down="bits", across="keep_out")
    assert found.index.tolist() == ["16-4-16", "4-4-16"] and found.columns.tolist() == ["False", "True"]
    assert found["False"].tolist() == every.loc["RO", found.index].tolist()
    assert found["True"].tolist() == [every.loc["RO, kept out", "16-4-16"], ""]
    with pytest.raises(ValueError, match=r"rows of rotation RO, bits 16-4-16 differ in column 'keep_out'"):
        comparison(ro, down="rotation")


def test_comparison_of_several_metrics_has_a_column_for_each_by_columns_together(table: pd.DataFrame):
    ro, metrics = table[table["rotation"] == "RO"], (tables.PERPLEXITY, tables.DIVERGENCE)
    found = comparison(ro, *metrics, down=("bits", "keep_out"))
    assert tuple(found.columns) == metrics and found.index.names == ["bits", "keep_out"]
    assert found.index.tolist() == [("16-4-16", "False"), ("4-4-16", "False"), ("16-4-16", "True")]
    for metric in metrics:
        alone = comparison(ro, metric, down="bits", across="keep_out")
        assert all(found.loc[place, metric] == alone.loc[place] for place in found.index)


def test_comparison_takes_one_metric_and_the_last_of_equal_rows(table: pd.DataFrame):
    changes = comparison(table, change("NR"))
    low, high = (100 * math.expm1(end) for end in estimate([0.5, 0.6]).ci95)
    assert changes.shape == (1, 1)
    said = f"{100 * math.expm1(0.55):+.1f}% [{low:.1f}, {high:.1f}] cannot tell"
    assert changes.iloc[0, 0] == said
    assert comparison(table, further("NR")).iloc[0, 0].startswith("+0.550 [")
    assert comparison(table, tables.DIVERGENCE).loc["RO", "16-4-16"].startswith("1.050 [")
    later = table[table["metric"] == "perplexity"].iloc[[1]].assign(value=99.0, ci95=[None])
    assert comparison(pd.concat([table, later])).loc["RO", "16-4-16"] == "99.00"


@pytest.mark.parametrize(
    ("metric", "value", "ci95", "verdict", "text"),
    [
        ("perplexity", 36.107, [31.2, 40.8], None, "36.11 [31.20, 40.80]"),
        ("perplexity", 36.107, None, None, "36.11"),
        ("perplexity", 36.107, float("nan"), float("nan"), "36.11"),
        (change("RH"), 4.31, [1.8, 6.8], "worse", "+4.3% [1.8, 6.8] worse"),
        (change("RH"), -0.31, [-1.8, 0.8], "cannot tell", "-0.3% [-1.8, 0.8] cannot tell"),
        ("KL divergence", 0.4567, [0.45, 0.46], None, "0.457 [0.450, 0.460]"),
        (further("RH"), 0.4567, [0.45, 0.46], "worse", "+0.457 [0.450, 0.460] worse"),
        ("top-1 agreement", 0.75, None, None, "0.750"),
    ],
)
def test_a_cell_has_the_digits_that_its_metric_needs(metric, value, ci95, verdict, text):
    assert tables.cell({"metric": metric, "value": value, "ci95": ci95, "verdict": verdict}) == text


def test_bits_say_the_weight_quantizer_that_is_not_gptq():
    bits = [row(result("4-4-4", weights=by)) for by in ("gptq", "rtn")] + [row(result("16-4-16"))]
    assert [tables.bits_of(each) for each in bits] == ["4-4-4", "4-4-4 (rtn)", "16-4-16"]


def test_markdown_is_a_table_that_github_reads(table: pd.DataFrame):
    lines = markdown(comparison(table)).splitlines()
    assert lines[0] == "| row | 16-16-16 | 16-4-16 | 4-4-16 |"
    assert lines[1] == "|---|---|---|---|"
    assert len(lines) == 2 + 4
    assert all(line.count("|") == 5 for line in lines)
    assert lines[3].startswith("| RO |  | ")


def test_rows_are_plain_json(tmp_path: Path):
    append(tmp_path / "rows.jsonl", [row(result())])
    assert json.loads((tmp_path / "rows.jsonl").read_text())["seconds"] == pytest.approx(12.35, abs=0.01)


def test_a_table_of_nothing_has_all_columns_and_no_row():
    """As of a report before anything is stored."""
    for nothing in (tables.table([]), main.table_of([], {})):
        assert tuple(nothing.columns) == COLUMNS and len(nothing) == 0
        assert comparison(nothing).empty and tables.records(nothing) == []


# ---- rows that a table would merge
# ------------------------------------------------------------------------------------------


RO = RotationSpec(kind="RO")
TWO = {
    "device": ({"model": ModelSpec(device="cpu")}, {"model": ModelSpec(device="cuda")}),
    "rule": ({"rotation": RefineSpec(rule="sun")}, {"rotation": RefineSpec(rule="ratio_8")}),
    "keep_out_rule": ({"keep_out": "nr_error_8.5"}, {"keep_out": "nr_error_9.5"}),
    "parameters": ({"rotation": RefineSpec(steps=7)}, {"rotation": RefineSpec()}),
    "windows": ({"windows": 3}, {}),
    "corpus": ({"corpus": CorpusSpec(name="wikitext2")}, {}),
}
"""Two recipes with one label and the same bits, by the first column that tells them apart."""


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("metric", ["perplexity", change("RH")])
def test_a_comparison_refuses_rows_that_it_would_merge(name, metric):
    first, second = (result(**fields) for fields in TWO[name])
    lines = [row(first), row(second)]
    if metric != "perplexity":
        lines = [compared([each], [each], "RH")[0] for each in (first, second)]
    with pytest.raises(
        ValueError, match=rf"rows of row .*, bits 4-4-16 differ in column '{name}' \(.+, .+\)"
    ):
        comparison(pd.DataFrame(lines), metric)
    assert comparison(pd.DataFrame([lines[0]]), metric).shape == (1, 1)


def test_weights_by_two_quantizers_are_two_columns():
    lines = [row(result("4-4-4", weights=by)) for by in ("gptq", "rtn")]
    assert comparison(pd.DataFrame(lines)).columns.tolist() == ["4-4-4", "4-4-4 (rtn)"]


def test_a_comparison_refuses_rows_of_two_versions_of_the_formulas():
    lines = [row(result()), row(result()) | {"formulas": 2}]
    with pytest.raises(ValueError, match=rf"differ in column 'formulas' \({FORMULAS}, 2\)"):
        comparison(pd.DataFrame(lines))


def test_a_comparison_refuses_two_quantizers_of_the_same_bits():
    """A head, and 32 channels of it: a name that did not say so would make them one row."""
    heads = [KV_CACHE.with_(bits=4, group_size=size) for size in (None, 32)]
    rows = [row(result("4-4-4", keys=quantizer, values=quantizer)) for quantizer in heads]
    with pytest.raises(ValueError, match=r"differ in column 'keys' \(asym4-head, asym4-g32\)"):
        comparison(pd.DataFrame(rows))


def test_a_comparison_refuses_rows_that_differ_in_an_experiment_s_own_column():
    lines = [{"clip": clip, **row(result())} for clip in (0.9, 1.0)]
    with pytest.raises(ValueError, match=r"differ in column 'clip' \(0\.9, 1\.0\)"):
        comparison(pd.DataFrame(lines))


def test_missing_is_missing_however_a_table_holds_it(tmp_path: Path):
    """A row from a file has NaN where a new one has None: they are not two."""
    append(tmp_path / "rows.jsonl", [row(result())])
    both = pd.concat(
        [load(tmp_path / "rows.jsonl").astype(object), pd.DataFrame([row(result())], dtype=object)]
    )
    assert comparison(both).shape == (1, 1)


def test_a_comparison_refuses_rows_of_other_numbers_of_builds():
    lines = [score_rows.rows(builds(THREE[:count]))[0] for count in (3, 2)]
    with pytest.raises(ValueError, match=r"differ in column 'builds' \(3, 2\)"):
        comparison(pd.DataFrame(lines))


# ---- recipes beside rows
# ------------------------------------------------------------------------------------------


def test_the_yaml_beside_rows_gives_back_each_recipe(tmp_path: Path):
    import yaml

    made = [result("16-4-16", rotation=RO), result(rotation=RefineSpec(gamma=math.inf, steps=3))]
    table = pd.DataFrame([row(each) for each in made])
    written = row_files.save(tmp_path / "rows.jsonl", table, [each.spec for each in made])
    assert [path.name for path in written] == ["rows.jsonl", "rows.md", "rows.recipes.yaml"]
    assert load(tmp_path / "rows.jsonl")["recipe"].tolist() == [each.spec.key for each in made]
    said = yaml.safe_load((tmp_path / "rows.recipes.yaml").read_text())
    assert list(said) == [each.spec.key for each in made]
    for key, plain in said.items():
        again: Spec = Recipe.of(plain)
        assert again.key == key and again in [each.spec for each in made]
