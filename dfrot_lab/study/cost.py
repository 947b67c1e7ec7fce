"""What work costs: a stage's operations (2 m k n for (m, k) @ (k, n)) and bytes moved (of float32 tensors, a
pass is one read or one write), counted from the model's shape, over a machine's rates. Disk is left out."""

import statistics
import timeit
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace

import pandas as pd
import torch

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import checkpoint, integer, stream
from dfrot_lab.model.checkpoint import FREE_SHARE
from dfrot_lab.model.shapes import PASS, Shape, shape
from dfrot_lab.observe import capture as captures
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import WINDOW, Recipe, RefineSpec, WeightSpec
from dfrot_lab.rotate import descent, dfrot
from dfrot_lab.rotate.steps import CHECK_EVERY
from dfrot_lab.score import build, perplexity
from dfrot_lab.study.setting import Setting
from dfrot_lab.weights.calibrate import windows_at_once

LOAD, CAPTURE, REFINE, GPTQ = "load and rotate", "capture", "refine", "GPTQ"
FLOAT, INTEGER, TOTAL = "evaluate, 16-bit weights", "evaluate, integer", "total"

CHANNEL_PASSES, MLP_PASSES = 40, 8
"""A layer's passes over its C channels (norms 14, rotary embedding 10, adds 6, rest 10), its MLP's width."""
QUANTIZE_PASSES, HADAMARD_PASSES, RESCALE_PASSES, LOGIT_PASSES = 5, 4, 3, 14
"""To quantize an input, apply R4, scale int8 sums, turn logits into a loss: in cache, so timed on a core."""
CLIP_BYTES, COLUMN_BYTES, EDIT_BYTES, HESSIAN_BYTES = 450, 700, 40, 22
"""Bytes a weight for GPTQ's clip search and columns (timed too), an edit in float64; of a Hessian's entry."""
STEP_PRODUCTS, STEP_PASSES = 4, 9
"""A refinement step's products of (C, C) matrices (eigenvectors two, turn two), passes over its rows."""


@dataclass(frozen=True)
class Machine:
    """Float32 and float64 flops, int8 operations, bytes moved in a second; bytes of memory; rates' source;
    bytes that weights may fill (None: what is usually free)."""

    name: str
    float_rate: float
    double_rate: float
    int8_rate: float
    byte_rate: float
    memory: float
    source: str
    for_weights: float | None = None

    @property
    def room(self) -> float:
        """Bytes that weights may fill; a larger model is read layer by layer."""
        return FREE_SHARE * self.memory if self.for_weights is None else self.for_weights


GPU_80GB = Machine("one 80 GB GPU", 9.75e12, 4.85e12, 312e12, 1e12, 80e9, "half its sheet's, not measured")
"""One of the A100 kind; its data sheet says float32 19.5e12, float64 9.7e12, int8 624e12, 2.0e12 bytes/s."""
TWO_CORES = Machine("2 cores", 150e9, 70e9, 300e9, 8e9, 24e9, "a usual laptop's, not measured")
"""What progress lines assume until the work itself has shown its pace."""


def measure_machine() -> Machine:
    """This machine's rates with torch's threads, measured in under 1 s; int8 as the package multiplies it."""
    import psutil

    a, a64 = torch.randn(1024, 1024), torch.randn(768, 768, dtype=torch.float64)
    a8 = torch.randint(-8, 8, (1024, 1024), dtype=torch.int8)
    large, copy = torch.zeros(64 << 18), torch.empty(64 << 18)

    def rate(amount: float, work: Callable[[], object]) -> float:  # the median of three, after a first
        return amount / statistics.median(timeit.repeat(work, number=1, repeat=4)[1:])

    flops = rate(2 * 1024**3, lambda: a @ a), rate(2 * 768**3, lambda: a64 @ a64)
    int8 = rate(2 * 1024**3, lambda: integer.product(a8, a8))
    rates = (*flops, int8, rate(2 * large.nbytes, lambda: copy.copy_(large)))
    source = f"measured now, {torch.get_num_threads()} threads of torch"
    return Machine("this machine", *rates, psutil.virtual_memory().total, source, checkpoint.memory("cpu"))


RUNTIME = 0.35e9  # bytes of Python, torch and transformers themselves
AMOUNTS = slice(1, 5)  # of a Work or a Machine: float32 and float64 flops, int8 operations, bytes moved


@dataclass(frozen=True)
class Work:
    """What a stage does: float32 and float64 flops, int8 operations, bytes moved; memory at its peak."""

    stage: str
    float_flops: float = 0
    double_flops: float = 0
    int8_ops: float = 0
    moved: float = 0
    memory: float = field(default=0, kw_only=True)

    def __add__(self, other: "Work") -> "Work":
        """One after the other, under the first one's name."""
        both = [a + b for a, b in zip(astuple(self)[AMOUNTS], astuple(other)[AMOUNTS], strict=True)]
        return Work(self.stage, *both, memory=max(self.memory, other.memory))

    def times(self, n: float) -> "Work":
        """The same n times over, in the same memory."""
        return Work(self.stage, *(n * amount for amount in astuple(self)[AMOUNTS]), memory=self.memory)

    def seconds(self, machine: Machine) -> float:
        """How long it takes there."""
        pairs = zip(astuple(self)[AMOUNTS], astuple(machine)[AMOUNTS], strict=True)
        return sum(amount / rate for amount, rate in pairs)


