"""Do the tests see it? Each mutant of `mutants.toml`, one change of the core that matters, is put into a copy of
the package, and the fast tests run against the copy: a mutant whose tests all pass has survived.

    python tests/mutation/run.py [--only NAME] [--jobs 2] [--docs]

The heavy libraries are imported once and every run is a fork of that process. A kill counts if the tests could
be collected and if the test that failed passes on the package as it is; a test that takes longer than LIMIT
has failed. Nothing is changed outside a temporary folder, but `docs/trust.md` with --docs.
"""

import argparse
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(os.environ.get("MUTANTS", Path(__file__).with_name("mutants.toml")))
PAGE, BEGIN, END = ROOT / "docs" / "trust.md", "<!-- mutants: begin -->", "<!-- mutants: end -->"
LIMIT, LIMIT_OF_ALL = 120, 900  # seconds of one test; of all tests of one mutant
MARKS = "not model and not second_model and not notebook and not browser"
SLOW = ("notebooks", "browser", "default_model", "second_model", "device", "project", "layers", "unmarked")
SLOW += ("mutation", "attack", "wheels", "site", "claims")
"""Test files that need a model, a browser, a GPU, or look at documents or at the tests themselves."""
HEAVY = (
    "_hypothesis_pytestplugin datasets filelock gguf hypothesis jinja2 matplotlib.pyplot mwparserfromhell numpy pandas psutil pydantic pytest "
    "rich safetensors.torch scipy.integrate scipy.optimize scipy.special scipy.stats tokenizers torch tqdm.auto "
    "transformers transformers.models.llama.modeling_llama transformers.integrations.sdpa_attention typer xxhash "
    "yaml transformers.models.auto.modeling_auto transformers.core_model_loading typer.testing"
)
LINKED = (
    ".gitignore",
    "README.md",
    "pyproject.toml",
    "docs",
    "data",
    "figures",
    "notebooks",
    "Makefile",
    "requirements.txt",
)


@dataclass(frozen=True)
class Mutant:
    """In `file` of the package `old`, which is there once, becomes `new`; `tests` are run first."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]

    def source(self) -> str:
        """The file with the change. ValueError: `old` is not there exactly once, or nothing changes."""
        text = (ROOT / "dfrot_lab" / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1 or self.old == self.new:
            raise ValueError(
                f"mutant {self.name}: its old text must be in {self.file} once; found {found} times"
            )
        return text.replace(self.old, self.new)


def table() -> list[Mutant]:
    """The mutants of the table, in its order."""
    entries = tomllib.loads(TABLE.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def fast_files() -> list[str]:
    """The test files that a survivor is shown last."""
    names = (path.name for path in sorted((ROOT / "tests").glob("test_*.py")))
    return [name for name in names if name[5:-3] not in SLOW]


class Watch:
    """A pytest plugin: which test failed first, and how many ran."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.uncollected: list[str] = []
        self.passed = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        def late(*_: object) -> None:
            raise TimeoutError(f"{item.nodeid} takes longer than {LIMIT} s")

        signal.signal(signal.SIGALRM, late)
        signal.alarm(LIMIT)
        try:
            return (yield)
        finally:
            signal.alarm(0)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.uncollected += [report.nodeid] if report.failed else []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += [report.nodeid] if report.failed and report.nodeid not in self.failed else []
        self.passed += report.passed and report.when == "call"


@dataclass(frozen=True)
class Ran:
    """What tests said: which failed, which files could not be collected, how many passed, CPU seconds."""

    failed: tuple[str, ...]
    uncollected: tuple[str, ...]
    passed: int
    cpu: float


def copy(folder: Path, mutant: Mutant | None) -> None:
    """The package and its tests, in `folder`, with the mutant's change."""
    for name in ("dfrot_lab", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "artefacts"))
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    if mutant is not None:
        (folder / "dfrot_lab" / mutant.file).write_text(mutant.source(), encoding="utf-8")


def run_tests(folder: Path, tests: Sequence[str], *more: str) -> Ran:
    """Run test files (or tests) of the copy in `folder`, in a fork of this process."""
    answer, log = folder / "answer.json", folder / "log.txt"
    answer.unlink(missing_ok=True)
    if not (child := os.fork()):
        try:
            os.setsid()
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
            _child(folder, [f"tests/{test}" for test in tests], more, answer)
        except BaseException:
            log.write_text(traceback.format_exc())
            raise
        finally:
            os._exit(0)
    until = time.monotonic() + LIMIT_OF_ALL
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.05)
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            until += LIMIT_OF_ALL
    if not answer.exists():
        raise RuntimeError(f"the tests gave no answer: {log.read_text(errors='replace')[-2000:]}")
    said = json.loads(answer.read_text())
    return Ran(tuple(said["failed"]), tuple(said["uncollected"]), said["passed"], said["cpu"])


