"""What commands share: options and the specs they say, errors, output. Heavy imports wait until needed."""

import functools
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dfrot_lab.cli.errors import line_of, one_line
from dfrot_lab.recipe import grids, registry, specs
from dfrot_lab.recipe.base import require, require_file, strict_json

log = logging.getLogger("dfrot_lab")

ROTATION = "A row of the rotations listed by --help, or a safetensors or npy file with R1."
BITS = "Weights-activations-KV, such as 4-4-16."
RECIPE = (
    "A recipe's YAML, in place of all options but --out, --json; and --model, --corpus, --calibration, "
    "--rotation FILE, which say where it lies now."
)
SCORED = (
    "model corpus calibration seed out as_json windows window weights group_size acts prefix clips scales "
    "online kv gamma rule dtype"
)
"""The options of a command that takes one row: what a recipe needs, and where its result goes."""
MANY = "model corpus calibration seed out as_json windows builds window dtype workers scheduler"
"""The options of a command that computes tables of rows."""
OUT = "Where the result goes; the ending says the format."
SOURCES = f"{', '.join(specs.PACKAGED)}, a folder, a .gguf file, or hub:owner/name (the network)."
CORPORA = "auto, wikitext2, wikipedia-sample, or a text file."
CALIBRATION = "A text file to capture, refine and calibrate on, whole; default: the other half of --corpus."
TOKENS = "Tokens to record: up to 2048, or a multiple of it; default: a window."
RULES = f"What makes a row massive: {', '.join(specs.MASSIVE_RULES)}."
DTYPES = f"What is computed in: {', '.join(specs.DTYPES)}; auto: float32 on a CPU, the weights' own on a GPU."
BUILDS = "Builds a comparison is made of (seed, sample, jitter, windows); default: 7, sweeps fewer."
CLIPS = "Give each site the clip ratio of least error on the calibration text."
SCALES = "Fold channel scales into the weights, those of least error on the calibration text."
ONLINE = "Which online Hadamards act: both (R3 and R4), R3, R4 or none, as where nothing runs beside weights."
KV = "A quantizer of the KV cache listed by --help."
GROUP = "Weights have a scale for so many inputs, which must divide all of the model's; default: a row's."
ACTS = "Activations: a scale a token, for so many channels such as 64, a site (static), or mxfp4, nvfp4."
PREFIX = "Put before every window the tokens that massive values gather on, their keys and values in float."
WORKERS = "Rows side by side, in so many processes that share the cores; 1: one after the other."
SCHEDULER = "Address of a Dask scheduler whose workers compute the rows, such as tcp://host:8786."
JSON = "Print JSON and nothing else on standard output."


def _require_place(path: Path) -> None:
    """Refuse an --out that no file can be written to; ValueError."""
    place = next(folder for folder in path.absolute().parents if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"--out must be where files can be written; {place} is not, got {path}")


