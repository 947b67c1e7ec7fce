"""`dfrot-lab cache`: what the store holds, whether it is whole, and what may go."""

import sys
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any

import typer

from dfrot_lab.cli.options import Options, command
from dfrot_lab.recipe import specs
from dfrot_lab.recipe.keys import model_key

group = typer.Typer(
    no_args_is_help=True, help="Look into the store, check it, clear it.", rich_markup_mode=None
)
KEEP_DAYS = 7.0  # how long what a stopped run left is kept: the same command goes on from it
DEAR = 60.0  # seconds of work that are not thrown away without --yes
SHOWN = ("key", "formulas", "inputs", "note", "created", "commit", "seconds", "versions", "files")
KEY = "A key of `cache list --keys`, or the start of one."
KEYS = "A line for each artefact in place of the sums."
REPAIR = "Set aside what is damaged: the next command that needs it makes it again."
OLDER = f"What was last changed more days ago; of what a stopped run left {KEEP_DAYS:g}, unless said."
KIND = "Artefacts of this kind."
KEEP_RESULTS = "All artefacts but evaluations, zero-shot accuracies and site losses."
EXPORT = "A file of JSON lines to write, or a folder that is there, for sixteen."
IMPORT = "What `cache export` wrote."
DRY_RUN, YES = "Only say what would go.", "Go on though it took long to make."


def _found() -> list[Any]:
    from dfrot_lab.disk import atomic, upkeep

    return list(upkeep.entries(atomic.cache_dir() / "store"))


def _model(value: Any) -> str | None:
    """The model's key in the inputs of an artefact, wherever it stands."""
    if not isinstance(value, Mapping):
        return None
    own = value.get("model", value.get("gguf"))
    return own if isinstance(own, str) else next(filter(None, map(_model, value.values())), None)


def model_names(entries: list[Any]) -> dict[str, str]:
    """Names of models by their keys: of the packaged ones, and of those that a recipe or a capture names."""
    from dfrot_lab.disk import downloads, upkeep

    names = dict[str, str]()
    for name, file in downloads.MODELS.items():
        of = file.sha256[:32]
        both = [model_key(of, dtype, device) for dtype in specs.DTYPES for device in specs.DEVICES[1:]]
        names |= dict.fromkeys([of, *both], name)
    for entry in entries:
        key = _model(entry.manifest.get("inputs"))
        said = {"evaluation": "recipe", "capture": "about"}.get(entry.kind)
        if entry.state == upkeep.DONE and key and key not in names and said:
            about = upkeep.note(entry, said)
            source = _at(about, "spec", "model", "source") or _at(about, "model", "source")
            names |= {key: PureWindowsPath(source).name} if source and isinstance(source, str) else {}
    return names