def stages(shape: Shape, recipes: Sequence[Recipe], tokens: int = WINDOW) -> list[Work]:
    """A main job's stages, in order: loads of all models built and captured, captures, refinements, GPTQ,
    windows; those that have no work are left out."""
    builds = {(spec.rotation, spec.weights, spec.jitter): spec for spec in recipes}.values()
    rotated = sum(spec.is_rotated for spec in builds)
    quantized = sum(spec.canonical().weights.corpus is not None for spec in builds)
    refined = refinements(recipes)
    integers = sum(spec.windows for spec in recipes if build.is_integer(spec))
    floats = sum(spec.windows for spec in recipes) - integers
    made = load(shape, len(builds) + refined, rotated), capture(shape, tokens).times(refined)
    windows = float_window(shape, tokens).times(floats), integer_window(shape, tokens).times(integers)
    fitted = refine(shape, tokens).times(refined), gptq(shape, tokens).times(quantized)
    return [work for work in (*made, *fitted, *windows) if any(astuple(work)[AMOUNTS])]


def refinements(recipes: Sequence[Recipe]) -> int:
    """How many refinements recipes ask for, each of a capture of its own; one at least."""
    return max(1, len({spec.rotation for spec in recipes if isinstance(spec.rotation, RefineSpec)}))


def load(shape: Shape, loads: int, rotated: int) -> Work:
    """Read the weights, fuse gains; fuse R1, a float64 product of every weight, the largest held twice."""
    weights = shape.linear_weights + 2 * shape.embedding
    moved = loads * (2 * PASS + EDIT_BYTES) + rotated * EDIT_BYTES
    memory = shape.held_bytes + 2 * 8 * max(shape.embedding, shape.mlp * shape.channels)
    return Work(LOAD, 0, rotated * 2 * shape.channels * weights, moved=moved * weights, memory=memory)


def forward(shape: Shape, tokens: int, windows: int = 1) -> Work:
    """The layers, without lm_head, on `windows` windows at once; attention is causal: half of the pairs."""
    rows, attention = tokens * windows, windows * shape.layers * 2 * tokens**2 * shape.heads * shape.head
    passes = shape.layers * rows * (CHANNEL_PASSES * shape.channels + MLP_PASSES * shape.active * shape.mlp)
    memory = shape.held_bytes + rows * (6 * shape.channels + 3 * shape.mlp) * PASS
    flops = 2 * shape.active_weights * rows + attention
    return Work("forward", flops, moved=PASS * (passes + shape.linear_weights), memory=memory)


def capture(shape: Shape, tokens: int) -> Work:
    """A forward pass whose norm outputs, two a layer, are looked at and written, in 6 passes."""
    return Work(CAPTURE, moved=6 * PASS * 2 * shape.layers * tokens * shape.channels) + forward(shape, tokens)


def refine(shape: Shape, tokens: int) -> Work:
    """Refine R1: x^T x, its eigenvectors (9 C^3); steps on a part of the rows; looks at all rows (x R)."""
    C, rows, steps = shape.channels, 2 * shape.layers * tokens, RefineSpec().steps
    part, looks = min(rows, max(rows / descent.PARTS, descent.LEAST_ROWS)), steps / CHECK_EVERY + 1
    step = 2 * part * C**2 * (2 + min(1, C / descent.ROWS_AT_ONCE)) + STEP_PRODUCTS * 2 * C**3
    flops = steps * step + (looks + 1) * 2 * rows * C**2
    moved = PASS * STEP_PASSES * C * (steps * part + looks * rows)
    return Work(REFINE, flops, 9 * C**3, moved=moved, memory=1.5 * PASS * rows * C)


def gptq(shape: Shape, tokens: int, windows: int = WeightSpec().windows) -> Work:
    """One build's GPTQ: the calibration windows forward at once; half a Hessian for each input; for each
    linear clip search, a factor (2 Cholesky, an inverse: 4/3 in^3), columns' errors passed on (out in^2)."""
    read = zip(shape.inputs, (1, 1, shape.active, shape.active), strict=True)
    hessians = shape.layers * sum(windows * tokens * times * into**2 for into, times in read)
    columns = shape.total(lambda out, into: out * into**2, shape.experts)
    factors = shape.total(lambda _, into: 4 / 3 * into**3, shape.experts)
    passes = forward(shape, tokens, windows)
    at_once = min(windows, windows_at_once(tokens, shape.mlp))
    memory = forward(shape, tokens, at_once).memory + PASS * windows * tokens * shape.channels
    memory += (HESSIAN_BYTES + PASS * (shape.experts - 1)) * max(shape.inputs) ** 2  # all experts' at once
    moved = shape.linear_weights * (CLIP_BYTES + COLUMN_BYTES)
    return Work(GPTQ, hessians + columns, factors, moved=moved, memory=memory) + passes


