"""How the stages grow with the model: `python benchmarks/growth.py [--channels 288 576 1152 2304] [--rows
4096 16384 65536 131072] [--quick]`.

Every stage runs on a random two-layer LLaMA of each width C (MLP about 8/3 C, a massive token planted) on
2048 random tokens, or on random rows. That is a timing and no figure of the paper: no stage's time depends on
the values. Then time = a C^p rows^q is fitted in logs, and what LLaMA-2-7B and LLaMA-3-70B would need is said
twice: by these laws, continued in C and in layers, and by the arithmetic of `dfrot_lab.study.cost`. About 4
minutes.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from common import machine, options, seconds
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from dfrot_lab.maths import rotations
from dfrot_lab.maths.hadamard import factors
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.model import families, loading, shapes, surgery
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe.capture import record
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import WINDOW, ModelSpec, RefineSpec, RotationSpec, WeightSpec, recipe_of
from dfrot_lab.rotate import descent
from dfrot_lab.rotate.steps import CHECK_EVERY, half_step, row_weights
from dfrot_lab.rotate.transforms import Transforms
from dfrot_lab.score.build import Built, is_integer, quantized
from dfrot_lab.study import cost, main
from dfrot_lab.study.setting import Setting
from dfrot_lab.weights import gptq, rtn

LAYERS, VOCABULARY = 2, 512
LARGEST = 4e9
"""Bytes of rows beyond which a size is left out."""
BUDGET = 5.0
"""Seconds that the runs of one measurement should take together."""
FORWARD, CAPTURE, HESSIAN, GPTQ, INTEGER = "forward", "capture", "Hessians", "GPTQ", "integer forward"
ERRORS, REFINE = "errors", "refinement pass"


@dataclass(frozen=True)
class Point:
    """One measurement: seconds of `what` at C channels, and of `rows` rows where it works on rows."""

    what: str
    channels: int
    rows: int | None
    seconds: float


@dataclass(frozen=True)
class Law:
    """seconds = a C^p rows^q, as fitted; q is None where the stage has a fixed number of tokens."""

    what: str
    a: float
    channels: float
    rows: float | None

    def __call__(self, channels: int, rows: float = 1) -> float:
        """Seconds at C channels and that many rows."""
        return self.a * channels**self.channels * rows ** (self.rows or 0)


def mlp_width(channels: int) -> int:
    """The first multiple of 64 from 8/3 C on that has a Hadamard matrix."""
    width = 64 * round(channels / 24)
    while factors(width) is None:
        width += 64
    return width


def random_model(channels: int, tokens: int) -> LoadedModel:
    """A random two-layer LLaMA, norms fused, whose first token is massive."""
    head = 64 if channels % 64 == 0 else 32
    if channels % head:
        raise SystemExit(f"--channels must be multiples of 32; got {channels}")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=channels, intermediate_size=mlp_width(channels),
        num_hidden_layers=LAYERS, head_dim=head, num_attention_heads=channels // head,
        num_key_value_heads=channels // head, max_position_embeddings=tokens, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.model.embed_tokens.weight[0, :2] += torch.tensor([40.0, -25.0])
    loaded = LoadedModel(model, None, families.Roles(), ModelSpec(source="random"), "random", "random")
    surgery.prepare(loaded)
    return loaded


def random_rows(channels: int, rows: int) -> tuple[Tensor, Tensor]:
    """Normal rows (rows, C), one in a thousand massive, and the mask of those."""
    x, mask = torch.randn(rows, channels), torch.zeros(rows, dtype=torch.bool)
    mask[::1000] = True
    x[mask, 0] = 500.0
    return x, mask


def model_works(loaded: LoadedModel, tokens: int) -> Iterator[tuple[str, float, Callable[[], object]]]:
    """What is timed on a model: the stage, its operations, and the call."""
    shape = shapes.shape_of(loaded.model.config)
    ids = torch.randint(1, VOCABULARY, (1, tokens))
    flops = cost.forward(shape, tokens).float_flops
    yield FORWARD, flops, lambda: loading.body(loaded)(ids, use_cache=False)
    yield CAPTURE, flops, lambda: record(loaded, ids, lambda _site, _x: None)
    inputs = {width: torch.randn(tokens, width) for width in shape.inputs}
    yield (
        HESSIAN,
        tokens * sum(width**2 for width in shape.inputs),
        lambda: [gptq.hessian_of(inputs[width]) for width in shape.inputs],
    )
    spec, layer = WeightSpec(), loaded.layers[0]
    names = loaded.roles.linears(layer)
    weights = [loading.linear(layer, name).weight for name in names]
    hessians = {width: gptq.hessian_of(x) for width, x in inputs.items()}
    cubes = 4 * sum(w.shape[1] ** 3 for w in weights)
    yield GPTQ, cubes, lambda: [gptq.quantize(w, gptq.Seen(hessians[w.shape[1]]), spec) for w in weights]
    codes = [
        {name: rtn.quantize(loading.linear(layer, name).weight, None, spec) for name in names}
        for layer in loaded.layers
    ]
    yield INTEGER, flops / 3, lambda: integer_forward(Built(loaded, Transforms(R1=None), None, codes), ids)


def integer_forward(built: Built, ids: Tensor) -> None:
    """A forward pass with integer linears, weights and activations at 4 bits."""
    with quantized(built, recipe_of("4-4-16")):
        loading.body(built.loaded)(ids, use_cache=False)


def row_works(x: Tensor, mask: Tensor, R: Tensor) -> Iterator[tuple[str, float, Callable[[], object]]]:
    """What is timed on rows: their errors, window by window, and one pass of the refinement over them."""
    quantizer, weights = QuantSpec(scheme="asymmetric"), row_weights(mask, 100.0)
    rotation, flops = R.to(x), 2 * x.numel() * x.shape[1]
    yield ERRORS, flops, lambda: [squared_error(part @ rotation, quantizer) for part in x.split(WINDOW)]
    yield REFINE, 2 * flops, lambda: half_step(x, R, weights, mask, quantizer)


def measure(channels: Sequence[int], rows: Sequence[int], tokens: int, rate: float, runs: int) -> list[Point]:
    """Every stage at every size; large ones are run less often."""
    points = []
    with tqdm(total=len(channels) * (5 + 2 * len(rows)), unit="stage") as bar, torch.inference_mode():

        def timed(what: str, C: int, n: int | None, flops: float, work: Callable[[], object]) -> None:
            bar.set_description(f"{what}, C = {C}" + (f", {n} rows" if n else ""))
            points.append(Point(what, C, n, seconds(work, max(1, min(runs, int(BUDGET * rate / flops))))))
            bar.update()

        for C in channels:
            for what, flops, work in model_works(random_model(C, tokens), tokens):
                timed(what, C, None, flops, work)
            R, sizes = rotations.make(RotationSpec(kind="RH"), C), [n for n in rows if 4 * n * C <= LARGEST]
            x, mask = random_rows(C, max(sizes, default=0))
            for n in sizes:
                for what, flops, work in row_works(x[:n], mask[:n], R):
                    timed(what, C, n, flops, work)
    return points


def fit(points: Sequence[Point]) -> Law:
    """The law of one stage's points, by least squares in logs."""
    columns = [[1.0, math.log(p.channels), *([math.log(p.rows)] if p.rows else [])] for p in points]
    constant, *powers = np.linalg.lstsq(np.array(columns), np.log([p.seconds for p in points]), rcond=None)[0]
    return Law(
        points[0].what, math.exp(constant), float(powers[0]), float(powers[1]) if len(powers) > 1 else None
    )


