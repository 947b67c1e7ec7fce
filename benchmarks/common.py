"""What every benchmark shares: medians, the eager baseline quantizer, peak memory in a fresh process, and
rows with a verdict.

A script prints its rows and, with --out FILE, appends them to a JSON-lines file; `page.py` makes the tables
of docs/performance.md from that.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

RUNS = 5


def seconds(work: Callable[[], object], runs: int = RUNS) -> float:
    """Median wall seconds of `runs` calls, after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def eager(x: torch.Tensor) -> torch.Tensor:
    """Asymmetric 4-bit fake quantization as research scripts write it: every operation passes over all."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale)
    return scale * (torch.clamp(torch.round(x / scale) + zero, 0, 15) - zero)


def peak_gb(script: str, *arguments: str, runs: int = 3) -> float:
    """The least peak resident memory of `runs` fresh processes of a benchmark script, which must print it
    last (`print_peak`).
    """
    command = [sys.executable, script, *arguments]
    found = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        for _ in range(runs)
    ]
    return min(map(float, found))


def print_peak() -> None:
    """Print this process's peak resident memory in GB."""
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


@dataclass(frozen=True)
class Row:
    """One measured ratio: what it compares, the two sides in seconds (or GB), the bar, and whether the ratio
    holds it.

    `at_least` tells a speed-up (ours must be that many times faster) from a cost (ours may take at most that
    many times the baseline).
    """

    stage: str
    what: str
    ours: float
    baseline: float
    unit: str = "s"
    bar: float | None = None
    at_least: bool = False
    floor: float | None = None
    note: str = ""
    machine: str = field(default_factory=lambda: machine())

    @property
    def ratio(self) -> float:
        """Baseline over ours for a speed-up, ours over baseline for a cost."""
        return self.baseline / self.ours if self.at_least else self.ours / self.baseline

    @property
    def verdict(self) -> str:
        """`holds`, `misses` or nothing where there is no bar."""
        if self.bar is None:
            return ""
        return "holds" if (self.ratio >= self.bar if self.at_least else self.ratio <= self.bar) else "misses"

    def line(self) -> str:
        """The row as a line of a Markdown table."""
        bar = "" if self.bar is None else f"{'>=' if self.at_least else '<='} {self.bar:g}"
        floor = "" if self.floor is None else f"{self.floor:.3g} {self.unit}"
        cells = [
            self.stage,
            self.what,
            f"{self.baseline:.3g} {self.unit}",
            f"{self.ours:.3g} {self.unit}",
            floor,
        ]
        return "| " + " | ".join([*cells, f"{self.ratio:.3g}", bar, self.verdict, self.note]) + " |"


HEADER = (
    "| stage | what | baseline | ours | floor | ratio | bar | | note |\n|---|---|---|---|---|---|---|---|---|"
)


def machine() -> str:
    """The machine in words: processor flags that matter, threads, torch."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def options(doc: str | None) -> argparse.ArgumentParser:
    """The options every script takes."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--out", type=Path, help="append the rows to this JSON-lines file")
    parser.add_argument(
        "--memory", help=argparse.SUPPRESS
    )  # one measurement of peak memory, in a process of its own
    return parser


def report(rows: list[Row], out: Path | None) -> None:
    """Print the rows as a table and append them to `out`."""
    print(HEADER)
    for row in rows:
        print(row.line(), flush=True)
    if out is not None:
        with out.open("a") as file:
            file.writelines(
                json.dumps({**asdict(row), "ratio": row.ratio, "verdict": row.verdict}) + "\n" for row in rows
            )
