"""What the main job costs before it runs: the operations and bytes of each stage, counted from the model's
shape, over a machine's rates.

A product (m, k) @ (k, n) counts 2 m k n operations; a pass (one read or one write) over a float32 tensor its
bytes. Nothing overlaps, so the parts of a stage add up. Weights count as float32, as the package loads them
on a CPU, whatever they are published in. Disk and figures are left out.
"""

import statistics
import struct
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dfrot_lab.model import integer, loading
from dfrot_lab.recipe.specs import DEFAULT_MODEL, WINDOW, EvalSpec, ModelSpec, RefineSpec, WeightSpec
from dfrot_lab.rotate import descent
from dfrot_lab.rotate.dfrot import CHECK_EVERY
from dfrot_lab.score import perplexity
from dfrot_lab.study import mainjob
from dfrot_lab.study.setting import Setting

LOAD, CAPTURE, REFINE, GPTQ = "load and rotate", "capture", "refine", "GPTQ"
FLOAT, INTEGER, TOTAL = "evaluate, 16-bit weights", "evaluate, integer", "total"

PASS = 4
"""Bytes of one pass over one float32 value."""
CHANNEL_PASSES, MLP_PASSES = 40, 8
"""Passes of a LLaMA layer in transformers over its C channels (norms 14, rotary embedding 10, adds 6, inputs
and outputs 10) and its MLP's width.
"""
QUANTIZE_PASSES, HADAMARD_PASSES, RESCALE_PASSES, LOGIT_PASSES = 5, 4, 3, 7
"""To quantize an input, apply R4, scale an int8 product's sums, turn logits into a loss: in cache, so timed
on one core, in passes of a copy.
"""
CLIP_BYTES, COLUMN_BYTES, EDIT_BYTES, HESSIAN_BYTES = 450, 700, 40, 32
"""Bytes a weight for GPTQ's clip search and columns (timed too), an edit in float64; of a Hessian's entry
being factored (2 float32, 3 float64).
"""
STEP_PRODUCTS, STEP_PASSES = 4, 9
"""A refinement step's products of (C, C) matrices (two with the eigenvectors, two of the turn) and passes
over its rows.
"""


