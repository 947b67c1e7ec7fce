"""What a main job would need on a machine, in words, before anything is run: `run --dry-run`, and what `run`
refuses."""

from collections.abc import Sequence
from dataclasses import astuple, replace

import pandas as pd

from dfrot_lab.maths.hadamard import block_of
from dfrot_lab.model import checkpoint
from dfrot_lab.model.shapes import PASS, Shape
from dfrot_lab.recipe.specs import WINDOW, Recipe
from dfrot_lab.study.cost import RUNTIME, Machine, duration, estimate, refinements, stages


def shortage(shape: Shape, recipes: Sequence[Recipe], tokens: int, free: float) -> str | None:
    """What this machine lacks for a main job, in words, with `free` bytes of disk for its cache; or None."""
    import psutil

    memory = psutil.virtual_memory().total
    works = stages(replace(shape, room=checkpoint.memory("cpu")), recipes, tokens)
    peak = max(work.memory for work in works) + RUNTIME
    needs = {"memory": (peak, memory), "disk": (disk(shape, recipes, tokens), free)}
    lacks = [f"{a / 1e9:.0f} GB of {what} and has {b / 1e9:.0f}" for what, (a, b) in needs.items() if a > b]
    return f"this would need about {' and '.join(lacks)}" if lacks else None


def disk(shape: Shape, recipes: Sequence[Recipe], tokens: int = WINDOW) -> float:
    """Bytes that a main job keeps: its captures, a byte a weight for each model whose weights it quantizes,
    of each window what full precision makes of it."""
    builds = {
        (spec.rotation, spec.canonical().weights) for spec in recipes if spec.weights.quantizer.bits < 16
    }
    captures, windows = refinements(recipes), {(spec.sample, spec.windows) for spec in recipes}
    rows = 2 * shape.layers * captures + sum(count for _, count in windows)
    return rows * tokens * shape.channels * PASS + len(builds) * shape.linear_weights


def hadamards(shape: Shape) -> str:
    """Which Hadamard rotations a shape can have, in words: whole, in blocks, or none."""
    found = []
    for name, n in {"R1 (RH)": shape.channels, "R2 and R3": shape.head, "R4": shape.mlp}.items():
        block = block_of(n)
        how = "whole" if block == n else f"{n // block} blocks of {block}" if block > 1 else "none is known"
        found.append(f"{name} of {n}: {how}")
    return f"Hadamard rotations: {', '.join(found)}"


def describe(name: str, shape: Shape, machines: Sequence[Machine], recipes: Sequence[Recipe]) -> str:
    """The estimate as text: the model, each machine's rates, each stage's time and memory on each machine."""
    tables = [estimate(shape, machine, recipes) for machine in machines]
    columns = {"stage": tables[0]["stage"], "memory": tables[0]["memory_gb"].map("{:,.1f} GB".format)}
    for machine, table in zip(machines, tables, strict=True):
        fits = table["fits"].map({True: "", False: " (does not fit)"})
        columns[machine.name] = table["seconds"].map(duration) + fits
    heads = f"{shape.heads} heads of {shape.head}, {shape.kv_heads} for keys, vocabulary {shape.vocabulary}"
    sizes = f"{shape.layers} layers, C = {shape.channels}, MLP {shape.mlp}, {heads}"
    dtype = {1: "8 bits", 2: "16 bits", 4: "float32", 8: "float64"}[shape.item]
    lines = [f"{name}: {shape.parameters:,} parameters, {dtype}; {sizes}"]
    for m in machines:
        single, double, int8, moved, memory = (f"{rate / 1e9:,.0f}" for rate in astuple(m)[1:6])
        said = f"float32 {single}, float64 {double}, int8 {int8} Gop/s, {moved} GB/s read and written"
        lines.append(f"{m.name}: {said}, {memory} GB; {m.source}")
    lines.append(hadamards(shape))
    streamed = [machine.name for machine in machines if shape.model_bytes > machine.room]
    if streamed:
        lines.append(
            f"Read layer by layer on {', '.join(streamed)}: its weights do not fit there as a whole."
        )
    kept = f"Disk for what is kept: {disk(shape, recipes) / 1e9:,.1f} GB."
    trust = "Arithmetic at these rates, nothing run: expect the truth within a factor of about 2."
    return "\n".join([*lines, "", pd.DataFrame(columns).to_string(index=False), "", kept, trust])
