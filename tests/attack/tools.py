"""Work in forks of one process that has imported what is heavy; what a case found; a tiny model to attack."""

import contextlib
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HANG = 10.0  # seconds of CPU after which a case counts as hanging
PATIENCE = 90.0  # seconds a case may take on a machine that is not quiet
FAULTS = ("lost", "wrong", "code run", "traceback", "hang", "not one line", "accepted")
"""How a case can fail: what was whole is gone; another value than the right one; a canary was written; a
traceback was shown; HANG; an error of several lines or none; exit code 0 for what is wrong."""


@dataclass(frozen=True)
class Outcome:
    """How a fork ended: exit code (negative: killed by that signal), what it printed, CPU and wall seconds."""

    code: int
    out: str
    err: str
    cpu: float
    seconds: float

    @property
    def hung(self) -> bool:
        return self.cpu > HANG or self.code == -signal.SIGALRM

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Running:
    """A function under way in a fork: its value is printed, an error shown as the interpreter shows it. `typed`
    stands on its standard input."""

    def __init__(self, function: Callable[[], object], typed: bytes = b"") -> None:
        self.files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        self.files[0].write(typed)
        self.files[0].seek(0)
        self.started = time.monotonic()
        self.child = os.fork()
        if not self.child:
            _run(function, *(file.fileno() for file in self.files))

    def kill(self) -> None:
        """Unless it has ended."""
        os.kill(self.child, signal.SIGKILL)

    def end(self) -> Outcome:
        """Wait for its end."""
        _, status, used = os.wait4(self.child, 0)
        out, err = (_read(file) for file in self.files[1:])
        for file in self.files:
            file.close()
        seconds = time.monotonic() - self.started
        return Outcome(os.waitstatus_to_exitcode(status), out, err, used.ru_utime + used.ru_stime, seconds)


def fork(function: Callable[[], object], *, typed: bytes = b"", kill_after: float | None = None) -> Outcome:
    """Run a function in a fork to its end; after `kill_after` seconds it is killed."""
    running = Running(function, typed)
    if kill_after is not None:
        time.sleep(kill_after)
        running.kill()
    return running.end()


def _read(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


def _run(function: Callable[[], object], *standard: int) -> None:
    code = 0
    try:
        for number, target in enumerate(standard):
            os.dup2(target, number)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(PATIENCE))
        value = function()
        if value is not None:
            print(value)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 it is shown, as the interpreter would
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@dataclass
class Report:
    """What one part of the campaign did: how many cases of which kind, and each fault with its case."""

    name: str
    cases: dict[str, int] = field(default_factory=dict)
    faults: list[tuple[str, str, str]] = field(default_factory=list)
    slowest: float = 0.0
    cpu: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.cases.values())

    def add(
        self, kind: str, case: str, outcome: Outcome | None = None, faults: Sequence[str] = (), said: str = ""
    ) -> None:
        """Count a case, and its faults."""
        self.cases[kind] = self.cases.get(kind, 0) + 1
        if outcome is not None:
            self.cpu += outcome.cpu
            self.slowest = max(self.slowest, outcome.cpu)
            faults = [*faults, *(["hang"] if outcome.hung and "hang" not in faults else [])]
            said = said or (outcome.err or outcome.out)[-400:].strip()
        for fault in faults:
            self.faults.append((fault, f"{kind}: {case}", said))
            print(f"    FAULT {fault}: {self.name}, {kind}: {case}\n      {said[-300:]}", flush=True)

    def count(self, fault: str) -> int:
        return sum(each == fault for each, _, _ in self.faults)


def refusal_faults(outcome: Outcome) -> list[str]:
    """What is wrong with how a command refused: it must end with a code that is not 0, and say one line."""
    if "Traceback (most recent call last)" in outcome.err + outcome.out:
        return ["traceback"]
    if outcome.code <= 0:  # negative: killed by a signal, such as for its time
        return [] if outcome.hung else ["accepted"]
    said = re.split(r"(?:^|\r)Error: ", outcome.err, maxsplit=1, flags=re.MULTILINE)
    return [] if len(said) == 2 and len(said[1].strip().splitlines()) == 1 else ["not one line"]


def command(*arguments: object) -> Callable[[], object]:
    """The command line with these arguments, as the installed script runs it."""

    def run() -> object:
        from dfrot_lab.cli.app import app

        sys.argv = ["dfrot-lab", *map(str, arguments)]
        return app()

    return run


@contextlib.contextmanager
def workplace(**variables: str) -> Iterator[Path]:
    """A folder to work in, with a cache of its own; environment and current folder are put back."""
    before, here = dict(os.environ), Path.cwd()
    with tempfile.TemporaryDirectory(prefix="attack-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ |= {"DFROT_LAB_CACHE": str(folder / "cache"), "DFROT_LAB_DEVICE": "cpu", **variables}
        os.environ.pop("DFROT_LAB_DATA", None)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ |= before


def text_file(path: Path, lines: int = 300) -> Path:
    """A text whose halves differ; a newline, the massive token of the tiny model, every few words."""
    path.write_text(
        "\n".join(f"{i} sheep and {i * 7 % 13} goats went over hill {i % 5};" for i in range(lines))
    )
    return path


def spread(many: int, wanted: int) -> list[int]:
    """At most `wanted` numbers of 0..many - 1, evenly."""
    return sorted({round(i * (many - 1) / max(1, wanted - 1)) for i in range(min(many, wanted))})


def warm() -> None:
    """Import what the cases need, so that their forks have it; nothing here may start a thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"MPLBACKEND": "agg", "TQDM_DISABLE": "1"}
    import gguf_writer  # noqa: F401
    import safetensors.torch  # noqa: F401
    import scipy.stats  # noqa: F401
    import transformers.core_model_loading
    import transformers.models.llama.modeling_llama
    import transformers.models.llama.tokenization_llama  # noqa: F401
    from tqdm import tqdm

    import dfrot_lab.cli.app
    import dfrot_lab.cli.doctor
    import dfrot_lab.score.zeroshot
    import dfrot_lab.show.gallery
    import dfrot_lab.show.report
    import dfrot_lab.study.compare  # noqa: F401

    tqdm.set_lock(
        threading.RLock()
    )  # its own is shared by forks: one that is killed with it stops all others
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
