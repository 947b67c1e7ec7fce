"""GPTQ of the default model against its calibration forwards alone, and one layer column by column: `python
benchmarks/gptq.py [--windows 16]`.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import RUNS, Row, options, report, seconds
from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import corpus, loading, surgery
from dfrot_lab.model.malloc import keep_freed_memory
from dfrot_lab.recipe.specs import CorpusSpec, WeightSpec, recipe_of
from dfrot_lab.score.build import build
from dfrot_lab.study.cost import measure_machine
from dfrot_lab.weights import gptq, rtn, run

TEXT = CorpusSpec(name="wikipedia-sample")


def rotated() -> loading.LoadedModel:
    """The default model under RH, not yet quantized."""
    return build(recipe_of("16-4-16", corpus=TEXT), Store()).loaded


def whole(spec: WeightSpec) -> float:
    """Seconds of GPTQ from a fresh model to stored weights."""
    loaded = rotated()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run.quantize_weights(loaded, spec, {"of": "bench"}, Store(Path(folder)))
        return time.perf_counter() - start


def column_by_column(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, damping: float
) -> torch.Tensor:
    """GPTQ as its paper prints it: every column's error goes to all columns after it at once, with the
    inverse Hessian's own update.
    """
    weight, inverse = (
        weight.clone(),
        torch.linalg.inv(hessian.double() + damping * hessian.diagonal().mean() * torch.eye(len(hessian))),
    )
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    codes = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        codes[:, i] = torch.clamp(torch.round(weight[:, i] / scale[:, 0]), -8, 7)
        error = (weight[:, i] - codes[:, i] * scale[:, 0]) / factor[i, i]
        weight[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :][None]
    return codes


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--windows", type=int, default=16)
    given = parser.parse_args()
    keep_freed_memory()
    spec = WeightSpec(corpus=TEXT.with_(split="calibration"), windows=given.windows)
    loaded = rotated()
    ids = corpus.token_blocks(spec.corpus, loaded.tokenizer, blocks=given.windows, window=spec.window)
    with surgery.online(loaded, r4=True):
        forwards = given.windows * seconds(lambda: loading.body(loaded)(ids[:1], use_cache=False))
    passes = [whole(spec) for _ in tqdm(range(RUNS), desc="GPTQ passes")]
    x = torch.randn(8192, 1536)
    weight, hessian = torch.randn(576, 1536), gptq.hessian_of(x)
    plain = spec.with_(clip_search=False)
    scale = rtn.scale_of(weight, plain)
    ours = seconds(lambda: gptq.quantize(weight, gptq.Seen(hessian), plain))
    slow = seconds(lambda: column_by_column(weight, hessian, scale, plain.damping))
    same = float(
        (
            gptq.quantize(weight, gptq.Seen(hessian), plain).codes
            == column_by_column(weight, hessian, scale, plain.damping)
        )
        .float()
        .mean()
    )
    half = seconds(lambda: gptq.hessian_of(x))
    full = seconds(lambda: x.T @ x)
    rows = [
        Row(
            "GPTQ",
            f"{given.windows} x 2048 tokens / the forwards alone, one window at a time",
            statistics.median(passes),
            forwards,
            bar=2.5,
        ),
        Row(
            "GPTQ",
            "column by column / ours, a linear of 1536 to 576",
            ours,
            slow,
            at_least=True,
            note=f"{100 * same:.2f}% of codes equal",
        ),
        Row(
            "GPTQ",
            "x^T x / the half that is not known by symmetry",
            half,
            full,
            at_least=True,
            floor=8192 * 1536**2 / measure_machine().float_rate,
        ),
    ]
    report(rows, given.out)


if __name__ == "__main__":
    main()
