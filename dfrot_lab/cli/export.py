"""`dfrot-lab export`: take a rotated model, or its rotation, away."""

import inspect
from pathlib import Path
from typing import Annotated

import typer

from dfrot_lab.cli.options import BITS, RECIPE, ROTATION, SCORED, Options, command
from dfrot_lab.recipe import registry

TO = f"{', '.join(registry.EXPORTS)}: a plain folder, a quantized one for vLLM, llama.cpp's file, R1 alone."
WITH_R4 = "compressed-tensors: keep R4, which dfrot_lab.load_export and vLLM apply and transformers does not."
KIND = (
    "gguf: F32, F16 (default), BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, MXFP4; with libgguf Q6_K, Q4_K and others."
)
TAKEN = SCORED.replace("online kv ", "")


@command("export", TAKEN)
def export(
    said: Options, context: typer.Context, rotation: Annotated[str, typer.Option(help=ROTATION)] = "RH",
    bits: Annotated[str, typer.Option(help=BITS)] = "4-4-16",
    to: Annotated[str, typer.Option(help=TO)] = "hf",
    with_r4: Annotated[bool, typer.Option("--with-r4", help=WITH_R4)] = False,
    kind: Annotated[str | None, typer.Option(help=KIND)] = None,
    recipe: Annotated[Path | None, typer.Option(help=RECIPE)] = None,
) -> None:  # fmt: skip
    """Write a rotated model for others to load: its logits the original's, or quantized; or R1 alone. --out:
    where."""
    module = registry.load(registry.EXPORTS, to, "--to")
    if said.out is None:
        raise typer.BadParameter("say where it goes", param_hint="--out")
    own = {name: value for name, value in (("with_r4", with_r4), ("kind", kind)) if value}
    unknown = next((name for name in own if name not in inspect.signature(module.export).parameters), None)
    if unknown:
        raise typer.BadParameter(f"{to} has no such choice", param_hint=f"--{unknown.replace('_', '-')}")
    spec = said.whole_recipe(context, recipe, rotation, bits, beside=("to", *own))
    path = module.export(spec, said.out, **own)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))
    about = {"written": path.name, "format": to, "rotation": spec.rotation.name, "bytes": size}
    said.show(about, f"{path}: {spec.rotation.name} as {to}, {size / 1e6:,.0f} MB")
