"""Work off the kernel's thread: it can be paused and cancelled, or give way to newer work."""

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

EXPECTED = (ValueError, KeyError, TypeError, RuntimeError, OSError, ImportError)
"""Errors whose message is for the reader; anything else is a defect and keeps its traceback."""


class Cancelled(Exception):
    """Raised inside a job's work at its next step once it is cancelled."""


class Job:
    """`start(work)` runs `work(job)` in a thread, which calls `job.step()` between its parts.

    `step` waits while the job is paused and raises Cancelled once it is cancelled. At the end `on_done` is
    called with None or the error, in the same thread; the job no longer counts as running then."""

    def __init__(self, on_done: Callable[[BaseException | None], None] = lambda _error: None) -> None:
        self.on_done, self.running = on_done, False
        self._go, self._stop, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._next: Callable[[Job], None] | None = None

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

    def instead(self, work: Callable[["Job"], None]) -> None:
        """Run `work` as soon as what runs has left at its next step, in place of what waited for that."""
        with self._lock:
            if self.running:
                self._next = work
                self._stop.set()
                return
        self.start(work)

    def _run(self, work: Callable[["Job"], None] | None) -> None:
        error: BaseException | None = None
        try:
            while work is not None:
                error = self._outcome(work)
                with self._lock:
                    work, self._next = self._next, None
                    self.running = work is not None
                    if work is not None:
                        self._stop.clear()
        finally:
            self.running = False
        self.on_done(error)

    def _outcome(self, work: Callable[["Job"], None]) -> BaseException | None:
        try:
            work(self)
        except Cancelled as cancelled:
            return cancelled
        except EXPECTED as error:
            log.debug("shown in the explorer", exc_info=True)
            return error
        return None

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
        """Stop at the next step; what waits is left."""
        with self._lock:
            self._next = None
            self._stop.set()
            self._go.set()

    def wait(self, seconds: float | None = None) -> None:
        """Until it has ended, for tests and scripts."""
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(seconds)
