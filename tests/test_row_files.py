"""Tables on disk: rows are added by any number of processes, and a whole table is there or not at all."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dfrot_lab.disk.row_files import append, load, write_table

APPEND = """
import sys
from pathlib import Path
from dfrot_lab.disk.row_files import append
for batch in range(20):
    append(Path(sys.argv[1]), [{"writer": sys.argv[2], "row": batch * 30 + i, "pad": "x" * 300} for i in range(30)])
"""


def test_writers_at_once_lose_no_row(tmp_path: Path):
    """Batches of 9 KB, more than one write of the system takes as a whole."""
    path = tmp_path / "rows.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", APPEND, str(path), name]) for name in "abcd"]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    found = load(path)
    assert found.groupby("writer")["row"].apply(sorted).to_dict() == {name: [*range(600)] for name in "abcd"}


def test_whole_numbers_stay_whole_beside_a_missing_one(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    append(path, [{"k": 1, "x": 0.5, "kept": True}, {"k": None, "x": None, "kept": None}])
    assert str(load(path)["k"].dtype) == "Int64" and load(path)["k"].tolist() == [1, pd.NA]
    assert load(path)["x"].dtype == float and load(path)["kept"].dtype == object


@pytest.mark.parametrize("line", ["[1]", "[]", "3", "null", '"row"', '[["a", 1]]'])
@pytest.mark.parametrize("place", [1, 2])
def test_a_line_that_is_no_object_is_refused_wherever_it_stands(line: str, place: int, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    lines = ['{"row": 1}', '{"row": 2}']
    lines[place - 1] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl line {place} must be one JSON object; got "):
        load(path)


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
    with pytest.raises(
        ValueError, match=r"--out must be a file ending in \.parquet, \.csv, \.json; got t\.txt"
    ):
        write_table(table, Path("t.txt"))