def drift(shape: Shape, tokens: int, windows: int) -> Work:
    """What GPTAQ and QEP need beyond GPTQ: the windows forward in full precision, where what linears read is
    kept; its product with what they read now; QEP's system of equations (8/3 in^3)."""
    rows, inputs = tokens * windows, shape.inputs
    passes = forward(shape, tokens, windows)
    memory = passes.memory + PASS * rows * (sum(inputs) + shape.channels)
    products = shape.layers * sum(2 * rows * into**2 for into in inputs)
    solved = shape.layers * sum(8 / 3 * into**3 for into in inputs)
    return Work(GPTQ, products, solved, memory=memory) + passes


def float_window(shape: Shape, tokens: int) -> Work:
    """One window, products in float: inputs quantized, R4, lm_head and loss."""
    mlps = (QUANTIZE_PASSES + HADAMARD_PASSES) * shape.active * shape.mlp
    inputs = shape.layers * tokens * (QUANTIZE_PASSES * sum(shape.inputs[:3]) + mlps)
    moved = PASS * (inputs + shape.embedding + LOGIT_PASSES * tokens * shape.vocabulary)
    memory = shape.held_bytes + 3 * PASS * stream.LOGIT_ROWS * shape.vocabulary
    heads = 2 * 2 * shape.embedding * tokens  # its own logits, and full precision's
    return Work(FLOAT, heads, moved=moved, memory=memory) + forward(shape, tokens)


def integer_window(shape: Shape, tokens: int) -> Work:
    """The same with integer linears; attention and lm_head in float, the codes held beside float weights."""
    floats, linears = float_window(shape, tokens), 2 * shape.active_weights * tokens
    results = RESCALE_PASSES * PASS * tokens * shape.total(lambda out, _: out, shape.active)
    flops, moved = floats.float_flops - linears, floats.moved + results
    codes = shape.linear_weights * shape.layers_held / shape.layers
    memory = max(floats.memory, forward(shape, tokens).memory + codes)
    return Work(INTEGER, flops, 0, linears, moved, memory=memory)


def estimate(shape: Shape, machine: Machine, recipes: Sequence[Recipe], tokens: int = WINDOW) -> pd.DataFrame:
    """Seconds, peak memory (GB) and whether the machine has that much, a row a stage; then `total`."""
    shape = replace(shape, room=machine.room)
    works = stages(shape, recipes, tokens)
    lines = [(work.stage, work.seconds(machine), (work.memory + RUNTIME) / 1e9) for work in works]
    table = pd.DataFrame(lines, columns=["stage", "seconds", "memory_gb"])
    table.loc[len(table)] = [TOTAL, table["seconds"].sum(), table["memory_gb"].max()]
    return table.assign(fits=table["memory_gb"] * 1e9 <= machine.memory)


def preparation(setting: Setting, store: Store) -> list[float]:
    """Nominal seconds on 2 cores of a setting's capture and refinement; 0 for what is stored."""
    sizes, tokens = shape(setting.model), setting.window
    recorded, refined = captures.stored(setting.capture, store), dfrot.stored(setting.refine, store)
    works = (load(sizes, 1, 0) + capture(sizes, tokens), recorded), (refine(sizes, tokens), refined)
    return [0.0 if found else work.seconds(TWO_CORES) for work, found in works]


def seconds(specs: Sequence[Recipe], store: Store) -> list[float]:
    """Nominal seconds on 2 cores of each recipe: 0 if stored, else its windows, and what it needs first."""
    found, ready = [0.0] * len(specs), set[str]()  # ready: keys of what will be there by then
    for place, spec in enumerate(specs):
        if perplexity.stored(spec, store):
            continue
        work, sizes, rotation, key = scoring(spec), shape(spec.model), spec.rotation, build.build_key(spec)
        if key not in ready:
            work += load(sizes, 1, int(spec.is_rotated))
            if spec.canonical().weights.corpus and not build.weights_stored(spec, store):
                work += gptq(sizes, spec.weights.window, spec.weights.windows)
                if registry.drifts(spec.weights.method):
                    work += drift(sizes, spec.weights.window, spec.weights.windows)
        if isinstance(rotation, RefineSpec) and not (rotation.key in ready or dfrot.stored(rotation, store)):
            work += refinement(sizes, rotation)
        ready |= {key, rotation.key}
        found[place] = work.seconds(TWO_CORES)
    return found


def refinement(sizes: Shape, spec: RefineSpec) -> Work:
    """A refinement with the capture of its rows."""
    tokens = spec.capture.tokens
    return load(sizes, 1, 0) + capture(sizes, tokens) + refine(sizes, tokens)


def scoring(spec: Recipe) -> Work:
    """A recipe's windows alone."""
    window = integer_window if build.is_integer(spec) else float_window
    return window(shape(spec.model), spec.window).times(spec.windows)


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min, 3.4 h, 5.2 days."""
    if seconds < 90 * 60:
        return f"{max(seconds, 1):.2g} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"
