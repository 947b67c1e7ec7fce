"""The mutants of `tests/mutation/` still fit the source, and the script that judges them tells killed from survived.

The whole run is `python tests/mutation/run.py`; `docs/trust.md` has its table.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutation import run

SCRIPT = Path(run.__file__)
MUTANTS = {mutant.name: mutant for mutant in run.table()}
QUICK = ("symmetric codes start at -7", "seed of a rotation ignored")


@pytest.mark.parametrize("name", MUTANTS)
def test_each_old_text_is_in_the_source_once_and_the_new_one_is_a_program(name: str):
    mutant = MUTANTS[name]
    compile(mutant.source(), mutant.file, "exec")
    assert mutant.why and mutant.tests


def test_there_are_enough_and_no_two_are_one():
    assert len(MUTANTS) == len(run.table()) >= 60
    assert len({mutant.source() for mutant in MUTANTS.values()}) == len(MUTANTS)


def test_the_tests_named_are_there():
    files = {test.partition("::")[0] for mutant in MUTANTS.values() for test in mutant.tests}
    assert files <= set(run.fast_files())


def test_a_text_that_is_there_twice_or_not_at_all_is_refused():
    mutant = next(iter(MUTANTS.values()))
    for old, found in (("no such text anywhere", "0"), ("return", "[0-9]{2}")):
        with pytest.raises(ValueError, match=f"must be in {mutant.file} once; found {found} times"):
            run.Mutant(mutant.name, mutant.file, old, "x", "", ()).source()


def test_two_mutants_are_killed_by_tests_that_pass_without_them():
    command = [
        sys.executable,
        str(SCRIPT),
        *(word for name in QUICK for word in ("--only", name)),
        "--jobs",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("2 of 2 mutants are killed", done.stdout)
    assert "test_quantize.py::" in done.stdout and "test_rotations.py::" in done.stdout


@pytest.fixture
def harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of one change that no test can see."""
    table = tmp_path / "mutants.toml"
    entry = {
        "name": "nothing",
        "file": "maths/rotations.py",
        "old": "/ math.sqrt(R.shape[0])",
        "new": "/ math.sqrt(len(R))",
    }
    lines = [f"{key} = '{value}'" for key, value in entry.items()]
    table.write_text("\n".join(["[[mutant]]", *lines, "why = 'equal'", 'tests = ["test_rotations.py"]']))
    monkeypatch.setenv("MUTANTS", str(table))


def test_a_survivor_is_named_and_is_an_error(harmless: None):
    command = [sys.executable, str(SCRIPT), "--own", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "0 of 1 mutants are killed" in done.stdout, done.stdout + done.stderr
    assert "survivors: nothing" in done.stdout and "SURVIVED: no test failed" in done.stdout