def _child(folder: Path, tests: list[str], more: Sequence[str], answer: Path) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ |= {"PYTHONPATH": str(folder), "DFROT_LAB_CACHE": str(folder / "cache")}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # that of notebooks alone takes 3 s
    watch = Watch()
    plugins = ["-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider"]
    options = ["-q", *plugins, "--hypothesis-seed=0", "-m", MARKS, "--tb=short"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is there before pytest
    pytest.main([*options, f"--basetemp={folder / 'tmp'}", *more, *tests], plugins=[watch])
    if not sys.modules["dfrot_lab"].__file__.startswith(str(folder.resolve())):  # type: ignore[union-attr]
        raise RuntimeError(f"another package was tested: {sys.modules['dfrot_lab'].__file__}")
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = sum(used.ru_utime + used.ru_stime for used in (own, others))
    said = {"failed": watch.failed, "uncollected": watch.uncollected, "passed": watch.passed, "cpu": seconds}
    answer.write_text(json.dumps(said))


@dataclass(frozen=True)
class Verdict:
    """Of a mutant: the test that killed it (empty: it survived), what else there is to say, CPU seconds."""

    mutant: Mutant
    killer: str = ""
    note: str = ""
    cpu: float = 0.0


def judge(mutant: Mutant, own: bool) -> Verdict:
    """Show a mutant to its own tests, then (unless to its `own` alone) to all other fast ones, until one fails."""
    cpu, others = 0.0, [test for test in fast_files() if test not in mutant.tests]
    with tempfile.TemporaryDirectory(prefix="mutant-") as place:
        copy(folder := Path(place), mutant)
        # one by one: of a file and a test in it pytest would run the file, in its own order
        for tests in (*((test,) for test in mutant.tests), *([] if own else [others])):
            found = run_tests(folder, tests, "-x")
            cpu += found.cpu
            if found.uncollected:
                return Verdict(mutant, note=f"{found.uncollected[0]} cannot be collected", cpu=cpu)
            if found.failed:
                return Verdict(mutant, found.failed[0], cpu=cpu)
    return Verdict(mutant, note="no test failed", cpu=cpu)


def wrongly_killed(killers: Sequence[str]) -> tuple[set[str], float]:
    """Of tests that killed, those that fail on the package as it is; and CPU seconds."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as place:
        copy(folder := Path(place), None)
        found = run_tests(folder, [killer.removeprefix("tests/") for killer in killers])
    if found.passed + len(found.failed) < len(killers):
        raise RuntimeError(f"{len(killers)} tests killed, and {found.passed + len(found.failed)} of them ran")
    return set(found.failed) | set(found.uncollected), found.cpu


def judge_all(mutants: Sequence[Mutant], jobs: int, own: bool) -> tuple[list[Verdict], float]:
    """The verdicts in the mutants' order, and CPU seconds; a line about each as it comes."""
    started, verdicts = time.monotonic(), dict[str, Verdict]()
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(judge, mutant, own) for mutant in mutants]):
            verdict = done.result()
            verdicts[verdict.mutant.name] = verdict
            left = (time.monotonic() - started) / len(verdicts) * (len(mutants) - len(verdicts))
            said = f"killed by {verdict.killer}" if verdict.killer else f"SURVIVED: {verdict.note}"
            place = f"{len(verdicts)} of {len(mutants)}, about {left / 60:.0f} min left"
            print(f"[{place}] {verdict.mutant.name}: {said} ({verdict.cpu:.0f} s CPU)", flush=True)
    killers = sorted({verdict.killer for verdict in verdicts.values()} - {""})
    wrong, cpu = wrongly_killed(killers) if killers else (set[str](), 0.0)
    found = [verdicts[mutant.name] for mutant in mutants]
    fair = [
        Verdict(v.mutant, note=f"{v.killer} fails without it too", cpu=v.cpu) if v.killer in wrong else v
        for v in found
    ]
    return fair, cpu + sum(v.cpu for v in found)


def page(verdicts: Sequence[Verdict], said: str) -> str:
    """The table for the documentation."""
    lines = ["| mutant | what it changes | seen by |", "|---|---|---|"]
    for verdict in verdicts:
        killer = verdict.killer.removeprefix("tests/").replace("|", "\\|")
        seen = f"`{killer}`" if killer else f"**not seen**: {verdict.note}"
        lines.append(f"| {verdict.mutant.name} (`{verdict.mutant.file}`) | {verdict.mutant.why} | {seen} |")
    return "\n".join([said, "", *lines])


def write_page(text: str) -> None:
    """Put the table in its place in `docs/trust.md`."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def warm() -> None:
    """Import what every run needs, so that a fork has it; nothing here may start a thread or compute."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"MPLBACKEND": "agg", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    for name in HEAVY.split():
        importlib.import_module(name)
    gc.freeze()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if no mutant survived."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="these mutants alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants judged at once")
    parser.add_argument("--own", action="store_true", help="show survivors no other tests than their own")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/trust.md")
    given = parser.parse_args(arguments)
    mutants = [mutant for mutant in table() if not given.only or mutant.name in given.only]
    if unknown := set(given.only) - {mutant.name for mutant in mutants}:
        parser.error(f"no mutant {min(unknown)!r}; there are {', '.join(mutant.name for mutant in table())}")
    if given.docs and (given.only or given.own):
        parser.error("--docs writes the table of all mutants, shown to all tests: leave out --only and --own")
    for mutant in mutants:
        mutant.source()
    started = time.monotonic()
    warm()
    verdicts, cpu = judge_all(mutants, given.jobs, given.own)
    survived = [verdict.mutant.name for verdict in verdicts if not verdict.killer]
    said = f"{len(mutants) - len(survived)} of {len(mutants)} mutants are killed"
    took = f"{time.monotonic() - started:.0f} s with {given.jobs} jobs, {cpu:.0f} s of CPU"
    print(f"{said} ({took}); survivors: {', '.join(survived) or 'none'}")
    if given.docs:
        write_page(page(verdicts, f"{said} ({took})."))
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main())
