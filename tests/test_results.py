"""Results: rows that carry their provenance, a file that survives a killed writer, and tables as the paper
prints them.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dfrot_lab.disk.tables import append, load_all, write_table
from dfrot_lab.recipe.specs import EvalSpec, RefineSpec, RotationSpec, eval_spec
from dfrot_lab.score import results
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.score.results import COLUMNS, comparison, difference_row, load, markdown, row

COMMIT = results.commit()


def result(
    bits: str = "4-4-16",
    losses: tuple[float, ...] = (3.0, 3.2, 3.1),
    seconds: float = 12.345,
    **fields: object,
) -> EvalResult:
    spec: EvalSpec = eval_spec(bits, **fields)
    return EvalResult(spec, np.array(losses), seconds, "made here")


# ---- rows
# -------------------------------------------------------------------------------------------------------------------------------


def test_a_row_has_the_columns_in_order_and_their_values():
    made = result(rotation=RotationSpec(kind="RO", seed=7), keep_out="nr_error")
    found = row(made)
    assert tuple(found) == COLUMNS
    assert found["value"] == pytest.approx(math.exp(3.1))
    assert found["ci95"] == list(made.ci95) and found["ci95"][0] < found["value"] < found["ci95"][1]
    expected = {
        "model": "smollm2-135m", "corpus": "auto", "rotation": "RO", "gamma": None, "rule": "nr_error", "weights": "gptq", "w_bits": 4, "a_bits": 4,
        "kv_bits": 16, "keep_out": True, "metric": "perplexity", "windows": 3, "seconds": 12.35, "seed": 7, "spec": made.spec.key, "commit": COMMIT,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=0.01)


def test_a_refined_rotation_has_gamma_rule_and_the_seed_of_its_start():
    found = row(result(rotation=RefineSpec(gamma=50, rule="ro_vs_nr", init=RotationSpec(kind="RH", seed=3))))
    assert [found[name] for name in ("rotation", "gamma", "rule", "seed", "keep_out")] == [
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


def test_a_difference_is_result_minus_reference():
    worse, better = (
        result(losses=(3.0, 3.2, 3.1), rotation=RotationSpec(kind="RO")),
        result(losses=(2.9, 3.0, 3.0)),
    )
    found = difference_row(worse, better, "RH")
    assert tuple(found) == COLUMNS
    assert found["metric"] == "perplexity - RH" and found["rotation"] == "RO"
    assert found["value"] == pytest.approx(math.exp(3.1) - math.exp(8.9 / 3)) and found["value"] > 0
    assert 0 < found["ci95"][0] < found["value"] < found["ci95"][1]
    assert difference_row(better, worse, "RO")["value"] == pytest.approx(-found["value"])


# ---- the file
# ---------------------------------------------------------------------------------------------------------------------------


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
    [ci95] = load(tmp_path / "rows.jsonl")["ci95"]
    assert len(ci95) == 2 and all(math.isnan(bound) for bound in ci95)


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
# -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    made = [
        result("16-16-16", (3.0, 3.1), rotation=RotationSpec(kind="NR")),
        *(result(bits, (3.5, 3.6), rotation=RotationSpec(kind="RO")) for bits in ("16-4-16", "4-4-16")),
        result("16-4-16", (3.4, 3.5), rotation=RotationSpec(kind="RO"), keep_out="nr_error"),
        *(result(bits, (3.3,), rotation=RefineSpec(gamma=100)) for bits in ("16-4-16", "4-4-16")),
    ]
    append(tmp_path / "rows.jsonl", [*map(row, made), difference_row(made[1], made[0], "NR")])
    return load(tmp_path / "rows.jsonl")


def test_comparison_has_a_row_a_rotation_and_a_column_a_setting(table: pd.DataFrame):
    found = comparison(table)
    assert found.index.tolist() == ["full precision", "RO", "RO, kept out", "DFRot gamma=100"]
    assert found.columns.tolist() == ["16-16-16", "16-4-16", "4-4-16"]
    value, (low, high) = math.exp(3.55), next(iter(table[table["rotation"] == "RO"]["ci95"]))
    assert found.loc["RO", "16-4-16"] == f"{value:.2f} [{low:.2f}, {high:.2f}]"
    assert found.loc["DFRot gamma=100", "4-4-16"] == f"{math.exp(3.3):.2f}"  # one window: no interval
    assert found.loc["RO, kept out", "4-4-16"] == ""


def test_comparison_takes_one_metric_and_the_last_of_equal_rows(table: pd.DataFrame):
    differences = comparison(table, "perplexity - NR")
    assert differences.shape == (1, 1)
    assert differences.iloc[0, 0].startswith(f"{math.exp(3.55) - math.exp(3.05):.2f} [")
    later = table[table["metric"] == "perplexity"].iloc[[1]].assign(value=99.0, ci95=[None])
    assert comparison(pd.concat([table, later])).loc["RO", "16-4-16"] == "99.00"


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


APPEND = """
import sys
from pathlib import Path
from dfrot_lab.disk.tables import append, load_all, write_table
for batch in range(20):
    append(Path(sys.argv[1]), [{"writer": sys.argv[2], "row": batch * 30 + i, "pad": "x" * 300} for i in range(30)])
"""


def test_writers_at_once_lose_no_row(tmp_path: Path):
    """Batches of 9 KB, more than one write of the system takes as a whole."""
    path = tmp_path / "rows.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", APPEND, str(path), name]) for name in "abcd"]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    found = load_all(path)
    assert found.groupby("writer")["row"].apply(sorted).to_dict() == {name: [*range(600)] for name in "abcd"}


def test_a_row_that_is_no_json_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    append(path, [{"value": 1}])
    with pytest.raises(TypeError):
        append(path, [{"value": 2}, {"value": object()}])
    assert path.read_text() == '{"value": 1}\n'


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path, suffix: str):
    path, table = tmp_path / "new" / f"t{suffix}", pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    read = {".parquet": pd.read_parquet, ".csv": pd.read_csv, ".json": pd.read_json}[suffix]
    write_table(table, path)
    pd.testing.assert_frame_equal(read(path), table)
    if suffix == ".parquet":  # the one that refuses anything
        with pytest.raises(ValueError):
            write_table(pd.DataFrame({"a": [1, object()]}), path)
        pd.testing.assert_frame_equal(read(path), table)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=r"--out must end in \.parquet, \.csv, \.json; got t\.txt"):
        write_table(table, Path("t.txt"))