def by_laws(laws: dict[str, Law], shape: shapes.Shape, tokens: int) -> dict[str, float]:
    """Seconds of the main job's stages by the fitted laws: per layer in C, times layers, windows and rows of
    the job.

    The laws hold the MLP at 8/3 C and as many key-value heads as heads. Loading and lm_head were not
    measured. A refinement step counts as a pass of Eq. 7 and 8 over its part of the rows, a look at all rows
    and the set-up as half a pass over all; the step's (C, C) products are left out.
    """
    recipes, steps = [row.spec for row in main.rows(Setting())], RefineSpec().steps
    builds = len({(spec.rotation, spec.weights) for spec in recipes if spec.weights.quantizer.bits < 16})
    integers = sum(spec.windows for spec in recipes if is_integer(spec))
    floats = sum(spec.windows for spec in recipes) - integers
    C, rows, share = shape.channels, 2 * shape.layers * tokens, shape.layers / LAYERS
    part, looks = rows / descent.PARTS, steps / CHECK_EVERY + 1
    calibration = WeightSpec().windows
    layer = calibration * (laws[FORWARD](C) / LAYERS + laws[HESSIAN](C)) + laws[GPTQ](C)
    return {
        cost.CAPTURE: laws[CAPTURE](C) * share,
        cost.REFINE: steps * laws[REFINE](C, part) + (looks + 1) * laws[REFINE](C, rows) / 2,
        cost.GPTQ: builds * shape.layers * layer,
        cost.FLOAT: floats * laws[FORWARD](C) * share,
        cost.INTEGER: integers * laws[INTEGER](C) * share,
    }


