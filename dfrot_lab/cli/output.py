"""What the commands put on standard output: JSON alone, or a table and facts for a reader. Nothing heavy is
imported before it is needed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd


def show_json(value: Any) -> None:
    """A value as indented JSON."""
    typer.echo(json.dumps(value, indent=1, default=str))


def show_table(table: "pd.DataFrame", out: Path | None, as_json: bool, about: Mapping[str, Any]) -> None:
    """A table and facts about it on standard output; with `out` the table goes into that file too."""
    from dfrot_lab.disk import row_files

    if out:
        row_files.write_table(table, out)
    if as_json:
        show_json({**about, "rows": row_files.rows(table)})
    else:
        typer.echo(table.to_string(index=False, max_rows=30))
        typer.echo("\n" + "\n".join(f"{name}: {value}" for name, value in about.items() if value is not None))


def show_facts(about: Mapping[str, Any], out: Path | None, as_json: bool) -> None:
    """Named facts on standard output; with `out` also as a JSON file."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(about, indent=1, default=str) + "\n", encoding="utf-8")
    if as_json:
        show_json(about)
    else:
        for name, value in about.items():
            lines = [f"  {k}: {v}" for k, v in value.items()] if isinstance(value, Mapping) else []
            typer.echo(f"{name}: {'' if lines else value}".rstrip() + "".join(f"\n{line}" for line in lines))