@dataclass(frozen=True)
class Shape:
    """A LLaMA-like model's sizes: channels C, layers, MLP width, query and key-value heads, channels of a
    head, vocabulary, lm_head tied or not.
    """

    channels: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool = False

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of one layer's q, k, v, o, gate, up, down."""
        C, q, kv = self.channels, self.heads * self.head, self.kv_heads * self.head
        return (q, C), (kv, C), (kv, C), (C, q), (self.mlp, C), (self.mlp, C), (C, self.mlp)

    @property
    def inputs(self) -> tuple[int, int, int, int]:
        """Channels of the four inputs of one layer's linears: of q, k, v; of o; of gate, up; of down."""
        return self.channels, self.heads * self.head, self.channels, self.mlp

    @property
    def linear_weights(self) -> int:
        """Weights of the linears of all layers."""
        return self.layers * sum(out * into for out, into in self.linears)

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and again of lm_head."""
        return self.vocabulary * self.channels

    @property
    def parameters(self) -> int:
        """Parameters as published: linears, norm gains, embedding, and lm_head unless tied. Biases and norms
        of heads (Qwen) are left out.
        """
        return (
            self.linear_weights
            + (2 * self.layers + 1) * self.channels
            + self.embedding * (1 if self.tied else 2)
        )

    @property
    def model_bytes(self) -> float:
        """Memory of the float32 weights once lm_head is untied."""
        return PASS * replace(self, tied=False).parameters


SHAPES = {
    DEFAULT_MODEL: Shape(576, 30, 1536, 9, 3, 64, 49152, tied=True),
    "llama-2-7b": Shape(4096, 32, 11008, 32, 32, 128, 32000),
    "llama-3-70b": Shape(8192, 80, 28672, 64, 8, 128, 128256),
}
"""Models known by name: nothing of theirs has to be there to say what they would take."""


def shape_of(config: Any) -> Shape:
    """The shape of a transformers config of a supported architecture."""
    C, heads = config.hidden_size, config.num_attention_heads
    kv_heads, head = (
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or C // heads,
    )
    return Shape(
        C,
        config.num_hidden_layers,
        config.intermediate_size,
        heads,
        kv_heads,
        head,
        config.vocab_size,
        bool(config.tie_word_embeddings),
    )


def shape(source: ModelSpec) -> Shape:
    """The shape of a model: a name in `SHAPES`, or the config of a folder (no weights needed), a .gguf file
    or the hub; else a ValueError.
    """
    if source.source in SHAPES:
        return SHAPES[source.source]
    path = Path(source.source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _gguf_shape(path)
    if (path / "config.json").is_file():  # no weights are needed
        return shape_of(loading.config_of(path, source))
    try:
        _, place = loading.resolve(source)
    except ValueError as error:
        raise ValueError(f"{error} To estimate without a model: {', '.join(SHAPES)}.") from None
    return shape_of(loading.config_of(place, source))


def _gguf_shape(path: Path) -> Shape:
    from transformers import AutoConfig

    try:
        return shape_of(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    except (ValueError, OSError, RuntimeError, IndexError, KeyError, AttributeError, struct.error) as error:
        raise ValueError(
            f"{path} is not a whole GGUF file of a LLaMA-like model ({type(error).__name__}: {error})"
        ) from error


@dataclass(frozen=True)
class Machine:
    """What a machine does in a second: float32 and float64 flops, int8 operations, bytes read and written;
    and its memory in bytes.
    """

    name: str
    float_rate: float
    double_rate: float
    int8_rate: float
    byte_rate: float
    memory: float
    source: str


GPU_80GB = Machine(
    "one 80 GB GPU",
    19.5e12 / 2,
    9.7e12 / 2,
    624e12 / 2,
    2.0e12 / 2,
    80e9,
    "half its data sheet's, not measured",
)
"""One 80 GB GPU of the A100 kind: its data sheet's rates (float32 19.5e12, float64 9.7e12, int8 624e12,
2.0e12 bytes/s) times 0.5. NOT measured.
"""


def measure_machine() -> Machine:
    """This machine's rates with the threads torch has now, measured in about 2 s; int8 as the package
    multiplies it, be it in float64.
    """
    import psutil

    a, a64, a8 = (
        torch.randn(2048, 2048),
        torch.randn(1024, 1024, dtype=torch.float64),
        torch.randint(-8, 8, (2048, 2048), dtype=torch.int8),
    )
    large, copy = torch.zeros(256 << 18), torch.empty(256 << 18)
    products = (
        _rate(2 * 2048**3, lambda: a @ a),
        _rate(2 * 1024**3, lambda: a64 @ a64),
        _rate(2 * 2048**3, lambda: integer.product(a8, a8)),
    )
    copies = _rate(2 * large.nbytes, lambda: copy.copy_(large))
    return Machine(
        "this machine",
        *products,
        copies,
        psutil.virtual_memory().total,
        f"measured now, {torch.get_num_threads()} threads of torch",
    )


def _rate(amount: float, work: Callable[[], object]) -> float:
    """`amount` a second: the median of three calls, after one that is not counted."""
    return amount / statistics.median(timeit.repeat(work, number=1, repeat=4)[1:])


@dataclass(frozen=True)
class Work:
    """What a stage does: float32 and float64 flops, int8 operations, bytes moved; and the bytes of memory it
    peaks at.
    """

    stage: str
    float_flops: float = 0
    double_flops: float = 0
    int8_ops: float = 0
    moved: float = 0
    memory: float = field(default=0, kw_only=True)

    @property
    def amounts(self) -> tuple[float, float, float, float]:
        """What is done, in the order of a machine's rates."""
        return self.float_flops, self.double_flops, self.int8_ops, self.moved

    def __add__(self, other: "Work") -> "Work":
        """One after the other, under the first one's name."""
        both = [a + b for a, b in zip(self.amounts, other.amounts, strict=True)]
        return Work(self.stage, *both, memory=max(self.memory, other.memory))

    def times(self, n: float) -> "Work":
        """The same n times over, in the same memory."""
        return Work(self.stage, *(n * amount for amount in self.amounts), memory=self.memory)

    def seconds(self, machine: Machine) -> float:
        """How long it takes there."""
        rates = (machine.float_rate, machine.double_rate, machine.int8_rate, machine.byte_rate)
        return sum(amount / rate for amount, rate in zip(self.amounts, rates, strict=True))


