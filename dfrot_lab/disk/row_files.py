"""Tables on disk: rows as JSON lines, appended by any number of processes, and whole tables as one file."""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from filelock import FileLock

from dfrot_lab.disk.atomic import replacing, write_text
from dfrot_lab.maths.tables import COLUMNS, comparison, markdown, whole
from dfrot_lab.recipe.base import Spec, require

log = logging.getLogger(__name__)
TABLES = (".parquet", ".csv", ".json")  # what a table can be written as


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a JSON-lines file, one process at a time; a last line that a killed writer cut goes."""
    added = _lines(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")), path.open("ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        if file.read() not in (b"", b"\n"):
            log.warning("%s ends in a line cut short: removed", path)
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(added)


def replace(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a JSON-lines file in place of what was there, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(_lines(rows))


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, allow_nan=True) + "\n" for row in rows).encode()


def load(path: Path) -> pd.DataFrame:
    """A JSON-lines file as a table, without a last line that is cut short; ValueError: another bad line."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            row = None
        require(f"{path} line {number}", repr(line[:60]), isinstance(row, dict), "one JSON object")
        rows.append(row)
    table = pd.DataFrame(rows, columns=None if rows else list(COLUMNS))
    gaps = [str(name) for name in table if {type(row.get(str(name))) for row in rows} == {int, type(None)}]
    return whole(table.astype(dict.fromkeys(gaps, "Int64")))


def require_table(out: Path) -> None:
    """Refuse a file that `write_table` cannot write; ValueError."""
    require("--out", out, out.suffix in TABLES and not out.is_dir(), f"a file ending in {', '.join(TABLES)}")


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Write a table as .parquet, .csv or .json, whole or not at all."""
    require_table(out)
    writers: dict[str, Any] = dict(zip(TABLES, (table.to_parquet, table.to_csv, table.to_json), strict=True))
    options: dict[str, Any] = {"orient": "records"} if out.suffix == ".json" else {"index": False}
    with replacing(out) as temporary:
        writers[out.suffix](temporary, **options)


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON values, NaN as null, infinity (a gamma) as itself."""
    found: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
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