@dataclass(frozen=True)
class Options:
    """The options that commands share, with their defaults, and the specs that they say together."""

    model: Annotated[str, typer.Option(help=SOURCES)] = specs.DEFAULT_MODEL
    corpus: Annotated[str, typer.Option(help=CORPORA)] = "auto"
    calibration: Annotated[str | None, typer.Option(help=CALIBRATION)] = None
    seed: Annotated[int, typer.Option(help="Seed of the random rotations.", min=0)] = 0
    out: Annotated[Path | None, typer.Option(help=OUT)] = None
    as_json: Annotated[bool, typer.Option("--json", help=JSON)] = False
    tokens: Annotated[int | None, typer.Option(help=TOKENS)] = None
    windows: Annotated[int, typer.Option(help="Windows to score, in each build.")] = specs.WINDOWS
    builds: Annotated[int | None, typer.Option(help=BUILDS, min=1)] = None
    window: Annotated[int, typer.Option(help="Tokens of a window, to score and to calibrate on.")] = 2048
    gamma: Annotated[float, typer.Option(help="Weight of massive rows; inf fits them alone.")] = 100.0
    rule: Annotated[str, typer.Option(help=RULES)] = specs.DEFAULT_RULE
    weights: Annotated[str, typer.Option(help="A weight quantizer listed by --help.")] = "gptq"
    group_size: Annotated[int | None, typer.Option(help=GROUP, min=1)] = None
    acts: Annotated[str, typer.Option(help=ACTS)] = "token"
    prefix: Annotated[bool, typer.Option("--prefix", help=PREFIX)] = False
    dtype: Annotated[str, typer.Option(help=DTYPES)] = "auto"
    clips: Annotated[bool, typer.Option("--clips", help=CLIPS)] = False
    scales: Annotated[bool, typer.Option("--scales", help=SCALES)] = False
    online: Annotated[str, typer.Option(help=ONLINE)] = "both"
    kv: Annotated[str, typer.Option(help=KV)] = grids.PER_TOKEN
    workers: Annotated[int, typer.Option(help=WORKERS, min=1)] = 1
    scheduler: Annotated[str | None, typer.Option(help=SCHEDULER)] = None

    @property
    def model_spec(self) -> specs.ModelSpec:
        """The model in its dtype."""
        return specs.ModelSpec(source=self.model, dtype=self.dtype)

    @property
    def capture(self) -> specs.CaptureSpec:
        """The capture of the text to calibrate on."""
        text = specs.calibration_of(self.corpus, self.calibration)
        tokens = min(self.window, specs.WINDOW) if self.tokens is None else self.tokens
        return specs.CaptureSpec(model=self.model_spec, corpus=text, tokens=tokens)

    def setting(self, **more: Any) -> Any:
        """The setting of the main job and the experiments; `more` are further fields of it."""
        from dfrot_lab.study.setting import Setting

        names = ("corpus", "calibration", "seed", "windows", "builds", "window", "gamma", "rule")
        same = {name: getattr(self, name) for name in names}
        return Setting(model=self.model_spec, **same, **more)

    def rotation(self, name: str, **fields: Any) -> Any:
        """The rotation of a row's name, with those of gamma, rule and `fields` it has, or of a file."""
        if Path(name).is_file() and name not in registry.rows():
            return specs.RotationSpec(kind="file", path=name)
        row, dash, block = name.partition("-b")
        if row not in registry.rows() or bool(dash) != block.isdecimal():
            rule = f"{', '.join(registry.rows())}, one in blocks such as RH-b64, or a safetensors file"
            raise ValueError(f"--rotation must be {rule}; got {name!r}")
        spec = registry.spec_of(row, seed=self.seed, capture=self.capture)
        if block:
            spec = spec.with_(block=int(block))
        fields = {"gamma": self.gamma, "rule": self.rule, **fields}
        return spec.with_(**{key: value for key, value in fields.items() if key in type(spec).model_fields})

    def recipe(self, rotation: str, bits: str) -> specs.Recipe:
        """The recipe of a rotation at some bits, weights calibrated on the text's other half."""
        text, method = specs.CorpusSpec(name=self.corpus), self.rotation(rotation)
        parts = {"model": self.model_spec, "corpus": text, "rotation": method, "windows": self.windows}
        spec = specs.recipe_of(bits, weights=self.weights, window=self.window, **parts)
        shared = {"granularity": "per_group", "group_size": self.group_size} if self.group_size else {}
        grid = spec.weights.quantizer.with_(**shared)
        weights = spec.weights.with_(corpus=self.capture.corpus, window=self.window, quantizer=grid)
        clips, scales = (self.capture if asked else None for asked in (self.clips, self.scales))
        own = {"weights": weights, "clips": clips, "scales": scales, "online": self._online()}
        before = specs.prefix_on(self.capture.corpus, self.window) if self.prefix else None
        own |= self._acts(spec.activations) | self._cache(spec.keys.bits)
        return spec.with_(**own, prefix=before)

    def _acts(self, grid: grids.QuantSpec) -> dict[str, Any]:
        """The fields of a recipe, whose activations have this grid, that --acts says; ValueError."""
        if self.acts == "token":
            return {}
        if self.acts in grids.BLOCK_FLOATS:
            return {"activations": grids.of_scheme(self.acts, grid.bits)}
        if self.acts == "static":
            text = specs.StaticSpec(corpus=self.capture.corpus, window=self.window)
            return {"activations": grid.with_(granularity="static"), "static": text}
        is_size = self.acts.isascii() and self.acts.isdecimal() and int(self.acts) > 0
        require("--acts", self.acts, is_size, "token, static, mxfp4, nvfp4, or so many channels such as 64")
        return {"activations": grid.with_(granularity="per_group", group_size=int(self.acts))}

    def _online(self) -> str | None:
        """What a recipe calls --online; ValueError."""
        require("--online", self.online, self.online in ("both", *specs.ONLINE), "both, R3, R4 or none")
        return None if self.online == "both" else self.online

    def _cache(self, bits: int) -> dict[str, grids.QuantSpec]:
        """The keys and values of --kv at `bits`; ValueError."""
        names = (grids.PER_TOKEN, *registry.CACHES)
        require("--kv", self.kv, self.kv in names, f"one of {', '.join(names)}")
        rule = f"{grids.PER_TOKEN} with a KV cache of 16 bits, which nothing rounds"
        require("--kv", self.kv, bits < 16 or self.kv == grids.PER_TOKEN, rule)
        return grids.cache_of(self.kv, bits, seed=self.seed)

    def whole_recipe(
        self, context: typer.Context, path: Path | None, rotation: str, bits: str, beside: Sequence[str] = ()
    ) -> specs.Recipe:
        """The recipe in a file, with which no option may be said but --out, --json, those `beside` and where
        what it names lies; or that of a rotation at some bits. ValueError."""
        if path is None:
            return self.recipe(rotation, bits)
        from dfrot_lab.model import public

        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
        places = [name for name in public.FIELDS if name in given]
        if others := given - {"recipe", "out", "as_json", *beside, *places}:
            raise ValueError(f"--recipe says everything: put {', '.join(sorted(others))} into {path} instead")
        return public.found(specs.Recipe.from_yaml(path), {name: context.params[name] for name in places})

    def side_by_side(self) -> AbstractContextManager[None]:
        """The block in which rows are computed as --workers and --scheduler say."""
        if self.workers == 1 and self.scheduler is None:
            return nullcontext()
        from dfrot_lab.score import sweep

        return sweep.side_by_side(self.workers, self.scheduler)

    def file(self, default: str, *endings: str) -> Path:
        """--out, or `default`, to be written as one file of one of `endings`; ValueError, before any work."""
        path = self.out or Path(default)
        if path.is_dir():
            raise ValueError(f"--out must be a file; {path} is a folder. Say for example {path / default}")
        require_file("--out", path, or_none=True)
        if endings and path.suffix not in endings:
            raise ValueError(f"--out must be a file ending in {' or '.join(endings)}; got {path}")
        _require_place(path)
        return path

    def require_table(self) -> None:
        """Refuse, before work, an --out that no table can be written as; ValueError."""
        from dfrot_lab.disk import row_files

        if self.out:
            row_files.require_table(self.out)
            _require_place(self.out)

    def quickened(self, setting: Any) -> Any:
        """A setting as the quick profile has it, but for what was said otherwise than by default."""
        from dfrot_lab.study.setting import QUICK

        said = {name for name in QUICK if getattr(self, name, None) != getattr(Options, name, None)}
        return setting.with_(**{name: value for name, value in QUICK.items() if name not in said})

    def show(self, value: Any, text: str) -> None:
        """On standard output: `value` as indented JSON with --json, else `text`."""
        typer.echo(strict_json(value) if self.as_json else text)

    def show_table(
        self, table: Any, about: Mapping[str, Any], kept: Any = None, most: int | None = 30
    ) -> None:
        """A pandas table, at `most` so many rows of it, and facts; the table `kept` goes to --out."""
        from dfrot_lab.disk import row_files

        if self.out and kept is not None:
            row_files.write_table(kept, self.out)
        facts = [f"{name}: {value}" for name, value in about.items() if value is not None]
        text = "\n".join([table.to_string(index=False, max_rows=most), "", *facts])
        self.show({**about, "rows": row_files.rows(table)} if self.as_json else None, text)

    def show_facts(self, about: Mapping[str, Any], out: Path | None = None) -> None:
        """Named facts; with `out` also as a JSON file."""
        from dfrot_lab.disk.atomic import write_text

        if out:
            write_text(out, strict_json(about) + "\n")
        lines = []
        for name, value in about.items():
            parts = [f"  {k}: {v}" for k, v in value.items()] if isinstance(value, Mapping) else []
            lines += [f"{name}: {'' if parts else value}".rstrip(), *parts]
        self.show(about, "\n".join(lines))


