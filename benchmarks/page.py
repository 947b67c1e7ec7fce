"""Put the rows of data/results/bench.jsonl into the tables of docs/performance.md: `python
benchmarks/page.py`.
"""

import json
from pathlib import Path

from common import HEADER, Row

ROOT = Path(__file__).parents[1]
ROWS, PAGE = ROOT / "data" / "results" / "bench.jsonl", ROOT / "docs" / "performance.md"
GROWTH_HEADER = "| stage | grows with the channels as C to the | with the rows to the |\n|---|---|---|"


def load() -> list[dict[str, object]]:
    """The committed rows."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def tables(rows: list[dict[str, object]]) -> dict[str, str]:
    """The page's generated parts by name: the machine, the bars, the exponents."""
    bars = [
        Row(**{k: v for k, v in row.items() if k not in ("ratio", "verdict")})
        for row in rows
        if row["stage"] != "growth"
    ]  # type: ignore[arg-type]
    growth = [row for row in rows if row["stage"] == "growth"]
    laws = [
        f"| {row['what']} | {_number(row['exponent_channels'])} | {_number(row['exponent_rows'])} |"
        for row in growth
    ]
    machines = sorted({str(row["machine"]) for row in rows})
    return {
        "machine": "Measured on: " + "; ".join(machines) + ".",
        "bars": "\n".join([HEADER, *(row.line() for row in bars)]),
        "growth": "\n".join([GROWTH_HEADER, *laws]),
    }


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else ""


def page(text: str, rows: list[dict[str, object]]) -> str:
    """The page with its generated parts, each between its name and `end` in comments, made anew."""
    for name, table in tables(rows).items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        text = f"{before}<!-- {name} -->\n\n{table}\n\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), load()))
    print(tables(load())["bars"])
