"""Tables of results on disk: JSON lines that grow row by row, and whole tables written at once."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dfrot_lab.maths.tables import COLUMNS, comparison, markdown, whole

log = logging.getLogger(__name__)


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a JSON-lines file; the folder is made if missing, and a last line cut short by a killed
    writer is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn_line(path)
    with path.open("a", encoding="utf-8") as file:
        for entry in rows:
            file.write(json.dumps(entry, allow_nan=True) + "\n")


def replace(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a JSON-lines file in place of what was there, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    append(temporary, rows)
    temporary.replace(path)


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("%s ends in a line cut short: removed", path)
        with path.open("r+b") as file:
            file.truncate(whole)


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Write a table as .parquet, .csv or .json, whole or not at all."""
    writers: dict[str, Any] = {".parquet": table.to_parquet, ".csv": table.to_csv, ".json": table.to_json}
    if out.suffix not in writers:
        raise ValueError(f"--out must end in {', '.join(writers)}; got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.part")
    try:
        writers[out.suffix](
            temporary, **({"orient": "records"} if out.suffix == ".json" else {"index": False})
        )
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> pd.DataFrame:
    """All rows of a JSON-lines file as one table, all their columns; a last line cut short by a killed writer
    is left out.
    """
    entries = _entries(path)
    return whole(pd.DataFrame(entries, columns=None if entries else list(COLUMNS)))


def _entries(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path} line {number} must be one JSON object; got {line[:60]!r}"
                ) from error
    return rows


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON values, NaN as null, infinity (a gamma) as itself."""
    found: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
    for name, values in table.select_dtypes("float").items():
        for number in np.isinf(values.to_numpy()).nonzero()[0].tolist():
            found[number][str(name)] = float(values.iloc[number])
    return found


def save(path: Path, table: pd.DataFrame, recipes: Mapping[str, Any]) -> list[Path]:
    """Write a whole results table as JSON lines, replacing what was there; beside it the comparison as
    Markdown and the recipes of its rows as YAML, by key. Returns the files.
    """
    import yaml

    replace(path, rows(table))
    path.with_suffix(".md").write_text(markdown(comparison(table)) + "\n", encoding="utf-8")
    said = yaml.safe_dump(dict(recipes), sort_keys=False, allow_unicode=True)
    path.with_suffix(".recipes.yaml").write_text(said, encoding="utf-8")
    return [path, path.with_suffix(".md"), path.with_suffix(".recipes.yaml")]
