"""What commands share: options and the specs they say, errors, output. Heavy imports wait until needed."""

import functools
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dfrot_lab.recipe import registry, specs
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec

log = logging.getLogger("dfrot_lab")

OUT = "Where the result goes; the ending says the format."
SOURCES = "smollm2-135m, a folder, a .gguf file, or hub:owner/name (the network)."
CORPORA = "auto, wikitext2, wikipedia-sample, or a text file."
RULES = f"What makes a row massive: {', '.join(specs.MASSIVE_RULES)}."
DTYPES = f"What weights are computed in: {', '.join(specs.DTYPES)}."
JSON = "Print JSON and nothing else on standard output."


@dataclass(frozen=True)
class Options:
    """The options that commands share, with their defaults, and the specs that they say together."""

    model: Annotated[str, typer.Option(help=SOURCES)] = specs.DEFAULT_MODEL
    corpus: Annotated[str, typer.Option(help=CORPORA)] = "auto"
    seed: Annotated[int, typer.Option(help="Seed of the random rotations.", min=0)] = 0
    out: Annotated[Path | None, typer.Option(help=OUT)] = None
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False
    tokens: Annotated[int, typer.Option(help="Tokens to record: up to 2048, or a multiple of it.")] = 2048
    windows: Annotated[int, typer.Option(help="Evaluation windows of 2048 tokens.")] = 6
    gamma: Annotated[float, typer.Option(help="Weight of massive rows; inf fits them alone.")] = 100.0
    rule: Annotated[str, typer.Option(help=RULES)] = specs.DEFAULT_RULE
    weights: Annotated[str, typer.Option(help="A weight quantizer listed by --help.")] = "gptq"
    dtype: Annotated[str, typer.Option(help=DTYPES)] = "float32"

    @property
    def model_spec(self) -> ModelSpec:
        """The model in its dtype."""
        return ModelSpec(source=self.model, dtype=self.dtype)

    @property
    def capture(self) -> specs.CaptureSpec:
        """The capture of the text's calibration half."""
        text = CorpusSpec(name=self.corpus, split="calibration")
        return specs.CaptureSpec(model=self.model_spec, corpus=text, tokens=self.tokens)

    def setting(self, **more: Any) -> Any:
        """The setting of the main job and the experiments; `more` are further fields of it."""
        from dfrot_lab.study.setting import Setting

        same = {name: getattr(self, name) for name in ("corpus", "seed", "windows", "gamma", "rule")}
        return Setting(model=self.model_spec, **same, **more)

    def rotation(self, name: str, **fields: Any) -> Any:
        """The rotation of a row's name, with those of gamma, rule and `fields` it has, or of a file."""
        names = registry.rows()
        if name not in names:
            if Path(name).is_file():
                return specs.RotationSpec(kind="file", path=name)
            rule = f"{', '.join(names)}, or an existing safetensors file"
            raise ValueError(f"--rotation must be {rule}; got {name!r}")
        spec = registry.spec_of(name, seed=self.seed, capture=self.capture)
        fields = {"gamma": self.gamma, "rule": self.rule, **fields}
        return spec.with_(**{key: value for key, value in fields.items() if key in type(spec).model_fields})

    def recipe(self, rotation: str, bits: str) -> specs.Recipe:
        """The recipe of a rotation at some bits, weights calibrated on the text's other half."""
        text, method = CorpusSpec(name=self.corpus), self.rotation(rotation)
        parts = {"model": self.model_spec, "corpus": text, "rotation": method, "windows": self.windows}
        spec = specs.recipe_of(bits, weights=self.weights, **parts)
        return spec.with_(weights=spec.weights.with_(corpus=self.capture.corpus))


class Group(typer.core.TyperGroup):
    """The commands; below them, what can be chosen by name."""

    def format_epilog(self, _ctx: Any, formatter: Any) -> None:
        """List rotations, weight quantizers and families as the tables have them now."""
        from dfrot_lab.model.families import FAMILIES

        methods = (f"{name} ({', '.join(choice.rows)})" for name, choice in registry.METHODS.items())
        lists = {"Rotations": methods, "Weights": registry.WEIGHTS, "Families": FAMILIES}
        lists["Rules"] = specs.MASSIVE_RULES
        with formatter.section("What can be chosen"):
            formatter.write_dl([(title, ", ".join(names)) for title, names in lists.items()])

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what a user can mend becomes a line and exit code 1, Ctrl-C a kept promise."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            typer.echo("Stopped. What is finished is kept: the same command goes on from here.", err=True)
            raise typer.Exit(130) from None
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            if log.isEnabledFor(logging.DEBUG):
                raise
            typer.echo(f"Error: {error.args[0] if isinstance(error, KeyError) else error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Group, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    pretty_exceptions_enable=False,
)  # fmt: skip
"""The application; the files of this room add their commands to it."""


def command(name: str, options: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function as a command: its first argument are shared options, the others options of its own."""
    fields, kind = Options.__dataclass_fields__, inspect.Parameter.POSITIONAL_OR_KEYWORD
    taken = [fields[option] for option in options.split()]
    shared = [inspect.Parameter(f.name, kind, default=f.default, annotation=f.type) for f in taken]

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**said: Any) -> None:
            function(Options(**{field.name: said.pop(field.name) for field in taken}), **said)

        own = list(inspect.signature(function).parameters.values())[1:]
        run.__dict__["__signature__"] = inspect.Signature([*shared, *own])
        return app.command(name)(run)

    return add


def show_json(value: Any) -> None:
    """A value as indented JSON on standard output."""
    typer.echo(json.dumps(value, indent=1, default=str))


def show_table(table: Any, as_json: bool, about: Mapping[str, Any]) -> None:
    """A pandas table and facts about it on standard output."""
    from dfrot_lab.disk import row_files

    if as_json:
        show_json({**about, "rows": row_files.rows(table)})
    else:
        typer.echo(table.to_string(index=False, max_rows=30))
        typer.echo("\n" + "\n".join(f"{name}: {value}" for name, value in about.items() if value is not None))


def show_facts(about: Mapping[str, Any], as_json: bool, out: Path | None = None) -> None:
    """Named facts on standard output; with `out` also as a JSON file."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(about, indent=1, default=str) + "\n", encoding="utf-8")
    if as_json:
        show_json(about)
        return
    for name, value in about.items():
        lines = [f"  {k}: {v}" for k, v in value.items()] if isinstance(value, Mapping) else []
        typer.echo("\n".join([f"{name}: {'' if lines else value}".rstrip(), *lines]))
