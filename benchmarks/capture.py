"""Capture against a plain forward pass of the same tokens, in the same run: `python benchmarks/capture.py [--tokens 2048] [--runs 5]`.

Prints medians, the ratio of capture without the write to the plain forward (bar: 1.15), the write's own seconds, and the peak memory of each.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dfrot_lab import corpus, models, surgery
from dfrot_lab.capture import record
from dfrot_lab.specs import CorpusSpec, ModelSpec
from dfrot_lab.store import Store


def median_seconds(work: Callable[[], object], runs: int) -> float:
    """Median wall seconds of `runs` calls after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_gb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    loaded = models.load_model(ModelSpec())
    surgery.prepare(loaded)
    ids = corpus.token_blocks(CorpusSpec(name="wikipedia-sample"), loaded.tokenizer, blocks=1, window=options.tokens)
    with torch.inference_mode():
        plain = median_seconds(lambda: models.body(loaded)(ids, use_cache=False), options.runs)
    plain_peak = peak_gb()
    recorded = median_seconds(lambda: record(loaded, ids, lambda _site, _x: None), options.runs)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        keys = iter(range(1000))

        def written() -> None:
            store.get_or_make(
                "bench", {"run": next(keys)}, lambda writer: record(loaded, ids, lambda site, x: writer.save_tensors(site, {"x": x})) and None
            )

        with_write = median_seconds(written, options.runs)
    site_gb = options.tokens * loaded.channels * 4 / 1e9
    ratio = recorded / plain
    print(f"plain forward                {plain:6.2f} s")
    print(f"capture without the write    {recorded:6.2f} s   ratio {ratio:.3f} (bar 1.15: {'holds' if ratio <= 1.15 else 'does not hold'})")
    print(f"capture with the write       {with_write:6.2f} s   of which the write {with_write - recorded:.2f} s")
    extra = (peak_gb() - plain_peak) / site_gb
    print(f"peak memory                  {plain_peak:.3f} GB plain, {peak_gb():.3f} GB capturing: {extra:.1f} sites more (bar 3)")


if __name__ == "__main__":
    main()
