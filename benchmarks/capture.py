"""Capture against a plain forward pass of the same tokens, in the same run: `python benchmarks/capture.py [--tokens 2048] [--runs 5]`.

Prints medians, the ratio of capture without the write to the plain forward (bar: 1.15), the write's own seconds, and the peak memory of each.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dfrot_lab import corpus, models, surgery
from dfrot_lab.capture import record
from dfrot_lab.specs import CorpusSpec, ModelSpec
from dfrot_lab.store import Store, Writer


def median_seconds(work: Callable[[], object], runs: int) -> float:
    """Median wall seconds of `runs` calls after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_gb(kind: str, tokens: int) -> float:
    """Peak resident memory of one forward pass, `plain` or with `capture`, in a fresh process, for a used heap hides it; the least of three."""
    command = [sys.executable, __file__, "--tokens", str(tokens), "--memory", kind]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    return min(float(run.stdout.split()[-1]) for run in runs)


def prepared(tokens: int) -> tuple[models.LoadedModel, torch.Tensor]:
    """The default model, norms fused, and one window of token ids."""
    loaded = models.load_model(ModelSpec())
    surgery.prepare(loaded)
    return loaded, corpus.token_blocks(CorpusSpec(name="wikipedia-sample"), loaded.tokenizer, blocks=1, window=tokens)


def one_pass(kind: str, tokens: int) -> None:
    """What `peak_gb` runs: one pass, the sites written to a store of its own, then this process's peak in GB."""
    loaded, ids = prepared(tokens)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "plain":
            with torch.inference_mode():
                models.body(loaded)(ids, use_cache=False)
        else:
            written(loaded, ids, Store(Path(folder)), 0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def written(loaded: models.LoadedModel, ids: torch.Tensor, store: Store, run: int) -> None:
    """One capture, streamed to the store site by site."""

    def make(writer: Writer) -> None:
        record(loaded, ids, lambda site, x: writer.save_tensors(site, {"x": x}))

    store.get_or_make("bench", {"run": run}, make)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", choices=("plain", "capture"), help="run one pass and print this process's peak in GB")
    options = parser.parse_args()
    if options.memory:
        one_pass(options.memory, options.tokens)
        return
    loaded, ids = prepared(options.tokens)
    with torch.inference_mode():
        plain = median_seconds(lambda: models.body(loaded)(ids, use_cache=False), options.runs)
    recorded = median_seconds(lambda: record(loaded, ids, lambda _site, _x: None), options.runs)
    with tempfile.TemporaryDirectory() as folder:
        store, runs = Store(Path(folder)), iter(range(1000))
        with_write = median_seconds(lambda: written(loaded, ids, store, next(runs)), options.runs)
    ratio = recorded / plain
    print(f"plain forward                {plain:6.2f} s")
    print(f"capture without the write    {recorded:6.2f} s   ratio {ratio:.3f} (bar 1.15: {'holds' if ratio <= 1.15 else 'does not hold'})")
    print(f"capture with the write       {with_write:6.2f} s   of which the write {with_write - recorded:.2f} s")
    peaks = {kind: peak_gb(kind, options.tokens) for kind in ("plain", "capture")}
    extra = (peaks["capture"] - peaks["plain"]) / (options.tokens * loaded.channels * 4 / 1e9)
    verdict = "holds" if extra <= 3 else "does not hold"
    print(
        f"peak memory                  {peaks['plain']:.3f} GB plain, {peaks['capture']:.3f} GB capturing: {extra:.1f} sites more (bar 3: {verdict})"
    )


if __name__ == "__main__":
    main()