def _at(value: Any, *names: str) -> Any:
    """What lies under names in mappings in one another; None where there is no such place."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _name(entry: Any, names: Mapping[str, str]) -> str:
    """The model an artefact is of: by name, else by the start of its key."""
    key = _model(entry.manifest.get("inputs"))
    return names.get(key, key[:12]) if key else "of no model"


def _facts(entries: list[Any], **of: str) -> dict[str, Any]:
    days = [entry.days for entry in entries]
    sizes = {"count": len(entries), "MB": round(sum(entry.bytes for entry in entries) / 1e6, 3)}
    return {**of, **sizes, "days": f"{min(days):.1f} to {max(days):.1f}", "took": _took(entries)}


def _took(entries: list[Any]) -> str:
    """What entries took to make, in words. One that made another on its way counts that one too."""
    from dfrot_lab.study.cost import duration

    known = [entry.seconds for entry in entries if entry.seconds is not None]
    unknown = f"{len(entries) - len(known)} unknown" if len(known) < len(entries) else ""
    return " and ".join(filter(None, [duration(sum(known)) if known else "", unknown]))


@command("list", "as_json", group)
def list_command(said: Options, keys: Annotated[bool, typer.Option("--keys", help=KEYS)] = False) -> None:
    """Sizes, counts, ages and what it took to make them, by kind and by model."""
    from dfrot_lab.disk import atomic

    found = _found()
    names, groups = model_names(found), dict[tuple[str, ...], list[Any]]()
    for entry in [entry for entry in found if entry.state != "lock"]:
        place = (entry.kind, _name(entry, names), entry.words)
        groups.setdefault((*place, entry.key) if keys else place, []).append(entry)
    columns = ("kind", "model", "state", "key")
    rows = [_facts(same, **dict(zip(columns, place, strict=False))) for place, same in groups.items()]
    root = atomic.cache_dir()
    about: dict[str, Any] = {"folder": root / "store", "MB": sum(entry.bytes for entry in found) / 1e6}
    about["lock files"] = sum(entry.state == "lock" for entry in found)
    for name in ("downloads", "corpora"):
        about[f"{name}, MB"] = sum(p.stat().st_size for p in (root / name).rglob("*") if p.is_file()) / 1e6
    _show(said, rows, about)


@command("show", "as_json", group)
def show_command(said: Options, key: Annotated[str, typer.Argument(help=KEY)]) -> None:
    """What an artefact is: the inputs it is named by, files, sizes, when and by which code it was made."""
    found = _found()
    own = [entry for entry in found if key and entry.path.name.startswith(key) and entry.state != "lock"]
    keys = sorted({entry.key for entry in own})
    if len(keys) != 1:
        some = f"of {len(keys)}: {', '.join(keys[:5])}" if keys else "of none"
        raise ValueError(
            f"KEY must be the start of one key that `cache list --keys` shows; got {key!r}, {some}"
        )
    for entry in own:
        about = {"kind": entry.kind, "state": entry.words, "model": _name(entry, model_names(found))}
        about |= {"folder": entry.path, "MB": entry.bytes / 1e6, "took": _took([entry])}
        said.show_facts(about | {name: entry.manifest[name] for name in SHOWN if name in entry.manifest})


@command("verify", "as_json", group)
def verify_command(
    said: Options, repair: Annotated[bool, typer.Option("--repair", help=REPAIR)] = False
) -> None:
    """Read every file and compare it with its hash; exit code 1 if one differs. Nothing is set aside."""
    from tqdm.auto import tqdm

    from dfrot_lab.disk import upkeep

    whole = [entry for entry in _found() if entry.state == upkeep.DONE]
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "file": sys.stderr, "desc": "verify"}
    bad: dict[str, str] = {}
    with tqdm(total=sum(entry.bytes for entry in whole), **options) as bar:
        for entry in whole:
            name = f"{entry.kind}/{entry.key}"
            if wrong := upkeep.faults(entry, bar.update):
                done = repair and upkeep.repair(entry, f"{name}: {wrong[0]}")
                bad[name] = "; ".join(wrong) + (", set aside" if done else "")
    said.show_facts({"checked": len(whole), "damaged": len(bad), **bad})
    if bad:
        raise typer.Exit(1)


@command("prune", "as_json", group)
def prune_command(
    said: Options, older: Annotated[float | None, typer.Option(help=OLDER, min=0)] = None,
    kind: Annotated[str | None, typer.Option(help=KIND)] = None,
    keep_results: Annotated[bool, typer.Option("--keep-results", help=KEEP_RESULTS)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN)] = False,
    yes: Annotated[bool, typer.Option("--yes", help=YES)] = False,
) -> None:  # fmt: skip
    """Remove what was set aside, unheld locks and what stopped runs left a week ago; artefacts if --older,
    --kind or --keep-results chooses some. What a process is making stays; one that reads must read again."""
    from dfrot_lab.disk import upkeep

    found = _found()
    kinds = sorted({entry.kind for entry in found})
    if kind is not None and kind not in kinds:
        raise ValueError(f"--kind must be one of {', '.join(kinds) or 'nothing: it is empty'}; got {kind!r}")
    going = _chosen(found, older, kind, keep_results)
    made = [entry for entry in going if entry.state in (upkeep.DONE, upkeep.PARTIAL)]
    seconds, names = [entry.seconds for entry in made], model_names(found)
    cost = _took(made) if made else "nothing"
    if not (dry_run or yes) and (None in seconds or sum(filter(None, seconds)) > DEAR):
        what = f"{len(made)} artefacts, which would take about {cost} to make again"
        raise ValueError(f"--yes must be said to remove {what}; see --dry-run")
    groups, locks = dict[tuple[str, ...], list[Any]](), 0
    for entry, stays in [(entry, "") for entry in going] if dry_run else upkeep.remove(going):
        locks += entry.state == upkeep.LOCK and not stays
        if entry.state != upkeep.LOCK or (stays and stays != upkeep.HELD):
            state = f"{entry.words}, {stays}" if stays else entry.words
            groups.setdefault((entry.kind, _name(entry, names), state), []).append(entry)
    columns = ("kind", "model", "state")
    rows = [_facts(same, **dict(zip(columns, place, strict=True))) for place, same in groups.items()]
    waits = [entry for entry in found if entry.state == upkeep.PARTIAL and entry not in going]
    about = {"to make them again": cost, "lock files": locks}
    about["partial artefacts kept, to go on from"] = len(waits)
    if links := sum(entry.is_link for entry in going):
        about["links among them, whose folders stay where they are"] = links
    _show(said, rows, {"removed": "nothing: a dry run"} | about if dry_run else about)


def _chosen(found: list[Any], older: float | None, kind: str | None, keep_results: bool) -> list[Any]:
    """What a prune is to remove."""
    from dfrot_lab.disk import upkeep

    least = {upkeep.PARTIAL: KEEP_DAYS if older is None else older}
    if older is not None or kind is not None or keep_results:
        least[upkeep.DONE] = older or 0.0
    dead = {upkeep.ASIDE: 0.0, upkeep.LOCK: 0.0}
    own = [entry for entry in found if kind in (None, entry.kind) and entry.state in least | dead]
    kept = [entry for entry in own if keep_results and entry.kind in upkeep.RESULTS and entry.state in least]
    return [entry for entry in own if entry not in kept and entry.days >= (least | dead)[entry.state]]


def _show(said: Options, rows: list[dict[str, Any]], about: Mapping[str, Any]) -> None:
    import pandas as pd

    facts = [
        f"{name}: {f'{value:,.1f}' if isinstance(value, float) else value}" for name, value in about.items()
    ]
    table = pd.DataFrame(rows).to_string(index=False) if rows else "nothing"
    said.show({**about, "rows": rows}, "\n".join([table, "", *facts]))


@command("export", "as_json", group)
def export_command(said: Options, file: Annotated[Path, typer.Argument(help=EXPORT)]) -> None:
    """Write all evaluations of the store into a file, to be read into another machine's store."""
    from dfrot_lab.disk import upkeep
    from dfrot_lab.disk.artefacts import Store
    from dfrot_lab.score import exchange, perplexity

    keys = [entry.key for entry in _found() if entry.kind == perplexity.KIND and entry.state == upkeep.DONE]
    said.show_facts({"file": file, "evaluations": exchange.write(file, keys, Store())})


@command("import", "as_json", group)
def import_command(said: Options, file: Annotated[Path, typer.Argument(help=IMPORT)]) -> None:
    """Read the evaluations of a file that `cache export` wrote into this store; what it has stays."""
    from dfrot_lab.disk.artefacts import Store
    from dfrot_lab.score import exchange

    said.show_facts({"file": file, "new evaluations": exchange.read(file, Store())})
