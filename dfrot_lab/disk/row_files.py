"""Tables on disk: rows as JSON lines, appended by any number of processes, and whole tables as one file."""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from dfrot_lab.disk.atomic import locked, replacing, told, write_text
from dfrot_lab.maths.tables import COLUMNS, comparison, markdown, whole
from dfrot_lab.recipe.base import Spec, require, require_file, strict_json

log = logging.getLogger(__name__)
TABLES = (".parquet", ".csv", ".json", ".jsonl")  # what a table can be written as
ROWS = ".jsonl"  # what rows can be added to


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a JSON-lines file, whole and one process at a time; a last line that a killed writer cut
    goes. ValueError: a number that is not finite, or a file of something else; OSError: it is as it was."""
    added = _lines(rows)
    require_file("a file of rows", path, or_none=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock), told(path, len(added)), path.open("ab+", buffering=0) as file:
        end = _mended(path, file)
        try:
            left = memoryview(added)
            while left:
                left = left[file.write(left) :]
        except BaseException:
            file.truncate(end)
            raise


def _mended(path: Path, file: Any) -> int:
    """End the last line of a file of rows, if it is whole, or remove it; the file's bytes then."""
    file.seek(0)
    text = file.read()
    if (end := _rows_end(path, text)) > len(text):
        file.write(b"\n")
    elif end < len(text):
        log.warning("%s ends in a line cut short: removed", path)
        file.truncate(end)
    return end


def require_rows(path: Path) -> None:
    """Refuse, before work, a file that `append` cannot add to; ValueError."""
    require_file("--out", path, or_none=True)
    if path.exists():
        _rows_end(path, path.read_bytes())


def _rows_end(path: Path, text: bytes) -> int:
    """Where the next row goes in a file: behind its last line, before one that a killed writer of rows cut.
    ValueError: a line that is no row."""
    *lines, last = text.split(b"\n")
    is_cut = not _is_row(last) and (last.startswith(b'{"') or last in (b"", b"{"))
    for number, line in enumerate([*lines, last][: None if not is_cut else -1], 1):
        rule = "one JSON object, as in every file that rows are added to"
        require(f"{path} line {number}", repr(line[:60]), _is_row(line), rule)
    return len(text) - len(last) if is_cut else len(text) + 1


def _is_row(line: bytes) -> bool:
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(line), dict)
    return False


def replace(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a JSON-lines file in place of what was there, whole or not at all."""
    lines = _lines(rows)
    with replacing(path, len(lines)) as temporary:
        temporary.write_bytes(lines)


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(_strict(row), allow_nan=False) + "\n" for row in rows).encode()


def _strict(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON can say it: an infinite gamma is the word inf. ValueError: another that is not finite."""
    said = dict(row)
    if said.get("gamma") == math.inf:
        said["gamma"] = "inf"
    for name, value in said.items():
        parts = value if isinstance(value, list | tuple) else [value]
        odd = [part for part in parts if isinstance(part, float) and not math.isfinite(part)]
        require(f"{name} of a row", value, not odd, "finite, or null where it is missing")
    return said


def load(path: Path) -> pd.DataFrame:
    """A JSON-lines file as a table, without a last line that is cut short; ValueError: another bad line."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n") if path.stat().st_size else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            row = None
        require(f"{path} line {number}", repr(line[:60]), isinstance(row, dict), "one JSON object")
        if isinstance(row.get("gamma"), str):
            row["gamma"] = float(row["gamma"])
        rows.append(row)
    table = pd.DataFrame(rows, columns=None if rows else list(COLUMNS))
    gaps = [str(name) for name in table if {type(row.get(str(name))) for row in rows} == {int, type(None)}]
    return whole(table.astype(dict.fromkeys(gaps, "Int64")))


def require_table(out: Path) -> None:
    """Refuse a file that `write_table` cannot write; ValueError."""
    require("--out", out, out.suffix in TABLES and not out.is_dir(), f"a file ending in {', '.join(TABLES)}")
    require_file("--out", out, or_none=True)


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Write a table as .parquet, .csv, .json or .jsonl, whole or not at all."""
    require_table(out)
    if out.suffix == ROWS:
        return replace(out, rows(table))
    with replacing(out) as temporary:
        if out.suffix == ".json":
            temporary.write_text(strict_json(rows(table), None), encoding="utf-8")
        elif out.suffix == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
    return None


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON values, NaN as null, infinity (a gamma) as itself."""
    found: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    for name, values in table.select_dtypes("float").items():
        for number in np.isinf(values.to_numpy()).nonzero()[0].tolist():
            found[number][str(name)] = float(values.iloc[number])
    return found


def save(path: Path, table: pd.DataFrame, recipes: Iterable[Spec]) -> list[Path]:
    """Write a results table as JSON lines, beside it the comparison as Markdown, the recipes as YAML."""
    replace(path, rows(table))
    write_text(beside := path.with_suffix(".md"), markdown(comparison(table)) + "\n")
    return [path, beside, save_recipes(path, recipes)]


def save_recipes(path: Path, recipes: Iterable[Spec]) -> Path:
    """Write the recipes of the rows in `path` beside it, as YAML by key."""
    said = {recipe.key: recipe.plain() for recipe in recipes}
    write_text(beside := path.with_suffix(".recipes.yaml"), yaml.safe_dump(said, sort_keys=False))
    return beside