def counts(specs: Sequence[EvalSpec]) -> tuple[int, int, int, int, int]:
    """Of `specs`: builds (rows with equal rotation and weights share one), those rotated, those through GPTQ;
    rows in float, rows in integers.
    """
    builds = {(spec.rotation, spec.weights): spec for spec in specs}.values()
    quantized, integers = (
        sum(spec.weights.quantizer.bits < 16 for spec in builds),
        sum(map(perplexity.is_integer, specs)),
    )
    return len(builds), sum(map(perplexity.is_rotated, builds)), quantized, len(specs) - integers, integers


def stages(shape: Shape, *, tokens: int = WINDOW, windows: int = 6) -> list[Work]:
    """The main job's stages in order: windows of `tokens` tokens, `windows` of them for each row."""
    builds, rotated, quantized, floats, integers = counts(
        mainjob.main_specs(Setting(model=ModelSpec(), windows=windows))
    )
    return [
        load(shape, builds + 1, rotated),  # capture loads the model once more
        capture(shape, tokens),
        refine(shape, tokens),
        gptq(shape, tokens).times(quantized),
        float_window(shape, tokens).times(windows * floats),
        integer_window(shape, tokens).times(windows * integers),
    ]


def load(shape: Shape, loads: int, rotated: int) -> Work:
    """Read the weights and fuse the norms' gains; fuse R1, one float64 product of every weight with R, the
    largest held in float64 twice.
    """
    weights, largest = (
        shape.linear_weights + 2 * shape.embedding,
        max(shape.embedding, shape.mlp * shape.channels),
    )
    moved = loads * (2 * PASS + EDIT_BYTES) + rotated * EDIT_BYTES
    return Work(
        LOAD,
        0,
        rotated * 2 * shape.channels * weights,
        moved=moved * weights,
        memory=shape.model_bytes + 2 * 8 * largest,
    )


def forward(shape: Shape, tokens: int, windows: int = 1) -> Work:
    """The layers, without lm_head, on `windows` windows at once; attention is causal, so it computes half of
    the pairs of tokens.
    """
    rows, attention = tokens * windows, windows * shape.layers * 2 * tokens**2 * shape.heads * shape.head
    moved = (
        shape.layers * rows * (CHANNEL_PASSES * shape.channels + MLP_PASSES * shape.mlp)
        + shape.linear_weights
    )
    held = rows * (6 * shape.channels + 3 * shape.mlp) * PASS
    return Work(
        "forward",
        2 * shape.linear_weights * rows + attention,
        moved=PASS * moved,
        memory=shape.model_bytes + held,
    )


def capture(shape: Shape, tokens: int) -> Work:
    """A forward pass whose norm outputs, two a layer, are looked at (finite? the largest?) and written: 6
    passes.
    """
    return Work(CAPTURE, moved=6 * PASS * 2 * shape.layers * tokens * shape.channels) + forward(shape, tokens)


def refine(shape: Shape, tokens: int) -> Work:
    """Refine R1: x^T x of all rows, its eigenvectors (9 C^3); steps on a part of the rows (x R; x^T error
    R^T); looks at all rows (x R).
    """
    C, rows, steps = shape.channels, 2 * shape.layers * tokens, RefineSpec().steps
    part, looks = min(rows, max(rows / descent.PARTS, descent.LEAST_ROWS)), steps / CHECK_EVERY + 1
    step = 2 * part * C**2 * (2 + min(1, C / descent.ROWS_AT_ONCE)) + STEP_PRODUCTS * 2 * C**3
    moved = PASS * STEP_PASSES * C * (steps * part + looks * rows)
    return Work(
        REFINE,
        steps * step + (looks + 1) * 2 * rows * C**2,
        9 * C**3,
        moved=moved,
        memory=1.5 * PASS * rows * C,
    )


def gptq(shape: Shape, tokens: int) -> Work:
    """One build's GPTQ: the calibration windows forward at once; half a Hessian for each input; for each
    linear clip search, a factor (two Cholesky factorisations and an inverse, 4/3 in^3) and columns, each
    one's error going to all after it (out in^2)."""
    windows = WeightSpec().windows
    hessians = sum(windows * tokens * into**2 for into in shape.inputs)
    columns = sum(out * into**2 for out, into in shape.linears)
    factors = sum(4 / 3 * into**3 for _, into in shape.linears)
    passes = forward(shape, tokens, windows)
    memory = passes.memory + HESSIAN_BYTES * max(shape.inputs) ** 2
    moved = shape.linear_weights * (CLIP_BYTES + COLUMN_BYTES)
    return (
        Work(GPTQ, shape.layers * (hessians + columns), shape.layers * factors, moved=moved, memory=memory)
        + passes
    )


