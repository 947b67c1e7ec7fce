"""The options that commands share, and what all commands do: set up logging, list choices, say errors in a
line."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dfrot_lab.cli.malloc import keep_freed_memory
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import DTYPES, MASSIVE_RULES, SCHEMES, CaptureSpec, CorpusSpec, ModelSpec

log = logging.getLogger("dfrot_lab")

Model = Annotated[
    str, typer.Option(help="smollm2-135m, a folder, a .gguf file, or hub:owner/name (the network).")
]
Dtype = Annotated[str, typer.Option(help=f"What weights are computed in: {', '.join(DTYPES)}.")]
Corpus = Annotated[str, typer.Option(help="auto, wikitext2, wikipedia-sample, or a text file.")]
Seed = Annotated[int, typer.Option(help="Seed of the random rotations.", min=0)]
Out = Annotated[Path | None, typer.Option(help="Where the result goes; the ending says the format.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Tokens = Annotated[int, typer.Option(help="Tokens to record: up to 2048, or a multiple of it.")]
Gamma = Annotated[float, typer.Option(help="Weight of massive rows; inf fits them alone.")]
Windows = Annotated[int, typer.Option(help="Evaluation windows of 2048 tokens.")]
Rule = Annotated[str, typer.Option(help=f"What makes a row massive: {', '.join(MASSIVE_RULES)}.")]
Rotation = Annotated[
    str, typer.Option(help="A row of the rotations listed by --help, or a safetensors file with R1.")
]
Bits = Annotated[str, typer.Option(help="Weights-activations-KV, such as 4-4-16.")]
Weights = Annotated[str, typer.Option(help="A weight quantizer listed by --help.")]
RecipeFile = Annotated[
    Path | None, typer.Option(help="A recipe's YAML, in place of all options but --out, --json.")
]
Scheme = Annotated[str, typer.Option(help=f"The quantizer's range: {', '.join(SCHEMES)}.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only say what it would take; --model may also be llama-2-7b or llama-3-70b."
    ),
]


class Group(typer.core.TyperGroup):
    """The commands; below them, what can be chosen by name."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """List rotations, weight quantizers and families as the tables have them now."""
        from dfrot_lab.model.families import FAMILIES

        del ctx
        methods = (f"{name} ({', '.join(choice.rows)})" for name, choice in registry.METHODS.items())
        lists = {
            "Rotations": methods,
            "Weights": registry.WEIGHTS,
            "Families": FAMILIES,
            "Rules": MASSIVE_RULES,
        }
        with formatter.section("What can be chosen"):
            formatter.write_dl([(title, ", ".join(names)) for title, names in lists.items()])


def set_up(verbose: bool) -> None:
    """Log to standard error, and keep freed memory for the next tensor."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    keep_freed_memory()


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 1, and Ctrl-C into a promise that is kept."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("Stopped. What is finished is kept: the same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        if log.isEnabledFor(logging.DEBUG):
            raise
        typer.echo(f"Error: {error.args[0] if isinstance(error, KeyError) else error}", err=True)
        raise typer.Exit(1) from None


def capture_spec(model: ModelSpec, corpus: str, tokens: int) -> CaptureSpec:
    """The capture of a text's calibration half."""
    return CaptureSpec(model=model, corpus=CorpusSpec(name=corpus, split="calibration"), tokens=tokens)


def rotation_spec(name: str, seed: int, capture: CaptureSpec, **fields: Any) -> Any:
    """The rotation of a row's name or of a safetensors file; `fields` are set where its method has them."""
    if name not in registry.rows() and Path(name).is_file():
        from dfrot_lab.recipe.specs import RotationSpec

        return RotationSpec(kind="file", path=name)
    if name not in registry.rows():
        names = ", ".join(registry.rows())
        raise ValueError(f"--rotation must be {names}, or an existing safetensors file; got {name!r}")
    spec = registry.spec_of(name, seed=seed, capture=capture)
    return spec.with_(**{key: value for key, value in fields.items() if key in type(spec).model_fields})


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
"""The application; the files of this room add their commands to it."""
