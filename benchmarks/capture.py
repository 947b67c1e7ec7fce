"""Capture against a plain forward pass of the same tokens; opening the artefact and reading one site: `python
benchmarks/capture.py`.
"""

import tempfile
from pathlib import Path

import torch
from common import Row, options, peak_gb, print_peak, report, seconds

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.model import corpus, loading, surgery
from dfrot_lab.observe.capture import capture, record
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec

TEXT = CorpusSpec(name="wikipedia-sample", split="calibration")


def prepared() -> tuple[loading.LoadedModel, torch.Tensor]:
    """The default model, norms fused, and one window of token ids."""
    loaded = loading.load_model(ModelSpec())
    surgery.prepare(loaded)
    return loaded, corpus.token_blocks(TEXT, loaded.tokenizer, blocks=1, window=2048)


def written(loaded: loading.LoadedModel, ids: torch.Tensor, store: Store, run: int) -> None:
    """One capture, streamed to the store site by site."""

    def make(writer: Writer) -> None:
        record(loaded, ids, lambda site, x: writer.save_tensors(site, {"x": x}))

    store.get_or_make("bench", {"run": run}, make)


def one_pass(kind: str) -> None:
    """One pass and this process's peak memory."""
    loaded, ids = prepared()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        if kind == "plain":
            loading.body(loaded)(ids, use_cache=False)
        else:
            written(loaded, ids, Store(Path(folder)), 0)
    print_peak()


def main() -> None:
    """Measure and print."""
    given = options(__doc__).parse_args()
    if given.memory:
        one_pass(given.memory)
        return
    loaded, ids = prepared()
    with torch.inference_mode():
        plain = seconds(lambda: loading.body(loaded)(ids, use_cache=False))
    recorded = seconds(lambda: record(loaded, ids, lambda _site, _x: None))
    with tempfile.TemporaryDirectory() as folder:
        store, runs = Store(Path(folder)), iter(range(1000))
        with_write = seconds(lambda: written(loaded, ids, store, next(runs)))
    found = capture(CaptureSpec(corpus=TEXT))
    artefact = Store().open("capture", found.artefact.manifest["inputs"])
    assert artefact is not None
    opened = seconds(lambda: Store().open("capture", found.artefact.manifest["inputs"]))
    site = seconds(lambda: found.rows("layers.15.input_norm").sum())
    peaks = {kind: peak_gb(__file__, "--memory", kind) for kind in ("plain", "capture")}
    rows = [
        Row(
            "capture",
            "forward of 2048 tokens with every site looked at / plain forward",
            recorded,
            plain,
            bar=1.1,
        ),
        Row("capture", "and with the write / plain forward", with_write, plain),
        Row("capture", "open an artefact / 0.1 s", opened, 0.1, bar=1.0),
        Row("capture", "read one site / 0.05 s", site, 0.05, bar=1.0),
        Row("capture", "peak memory / plain forward's", peaks["capture"], peaks["plain"], unit="GB"),
    ]
    report(rows, given.out)


if __name__ == "__main__":
    main()
