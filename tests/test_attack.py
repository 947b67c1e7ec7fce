"""The campaign of `tests/attack/` in small, and that it would notice: a writer that leaves half a file, a wrong
value, code that runs, a hang.

The whole campaign is `make attack`; `docs/trust.md` has its table.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attack import crowd, hostile, tools
from attack.kills import Job, attack, old_or_new

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and kills as POSIX has them")


def test_a_small_campaign_finds_nothing():
    command = [sys.executable, "-m", "attack", "--share", "0.01"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0 and ", 0 faults;" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
    assert all(
        f"| {part}:" in done.stdout for part in ("kills", "corruptions", "bad inputs", "hostile models")
    )


def killed(job: Job, place: Path) -> tools.Report:
    report = tools.Report("kills")
    attack(job, place, report, 1.0, random.Random(0))
    return report


def put(folder: Path, text: str) -> None:
    """In place, in two goes."""
    with (folder / "value").open("w") as file:
        file.write(text[:3])
    with (folder / "value").open("a") as file:
        file.write(text[3:])


def replaced(folder: Path, text: str) -> None:
    put(folder, text)
    (folder / "value").rename(folder / "whole")


def read(folder: Path) -> str:
    return next(path.read_text() for name in ("whole", "value") if (path := folder / name).exists())


def test_a_writer_that_leaves_half_a_file_is_noticed(tmp_path: Path):
    """Before its second open the file is short, before the first it is as it was."""
    job = Job(
        "in place",
        lambda at: put(at, "before"),
        lambda at: put(at, "after!"),
        read,
        old_or_new,
        random_kills=1,
    )
    report = killed(job, tmp_path)
    assert (
        report.cases["kill before an operation"] >= 2
        and report.count("lost") == 1
        and not report.count("wrong")
    )


def test_a_writer_that_puts_whole_files_in_place_is_not(tmp_path: Path):
    def aside(folder: Path, text: str) -> None:
        (folder / "new").write_text(text)
        (folder / "new").replace(folder / "value")

    job = Job(
        "aside",
        lambda at: aside(at, "before"),
        lambda at: aside(at, "after!"),
        read,
        old_or_new,
        random_kills=1,
    )
    report = killed(job, tmp_path)
    assert report.total >= 3 and not report.faults


def test_a_run_that_does_not_end_with_the_right_value_is_noticed(tmp_path: Path):
    def once(folder: Path) -> None:
        """What is begun is never done again."""
        if not (folder / "begun").exists():
            (folder / "begun").touch()
            (folder / "value").write_text("after!")

    report = killed(
        Job("once", lambda at: put(at, "before"), once, read, old_or_new, random_kills=1), tmp_path
    )
    assert report.count("wrong") >= 1


@pytest.mark.parametrize(
    ("function", "faults"),
    [
        (lambda: sys.exit("Error: one line"), []),
        (lambda: 3, ["accepted"]),
        (lambda: sys.exit("Error: two\nlines"), ["not one line"]),
        (lambda: sys.exit(1), ["not one line"]),
        (lambda: [][1], ["traceback"]),
    ],
)
def test_how_a_command_refuses_is_judged(function, faults: list[str]):
    def run() -> object:
        try:
            return function()
        except SystemExit as error:
            if isinstance(error.code, str):
                sys.stderr.write(f"{error.code}\n")
            raise

    assert tools.refusal_faults(tools.fork(run)) == faults


def test_a_hang_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tools, "PATIENCE", 1)
    outcome = tools.fork(lambda: time.sleep(30))
    assert outcome.hung and outcome.seconds < 20
    report = tools.Report("x")
    report.add("sleep", "30 s", outcome)
    assert report.count("hang") == 1


def test_writers_of_one_file_do_not_trip_over_each_other(tmp_path: Path):
    """Each looks for what a killed writer left beside the file, and finds what others are about to put in place."""
    report = tools.Report("crowd")
    scene = next(scene for scene in crowd.SCENES if scene.name.startswith("one rotation"))
    for number in (0, 2):
        crowd.attack(scene, tmp_path, number, report, random.Random(0))
    assert report.total == 2 * crowd.PROCESSES and not report.faults


def test_the_canary_sings_where_code_is_run(tmp_path: Path):
    """By a reader of pickles, as the package has none."""
    folder = tmp_path / "model"
    folder.mkdir()
    hostile.pickled("weights.bin", without=False)(folder)
    script = f"import pickle; pickle.load(open({str(folder / 'weights.bin')!r}, 'rb'))"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert Path(hostile.canary_of(folder)).read_text() == "run"


def test_a_killed_fork_and_its_output_are_told_apart():
    outcome = tools.fork(lambda: (os.write(1, b"[1]\n"), time.sleep(30)), kill_after=2)
    assert outcome.killed and outcome.out == "[1]\n"
