"""`PYTHONPATH=tests python -m attack`: the whole campaign and its table; exit code 1 where anything failed."""

import argparse
import os
import sys
import time
from pathlib import Path

from attack import tools

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trust.md"
BEGIN, END = "<!-- attack: begin -->", "<!-- attack: end -->"
PARTS = ("kills", "corruptions", "inputs", "hostile", "crowd")
AIMS = {
    "kills": 500,
    "corruptions": 500,
    "bad inputs": 200,
    "hostile models": 50,
    "concurrent processes": 200,
}


def counted(report: tools.Report) -> int:
    """Its cases, without runs that ended before they were killed."""
    return sum(count for kind, count in report.cases.items() if not kind.startswith("ended"))


HEAD = f"| attack | cases | {' | '.join(tools.FAULTS)} | slowest case, s of CPU |"


def row(report: tools.Report) -> str:
    """What a part did and how much of it failed, as a row of a Markdown table."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.cases.items())
    faults = " | ".join(str(report.count(fault)) for fault in tools.FAULTS)
    return f"| {report.name}: {kinds} | {report.total} | {faults} | {report.slowest:.1f} |"


def table(rows: list[str]) -> str:
    return "\n".join([HEAD, "|---" * (HEAD.count("|") - 1) + "|", *rows])


def write_page(rows: list[str]) -> None:
    """Put the rows in their place in `docs/trust.md`; those of other parts stay."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    known = {line.partition(":")[0]: line for line in [*old.splitlines(), *rows] if ": " in line}
    kept = [known[name] for name in (f"| {name}" for name in AIMS) if name in known]
    PAGE.write_text(f"{before}{BEGIN}\n{table(kept)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m attack", description="Attack the package and say what failed."
    )
    parser.add_argument("--part", action="append", default=[], choices=PARTS, help="this part alone")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases, about this share")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/trust.md")
    given = parser.parse_args()
    started = time.monotonic()
    tools.warm()
    from attack import corruptions, crowd, hostile, inputs, kills

    modules = {
        "kills": kills,
        "corruptions": corruptions,
        "inputs": inputs,
        "hostile": hostile,
        "crowd": crowd,
    }
    reports = []
    for name in given.part or PARTS:
        print(f"{name} ({time.monotonic() - started:.0f} s)", flush=True)
        reports.append(modules[name].campaign(given.share))
    faults = [fault for report in reports for fault in report.faults]
    used = os.times()
    cpu = used.user + used.system + used.children_user + used.children_system
    said = f"{sum(r.total for r in reports)} cases, {len(faults)} faults; {time.monotonic() - started:.0f} s, {cpu:.0f} s of CPU."
    rows = [row(report) for report in reports]
    print(f"{said}\n\n{table(rows)}")
    for fault, case, what in faults:
        print(f"- {fault}: {case}: {what[-200:]}")
    if given.docs:
        write_page(rows)
    few = [report.name for report in reports if given.share == 1 and counted(report) < AIMS[report.name]]
    if few:
        print(f"too few cases of {', '.join(few)}")
    return int(bool(faults or few))


if __name__ == "__main__":
    sys.exit(main())