def float_window(shape: Shape, tokens: int) -> Work:
    """One evaluation window with 16-bit weights: all products in float, the linears' inputs fake-quantized."""
    return Work(FLOAT) + forward(shape, tokens) + _scoring(shape, tokens)


def integer_window(shape: Shape, tokens: int) -> Work:
    """One evaluation window with integer linears, attention and lm_head in float; the codes are held beside
    the float weights.
    """
    floats, linears = forward(shape, tokens), 2 * shape.linear_weights * tokens
    floats = replace(
        floats,
        float_flops=floats.float_flops - linears,
        int8_ops=linears,
        memory=floats.memory + shape.linear_weights,
    )
    results = RESCALE_PASSES * PASS * shape.layers * tokens * sum(out for out, _ in shape.linears)
    return Work(INTEGER, moved=results) + floats + _scoring(shape, tokens)


def _scoring(shape: Shape, tokens: int) -> Work:
    """What a window adds to a forward pass: the linears' inputs quantized, R4, and lm_head with the loss, a
    few hundred tokens at a time.
    """
    inputs = shape.layers * tokens * (QUANTIZE_PASSES * sum(shape.inputs) + HADAMARD_PASSES * shape.mlp)
    moved = inputs + shape.embedding + LOGIT_PASSES * tokens * shape.vocabulary
    logits = 3 * PASS * perplexity.LOGIT_ROWS * shape.vocabulary
    return Work(
        "scoring", 2 * shape.embedding * tokens, moved=PASS * moved, memory=shape.model_bytes + logits
    )


def estimate(shape: Shape, machine: Machine, *, tokens: int = WINDOW, windows: int = 6) -> pd.DataFrame:
    """Seconds and peak memory (GB) of each stage, whether the machine has that memory; then `total`: the sum
    of seconds, the largest memory.
    """
    works = [
        (work.stage, work.seconds(machine), work.memory / 1e9)
        for work in stages(shape, tokens=tokens, windows=windows)
    ]
    table = pd.DataFrame(works, columns=["stage", "seconds", "memory_gb"])
    table.loc[len(table)] = [TOTAL, table["seconds"].sum(), table["memory_gb"].max()]
    return table.assign(fits=table["memory_gb"] * 1e9 <= machine.memory)


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min, 3.4 h, 5.2 days."""
    if seconds < 90 * 60:
        return f"{seconds:.2g} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def describe(name: str, shape: Shape, machines: Sequence[Machine], *, windows: int = 6) -> str:
    """The estimate as text: the model, each machine's rates, stages by time and memory on each machine, and
    how far to trust it.
    """
    tables = [estimate(shape, machine, windows=windows) for machine in machines]
    columns = {"stage": tables[0]["stage"], "memory": tables[0]["memory_gb"].map("{:,.1f} GB".format)}
    for machine, table in zip(machines, tables, strict=True):
        columns[machine.name] = table["seconds"].map(duration) + table["fits"].map(
            {True: "", False: " (does not fit)"}
        )
    sizes = f"C = {shape.channels}, MLP {shape.mlp}, {shape.heads} heads of {shape.head}, {shape.kv_heads} for keys, vocabulary {shape.vocabulary}"
    lines = [f"{name}: {shape.parameters:,} parameters, float32; {shape.layers} layers, {sizes}"]
    for machine in machines:
        rates = f"float32 {machine.float_rate / 1e9:,.0f}, float64 {machine.double_rate / 1e9:,.0f}, int8 {machine.int8_rate / 1e9:,.0f} Gop/s"
        memory = f"{machine.byte_rate / 1e9:,.0f} GB/s read and written, {machine.memory / 1e9:,.0f} GB"
        lines.append(f"{machine.name}: {rates}, {memory}; {machine.source}")
    trust = "Arithmetic at these rates, nothing run: expect the truth within a factor of about 2."
    return "\n".join([*lines, "", pd.DataFrame(columns).to_string(index=False), "", trust])
