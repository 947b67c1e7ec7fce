"""A table's rows one after the other on all cores against side by side in processes that share them: `python
benchmarks/workers.py [--workers 2] [--builds 2]`. Both sides start with the same store, which has the model
and the activations and no row.
"""

import shutil
import tempfile
import time
from pathlib import Path

from common import Row, options, report

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model.malloc import keep_freed_memory
from dfrot_lab.score import divergence, perplexity, sweep
from dfrot_lab.score.build import build, windows_of
from dfrot_lab.study import main as job
from dfrot_lab.study.setting import Setting


def rows(builds: int) -> list:
    """RO and RH at 16-4-16, rounded to nearest and by GPTQ at 4-4-16, in so many builds."""

    def asks(own: Setting):
        for kind in ("RO", "RH"):
            for bits, by in (("16-4-16", "rtn"), ("4-4-16", "rtn"), ("4-4-16", "gptq")):
                yield job.Row(own.row(bits, own.rotation(kind), weights=by))

    setting = Setting(corpus="wikipedia-sample", builds=builds, gptq_windows=4).resolved()
    return job.recipes(job.rows_by_build(asks, setting))


def seconds(specs: list, ready: Path, workers: int) -> float:
    """Wall seconds of the rows, the start and the end of the processes included."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "store"
        shutil.copytree(ready, place)
        start = time.perf_counter()
        with sweep.side_by_side(workers):
            if sweep.is_on():
                sweep.evaluate_all(specs, Store(place))
            else:
                perplexity.evaluate_all(specs, Store(place))
        return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--builds", type=int, default=2)
    said = parser.parse_args()
    keep_freed_memory()
    specs = rows(said.builds)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        build(specs[0], store)  # the model, once converted
        for spec in specs:
            divergence.references(spec, windows_of(spec, store), store)
        alone, together = (seconds(specs, store.root, workers) for workers in (1, said.workers))
    what = f"{len(specs)} rows, {said.workers} processes against one"
    report([Row("sweep", what, together, alone, bar=1.0)], said.out)


if __name__ == "__main__":
    main()
