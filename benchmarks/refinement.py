"""Refinement against the published loop, written straightforwardly: `python benchmarks/refinement.py [--only
default|wide]`.

default: seconds until the weighted objective, on all 122,880 rows of the default model, is what the published
loop reaches in 100 steps. wide: seconds of a step at C = 4096 on 8,192 synthetic rows with planted spikes (a
timing; nothing of the paper is read off them).
"""

import contextlib
import statistics
import time
from pathlib import Path

import torch
from common import RUNS, Row, eager, options, peak_gb, report, seconds
from tqdm.auto import tqdm

from dfrot_lab.maths import rotations
from dfrot_lab.model.malloc import keep_freed_memory
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.specs import PAPER_RULE, CaptureSpec, CorpusSpec, RefineSpec
from dfrot_lab.rotate.steps import State, refine
from dfrot_lab.study import cost

TEXT = CorpusSpec(name="wikipedia-sample", split="calibration")
SPEC = RefineSpec(capture=CaptureSpec(corpus=TEXT), rule=PAPER_RULE)
STEPS = 100


def published_step(scaled: torch.Tensor, R: torch.Tensor) -> tuple[torch.Tensor, float]:
    """One step of the published loop on rows already scaled by gamma, all at once, float32: SVD, then QR, and
    the loss computed anew.
    """
    u, _, vt = torch.linalg.svd(scaled.T @ eager(scaled @ R))
    R = torch.linalg.qr(u @ vt)[0]
    return R, float((scaled @ R - eager(scaled @ R)).norm())


def published_seconds(rows: torch.Tensor, mask: torch.Tensor) -> float:
    """Median seconds of a published step."""
    R = rotations.make(SPEC.init, rows.shape[1]).float()
    scaled = torch.where(mask[:, None], SPEC.gamma * rows, rows)
    return seconds(lambda: published_step(scaled, R))


def captured() -> tuple[torch.Tensor, torch.Tensor]:
    """All rows of the default model's capture and which are massive."""
    found = capture(SPEC.capture)
    return found.all_rows(), massive.find(found, SPEC.rule).flatten()


def spiked(rows: int = 8192, channels: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised Gaussian rows, one in a hundred with two massive channels, and their mask."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, generator=generator)
    mask = torch.arange(rows) % 100 == 0
    x[mask] *= 0.02
    x[mask, 7], x[mask, 1000] = 60.0, -20.0
    return x * (channels**0.5 / x.norm(dim=1, keepdim=True)), mask


def seconds_to(target: float, rows: torch.Tensor, mask: torch.Tensor) -> tuple[float, int, dict[str, float]]:
    """Seconds of `refine` from its rows until a check on all rows finds the target reached, the step of that
    check, and its losses.
    """
    start = time.perf_counter()
    reached: list[tuple[float, dict[str, float]]] = []

    def look(state: State) -> None:
        if not reached and state.history[-1]["objective"] <= target:
            reached.append((time.perf_counter() - start, dict(state.history[-1])))
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        refine(rows, SPEC, mask, checkpoint=look)
    return reached[0][0], int(reached[0][1]["step"]), reached[0][1]


def default() -> list[Row]:
    """The default model's rows: to the published objective, whole runs, one thread and two, memory."""
    rows, mask = captured()
    published = STEPS * published_seconds(rows, mask)
    start = time.perf_counter()
    paper = refine(rows, SPEC.with_(variant="guarded"), mask).history
    exact = time.perf_counter() - start
    target = float(paper["objective"].min())
    runs = [seconds_to(target, rows, mask) for _ in tqdm(range(RUNS), desc="to the objective")]
    ours, step, losses = statistics.median(run[0] for run in runs), runs[0][1], runs[0][2]
    start = time.perf_counter()
    final = refine(rows, SPEC, mask).history
    all_steps = time.perf_counter() - start
    torch.set_num_threads(1)
    one = float(refine(rows, SPEC, mask).history["objective"].min())
    torch.set_num_threads(2)
    last, end = paper.iloc[-1], final.iloc[-1]
    floor = step * 2 * 2 * len(rows) / 8 * rows.shape[1] ** 2 / cost.measure_machine().float_rate
    parts = f"ordinary {last['ordinary']:.3f}, massive {last['massive']:.3f}"
    said = f"objective {losses['objective']:.2f} at step {step}; published {target:.2f} ({parts})"
    ended = f"objective {end['objective']:.2f}, ordinary {end['ordinary']:.3f}, massive {end['massive']:.3f}"
    memory = float(peak_gb(__file__, "--memory", "default"))
    size = rows.numel() * 4 / 1e9
    return [
        Row(
            "refinement",
            "published loop, 100 steps / ours, to its objective",
            ours,
            published,
            bar=20,
            at_least=True,
            floor=floor,
            note=said,
        ),
        Row(
            "refinement",
            "published loop, 100 steps / ours, 100 steps",
            all_steps,
            published,
            at_least=True,
            note=ended,
        ),
        Row(
            "refinement",
            "the paper's steps: published loop / `guarded`",
            exact,
            published,
            at_least=True,
            note="the same steps to rounding",
        ),
        Row(
            "refinement",
            "objective on 1 thread / on 2",
            one,
            float(final["objective"].min()),
            unit="",
            bar=1.01,
        ),
        Row(
            "refinement",
            "peak memory a refinement adds, its rows included / rows",
            memory,
            size,
            unit="GB",
            bar=1.5,
        ),
    ]


def wide() -> list[Row]:
    """C = 4096: a step of ours, everything counted, against one with an SVD and a QR."""
    rows, mask = spiked()
    published = published_seconds(rows, mask)
    start = time.perf_counter()
    history = refine(rows, SPEC, mask).history
    ours = (time.perf_counter() - start) / STEPS
    first, best = history["objective"].iloc[0], history["objective"].min()
    said = f"objective {first:.0f} to {best:.0f}; eigenvectors and checks included"
    return [
        Row(
            "refinement",
            "C = 4096, 8,192 rows: a published step / one of ours",
            ours,
            published,
            bar=10,
            at_least=True,
            note=said,
        )
    ]


def memory() -> None:
    """What a refinement adds to the process at its peak, the rows included, in GB."""
    rows, mask = captured()
    refine(rows[:8192], SPEC.with_(steps=20), mask[:8192])  # what libraries set up once
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS") - rows.numel() * 4 / 1e9
    refine(rows, SPEC.with_(steps=20), mask)
    print(status("VmHWM") - before)


def status(name: str) -> float:
    """A line of this process's status, kB, in GB."""
    return (
        next(
            float(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        )
        * 1024
        / 1e9
    )


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--only", choices=("default", "wide"))
    given = parser.parse_args()
    keep_freed_memory()
    if given.memory:
        memory()
        return
    parts = {"default": default, "wide": wide}
    report([row for name, part in parts.items() if given.only in (None, name) for row in part()], given.out)


if __name__ == "__main__":
    main()
