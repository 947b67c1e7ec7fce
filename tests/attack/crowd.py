"""Many processes at once, writing and reading the same things, some of them killed: all who live end with the
right value, and so does who comes after them."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attack import corruptions, kills, tools
from attack.tools import Report, Running, fork
from dfrot_lab.disk import rotation_files, row_files
from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.maths import rotations
from dfrot_lab.recipe.specs import RotationSpec

PROCESSES = 10  # of one round
ROWS = 15  # of one process


@dataclass(frozen=True)
class Scene:
    """What `process` number n of a round does in a folder (it prints a value), and what may be wrong (`judge`: of
    what the living printed, and how many were killed) when all are gone."""

    name: str
    process: Callable[[Path, int], object]
    judge: Callable[[Path, list[Any], int], str]
    prepare: Callable[[Path], None] = lambda _folder: None


def _same(_folder: Path, printed: list[Any], _killed: int) -> str:
    return "" if len({json.dumps(value) for value in printed}) <= 1 else f"different values {printed}"


def _slowly(writer: Writer) -> None:
    for number in range(3):
        if not writer.has(f"part-{number}"):
            time.sleep(0.01)
            writer.save_json(f"part-{number}", [number] * 100)


def _make(folder: Path, _n: int) -> object:
    artefact = Store(folder / "store").get_or_make("work", {"a": 1}, _slowly)
    return json.dumps([artefact.json(name)[0] for name in artefact.names])


def _one_artefact(folder: Path, printed: list[Any], killed: int) -> str:
    after = json.loads(fork(lambda: _make(folder, 0)).out)
    return _same(folder, [*printed, after, [0, 1, 2]], killed)


def _append(folder: Path, n: int) -> object:
    for number in range(ROWS):
        row_files.append(
            folder / "rows.jsonl", [{"process": n, "row": number, "text": "x" * 5000} for _ in range(2)]
        )
    return json.dumps(True)


def _all_rows(folder: Path, printed: list[Any], _killed: int) -> str:
    table = row_files.load(folder / "rows.jsonl")
    counts = table.groupby("process")["row"].agg(["size", "nunique"])
    whole = int(((counts["size"] == 2 * ROWS) & (counts["nunique"] == ROWS)).sum())
    return (
        ""
        if whole >= len(printed) and set(table["text"]) == {"x" * 5000}
        else f"{whole} whole of {len(printed)} processes' rows"
    )


def _rotate(folder: Path, n: int) -> object:
    """Half write, half read."""
    path = folder / "R1.safetensors"
    for _ in range(10):
        if n % 2:
            rotation_files.save(rotations.make(RotationSpec(seed=n), 32), path, RotationSpec(seed=n))
        elif path.exists():
            rotation_files.load(path, 32)
    return json.dumps(True)


def _whole_rotation(folder: Path, _printed: list[Any], _killed: int) -> str:
    path = folder / "R1.safetensors"
    known = [rotations.make(RotationSpec(seed=n), 32) for n in range(PROCESSES)]
    return (
        ""
        if not path.exists() or any(rotation_files.load(path).equal(R) for R in known)
        else "another matrix"
    )


def _tables(folder: Path, n: int) -> object:
    for _ in range(3):
        if n % 2:
            kills._tables_write(folder, n)
        elif (folder / "text.txt").exists():
            kills._tables_look(folder)
    return json.dumps(True)


def _readable(folder: Path, _printed: list[Any], _killed: int) -> str:
    return (
        ""
        if not (folder / "text.txt").exists() or kills._tables_look(folder)["rows"] < 100
        else "rows of no process"
    )


def _digests(folder: Path, _n: int) -> object:
    return json.dumps([value for _ in range(5) for value in kills._digest_look(folder)])


def _convert(folder: Path, _n: int) -> object:
    kills._gguf_write(folder)
    return json.dumps(kills._gguf_look(folder))


def _evaluate(folder: Path, _n: int) -> object:
    return corruptions.value(folder)()


def _evaluation_prepare(folder: Path) -> None:
    """The model and the text, and an empty cache."""
    from conftest import tiny_model
    from gguf_writer import write_gguf

    write_gguf(folder / "tiny.gguf", tiny_model())
    tools.text_file(folder / "text.txt")


def _fetch(folder: Path, _n: int) -> object:
    kills._download_write(folder)
    return json.dumps(kills._download_look(folder))


def _nothing_left(folder: Path, printed: list[Any], killed: int) -> str:
    left = [path.name for path in folder.glob(".*.tmp")]
    return f"temporary files stay: {left}" if left and not killed else _same(folder, printed, killed)


SCENES = (
    Scene("one artefact", _make, _one_artefact),
    Scene("rows added to one file", _append, _all_rows),
    Scene("one rotation, written and read", _rotate, _whole_rotation),
    Scene("one table, written and read", _tables, _readable),
    Scene("digests", _digests, _same, kills._digest_prepare),
    Scene("one GGUF file converted", _convert, _same, kills._gguf_prepare),
    Scene("one evaluation", _evaluate, _same, _evaluation_prepare),
    Scene("one download", _fetch, _nothing_left, kills._download_prepare),
)


def attack(scene: Scene, place: Path, number: int, report: Report, chance: random.Random) -> None:
    """One round: all start together, a few are killed in every second round."""
    folder = place / f"round-{number}"
    folder.mkdir()
    scene.prepare(folder)
    begin = folder / "begin"

    def process(n: int) -> Callable[[], object]:
        def run() -> object:
            while not begin.exists():
                time.sleep(0.001)
            return scene.process(folder, n)

        return run

    crowd = [Running(process(n)) for n in range(PROCESSES)]
    begin.touch()
    victims = chance.sample(range(PROCESSES), 3) if number % 2 else []
    for victim in victims:
        time.sleep(chance.uniform(0, 0.15))
        crowd[victim].kill()
    ended = [running.end() for running in crowd]
    printed = [json.loads(outcome.out.strip().splitlines()[-1]) for outcome in ended if outcome.code == 0]
    wrong = scene.judge(folder, printed, len(victims))
    for n, outcome in enumerate(ended):
        bad = outcome.code != 0 and not outcome.killed
        faults = (["traceback"] if bad and "Traceback" in outcome.err else ["lost"] if bad else []) + (
            ["wrong"] if wrong and n == 0 else []
        )
        report.add(scene.name, f"process {n} of round {number}", outcome, faults, wrong or outcome.err[-300:])


def campaign(share: float = 1.0) -> Report:
    """Rounds of ten processes: 25 at full share."""
    report, chance = Report("concurrent processes"), random.Random(2)
    with tools.workplace() as place:
        for number in range(max(2, round(share * 25))):
            attack(SCENES[number % len(SCENES)], place, number, report, chance)
    print(f"  {report.total} processes, {len(report.faults)} faults", flush=True)
    return report
