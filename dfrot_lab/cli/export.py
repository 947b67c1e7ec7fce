"""`dfrot-lab export`: take a rotated model, or its rotation, away."""

from pathlib import Path
from typing import Annotated

import typer

from dfrot_lab.cli.options import BITS, RECIPE, ROTATION, SCORED, Options, command
from dfrot_lab.recipe import registry

TO = f"{', '.join(registry.EXPORTS)}: a Hugging Face folder, or R1 alone as a safetensors file."


@command("export", SCORED)
def export(
    said: Options, context: typer.Context, rotation: Annotated[str, typer.Option(help=ROTATION)] = "RH",
    bits: Annotated[str, typer.Option(help=BITS)] = "4-4-16",
    to: Annotated[str, typer.Option(help=TO)] = "hf",
    recipe: Annotated[Path | None, typer.Option(help=RECIPE)] = None,
) -> None:  # fmt: skip
    """Write a rotated model, its logits the original's, for others to load; or R1 alone. --out: where."""
    module = registry.load(registry.EXPORTS, to, "--to")
    if said.out is None:
        raise typer.BadParameter("say where it goes", param_hint="--out")
    spec = said.whole_recipe(context, recipe, rotation, bits, beside=("to",))
    path = module.export(spec, said.out)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))
    about = {"written": path.name, "format": to, "rotation": spec.rotation.name, "bytes": size}
    said.show(about, f"{path}: {spec.rotation.name} as {to}, {size / 1e6:,.0f} MB")