def laws_text(laws: dict[str, Law], points: Sequence[Point]) -> str:
    """The exponents as a Markdown table, with the range they were measured in."""
    lines = ["| stage | seconds grow as | measured at C | rows | seconds |", "|---|---|---|---|---|"]
    for what, law in laws.items():
        own = [p for p in points if p.what == what]
        power = f"C^{law.channels:.2f}" + (f" rows^{law.rows:.2f}" if law.rows is not None else "")
        rows = "" if law.rows is None else _range([p.rows or 0 for p in own])
        took = _range([float(f"{p.seconds:.2g}") for p in own])
        lines.append(f"| {what} | {power} | {_range([p.channels for p in own])} | {rows} | {took} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):,} to {max(values):,}"


def needs_text(laws: dict[str, Law], tokens: int, here: cost.Machine) -> str:
    """What each large model would need, by laws and by arithmetic here, and by arithmetic on one 80 GB GPU;
    the total of laws lacks their gaps.
    """
    lines = [
        "| model | stage | by the laws, here | by arithmetic, here | by arithmetic, one 80 GB GPU | memory |",
        "|---|---|---|---|---|---|",
    ]
    machines, recipes = (here, cost.GPU_80GB), [row.spec for row in main.rows(Setting())]
    for name in ("llama-2-7b", "llama-3-70b"):
        shape = shapes.SHAPES[name]
        found, tables = (
            by_laws(laws, shape, tokens),
            [cost.estimate(shape, m, recipes, tokens=tokens) for m in machines],
        )
        found[cost.TOTAL] = sum(found.values())
        for own, gpu in zip(*(table.to_dict("records") for table in tables), strict=True):
            law = cost.duration(found[own["stage"]]) if own["stage"] in found else "-"
            short = [m.name for m, row in zip(machines, (own, gpu), strict=True) if not row["fits"]]
            fits = f", too much for {' and for '.join(short)}" if short else ""
            times = f"{law} | {cost.duration(own['seconds'])} | {cost.duration(gpu['seconds'])}"
            lines.append(f"| {name} | {own['stage']} | {times} | {own['memory_gb']:,.1f} GB{fits} |")
    return "\n".join(lines)


def save(out: Path, laws: dict[str, Law], points: Sequence[Point]) -> None:
    """Append one line a stage: exponents, and the points they were fitted to."""
    with out.open("a") as file:
        for what, law in laws.items():
            own = [{k: v for k, v in asdict(p).items() if k != "what"} for p in points if p.what == what]
            row = {
                "stage": "growth",
                "what": what,
                "exponent_channels": law.channels,
                "exponent_rows": law.rows,
                "factor": law.a,
                "points": own,
            }
            file.write(json.dumps({**row, "machine": machine()}) + "\n")


def measure_all() -> None:
    """Measure, fit and print."""
    parser = options(__doc__)
    parser.add_argument("--channels", type=int, nargs="+", default=[288, 576, 1152, 2304])
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384, 65536, 131072])
    parser.add_argument("--runs", type=int, default=5, help="runs of a measurement, at most")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it works: its numbers mean nothing"
    )
    chosen = parser.parse_args()
    channels, rows, tokens = (
        ([256, 512], [512, 1024], 128) if chosen.quick else (chosen.channels, chosen.rows, WINDOW)
    )
    if len(set(channels)) < 2 or len(set(rows)) < 2:
        parser.error("--channels and --rows need two sizes each: a power is fitted through them")
    here = cost.measure_machine()
    points = measure(channels, rows, tokens, here.float_rate, chosen.runs)
    laws = {
        what: fit([p for p in points if p.what == what]) for what in dict.fromkeys(p.what for p in points)
    }
    print(f"{machine()}\n\n{laws_text(laws, points)}\n\n{needs_text(laws, tokens, here)}")
    if chosen.out:
        save(chosen.out, laws, points)


if __name__ == "__main__":
    measure_all()