class Group(typer.core.TyperGroup):
    """The commands; below them, what can be chosen by name."""

    def format_epilog(self, _ctx: Any, formatter: Any) -> None:
        """List rotations, quantizers and families as the tables have them now."""
        from dfrot_lab.model.families import FAMILIES

        methods = (f"{name} ({', '.join(choice.rows)})" for name, choice in registry.METHODS.items())
        lists = {"Rotations": methods, "Weights": registry.WEIGHTS, "Families": FAMILIES}
        lists["KV"] = (grids.PER_TOKEN, *registry.CACHES)
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
        except Exception as error:
            if hasattr(error, "exit_code"):  # click's own, as of usage
                error.__dict__["message"] = one_line(str(getattr(error, "message", "")))
                raise
            if log.isEnabledFor(logging.DEBUG):
                raise
            typer.echo(f"Error: {one_line(line_of(error))}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False)  # fmt: skip


def command(
    name: str, options: str, group: typer.Typer = app
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function as a command: its first argument are shared options, the others options of its own."""
    fields, kind = Options.__dataclass_fields__, inspect.Parameter.POSITIONAL_OR_KEYWORD
    taken = [fields[option] for option in options.split()]
    shared = [inspect.Parameter(f.name, kind, default=f.default, annotation=f.type) for f in taken]

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**said: Any) -> None:
            options = Options(**{field.name: said.pop(field.name) for field in taken})
            with options.side_by_side():
                function(options, **said)

        own = list(inspect.signature(function).parameters.values())[1:]
        needed = sorted([*shared, *own], key=lambda each: each.default is not each.empty)
        run.__dict__["__signature__"] = inspect.Signature(needed)
        return group.command(name)(run)

    return add
