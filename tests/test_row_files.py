"""Tables on disk: rows are added by any number of processes, and a whole table is there or not at all."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dfrot_lab.disk import row_files
from dfrot_lab.disk.row_files import append, load, replace, rows, write_table

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
        ValueError, match=r"--out must be a file ending in \.parquet, \.csv, \.json, \.jsonl; got t\.txt"
    ):
        write_table(table, Path("t.txt"))


LARGE = """
import sys
from pathlib import Path
from dfrot_lab.disk.row_files import append
for row in range(12):
    append(Path(sys.argv[1]), [{"writer": sys.argv[2], "row": row, "pad": sys.argv[2] * 1_000_000}])
"""


def test_rows_of_a_megabyte_of_two_writers_are_whole(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", LARGE, str(path), name]) for name in "ab"]
    assert [writer.wait(timeout=100) for writer in writers] == [0, 0]
    found = load(path)
    assert found.groupby("writer")["row"].apply(list).to_dict() == {name: [*range(12)] for name in "ab"}
    assert (found["pad"] == found["writer"] * 1_000_000).all()


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX has them")
def test_a_killed_writer_spoils_neither_the_reading_nor_the_next_row(tmp_path: Path):
    """Killed between the two halves of a line, as `os.write` of a large row can be."""
    path = tmp_path / "rows.jsonl"
    append(path, [{"row": 0}])
    script = f"""
import os, signal
from pathlib import Path
from dfrot_lab.disk import row_files

def half(text):
    with Path({str(path)!r}).open("ab") as file:
        file.write(bytes(text)[: len(text) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

row_files.memoryview = half
row_files.append(Path({str(path)!r}), [{{"row": 1, "pad": "x" * 100}}])
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert not path.read_bytes().endswith(b"\n") and load(path)["row"].tolist() == [0]
    append(path, [{"row": 2}])
    assert load(path)["row"].tolist() == [0, 2]


def test_a_last_line_that_is_whole_but_for_its_end_is_kept(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"row": 1}\n{"row": 2}')
    append(path, [{"row": 3}])
    assert path.read_text() == '{"row": 1}\n{"row": 2}\n{"row": 3}\n'


PRETTY = '{\n "mine": 1\n}'


@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize(
    "text", [PRETTY, "[1, 2]", "a note", '{"row": 1}\nnotes', '[\n{"a": 1}', "5", "[" * 10**5]
)
def test_a_file_that_is_no_rows_is_refused_and_stays(tmp_path: Path, text: str, end: str):
    path = tmp_path / "pretty.jsonl"
    path.write_text(text + end)
    for refused in (lambda: append(path, [{"row": 3}]), lambda: row_files.require_rows(path)):
        with pytest.raises(ValueError, match=r"pretty\.jsonl line \d must be one JSON object, .*; got "):
            refused()
    assert path.read_text() == text + end


@pytest.mark.parametrize("torn", ["{", '{"', '{"row": 2, "pad": "x', '{"row": {"a": 2}'])
def test_a_line_that_a_killed_writer_cut_goes_wherever_it_was_cut(tmp_path: Path, torn: str):
    path = tmp_path / "rows.jsonl"
    for before in ("", '{"row": 1}\n'):
        path.write_text(before + torn)
        row_files.require_rows(path)
        append(path, [{"row": 3}])
        assert path.read_text() == before + '{"row": 3}\n'


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices as POSIX has them")
@pytest.mark.parametrize("what", ["a pipe", "a link to a device"])
def test_only_a_regular_file_is_added_to(tmp_path: Path, what: str):
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path) if what == "a pipe" else path.symlink_to("/dev/full")
    for refused in (lambda: append(path, [{"row": 3}]), lambda: row_files.require_table(path)):
        with pytest.raises(
            ValueError, match=r"must be a regular file, or a name that is free; got .*rows\.jsonl"
        ):
            refused()


def test_a_line_that_others_wrote_may_hold_any_letter(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert load(path)["text"].tolist() == ["a\u2028b\x85c"]
    path.write_text("")
    assert load(path).empty


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("write", [append, replace])
def test_what_is_not_finite_is_refused_by_name_and_the_file_stays(tmp_path: Path, odd: float, write):
    path = tmp_path / "rows.jsonl"
    append(path, [{"value": 1.0}])
    for row in ({"value": odd}, {"value": 1.0, "ci95": [odd, 2.0]}):
        with pytest.raises(
            ValueError, match=rf"{[*row][-1]} of a row must be finite, or null .*; got .*{odd}"
        ):
            write(path, [row])
    assert path.read_text() == '{"value": 1.0}\n'


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_is_json(tmp_path: Path, suffix: str):
    """Missing is null; an infinite gamma, a parameter, is the word that a recipe takes too."""
    table = pd.DataFrame({"gamma": [math.inf, 100.0], "value": [1.5, math.nan]})
    write_table(table, path := tmp_path / f"t{suffix}")
    lines = path.read_text().splitlines() if suffix == ".jsonl" else [path.read_text()]
    read = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert (read if suffix == ".jsonl" else read[0]) == [
        {"gamma": "inf", "value": 1.5},
        {"gamma": 100.0, "value": None},
    ]
    if suffix == ".jsonl":
        pd.testing.assert_frame_equal(load(path), table)
    assert rows(table)[0]["gamma"] == math.inf


LIMIT = """
import resource, signal, sys
from pathlib import Path
from dfrot_lab.disk.row_files import append
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    append(Path(sys.argv[1]), [{"row": 2, "pad": "x" * 10_000}])
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits as POSIX has them")
def test_a_row_that_the_disk_does_not_take_leaves_no_half_of_it(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    append(path, [{"row": 1}])
    out = subprocess.run([sys.executable, "-c", LIMIT, str(path)], capture_output=True, text=True).stdout
    assert "cannot write rows.jsonl to" in out and "free some space or write elsewhere" in out
    assert path.read_text() == '{"row": 1}\n'


@pytest.mark.parametrize("value", [1.6463217825322214e-05, -3.1e-9, 12345.678901234567])
def test_a_number_keeps_its_digits_however_small(value: float):
    """Ten decimals, pandas' own, are three digits of a difference of 1e-7 nats."""
    [row] = rows(pd.DataFrame({"value": [value]}))
    assert row["value"] == pytest.approx(value, rel=1e-6)
