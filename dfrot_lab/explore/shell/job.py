"""Work off the kernel's thread: it can be paused and cancelled, or give way to the newest wish."""

import logging
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

EXPECTED = (ValueError, KeyError, TypeError, RuntimeError, OSError, ImportError)
"""Errors whose message is for the reader; anything else is a defect and keeps its traceback."""


class Cancelled(Exception):
    """Raised inside a job's work at its next step once it is cancelled."""


class Overtaken(Exception):
    """Raised inside the work at its next step once there is a newer wish."""


class Job:
    """`start(work)` runs `work(job)` in a thread, which calls `job.step()` between its parts.

    `step` waits while the job is paused and raises Cancelled once it is cancelled. At the end `on_done` is
    called with None or the error, in the same thread; the job no longer counts as running then.
    """

    def __init__(self, on_done: Callable[[BaseException | None], None] = lambda _error: None) -> None:
        self.on_done, self.running = on_done, False
        self._go, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def paused(self) -> bool:
        """Whether it waits for `resume`."""
        return self.running and not self._go.is_set()

    def start(self, work: Callable[["Job"], None]) -> None:
        """Run `work` in a thread; RuntimeError while the last one still runs."""
        if self.running:
            raise RuntimeError("one job at a time: cancel the one that runs, or wait for it")
        self.wait()  # one that has ended may still be in `on_done`
        self.running = True
        self._go.set()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=[work], daemon=True)
        self._thread.start()

    def _run(self, work: Callable[["Job"], None]) -> None:
        error: BaseException | None = None
        try:
            work(self)
        except Cancelled as cancelled:
            error = cancelled
        except EXPECTED as expected:
            log.debug("shown in the explorer", exc_info=True)
            error = expected
        finally:
            self.running = False
        self.on_done(error)

    def step(self) -> None:
        """Between two parts of the work."""
        self._go.wait()
        if self._stop.is_set():
            raise Cancelled("cancelled")

    def pause(self) -> None:
        """Wait at the next step."""
        self._go.clear()

    def resume(self) -> None:
        """Go on."""
        self._go.set()

    def cancel(self) -> None:
        """Stop at the next step."""
        self._stop.set()
        self._go.set()

    def wait(self, seconds: float | None = None) -> None:
        """Until it has ended, for tests and scripts."""
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(seconds)


class Latest:
    """`ask(wish)` runs `compute(wish)` off the kernel's thread; wishes that come meanwhile replace one
    another, and the last is computed next.

    `compute` calls `step` between its parts, which raises where the work is cancelled or its wish is
    overtaken. `on_error` gets an expected error, or Cancelled, in the same thread.
    """

    def __init__(self, compute: Callable[[Any], None], on_error: Callable[[BaseException], None]) -> None:
        self.compute, self.on_error = compute, on_error
        self.job, self.busy = Job(), False
        self._lock = threading.Lock()
        self._wishes: list[Any] = []

    def ask(self, wish: Any) -> None:
        """Compute `wish` next, instead of what waited."""
        with self._lock:
            self._wishes = [wish]
            if self.busy:
                return
            self.busy = True
        self.job.wait()
        self.job.start(self._work)

    def step(self) -> None:
        """Between two parts of the work."""
        self.job.step()
        if self._wishes:
            raise Overtaken("overtaken by a newer wish")

    def cancel(self) -> None:
        """Leave what is computed and what waits."""
        self._wishes = []
        self.job.cancel()

    def wait(self, seconds: float | None = None) -> None:
        """Until nothing is left to compute, for tests and scripts."""
        self.job.wait(seconds)

    def _work(self, _job: Job) -> None:
        try:
            while wish := self._next():
                try:
                    self.compute(wish[0])
                except Overtaken:
                    continue
                except EXPECTED as error:
                    self.on_error(error)
        except Cancelled as cancelled:
            self.on_error(cancelled)
        finally:
            self.busy = False

    def _next(self) -> list[Any]:
        """The newest wish in a list, or an empty one, after which `ask` starts a new thread."""
        with self._lock:
            wish, self._wishes = self._wishes, []
            self.busy = bool(wish)
            return wish
