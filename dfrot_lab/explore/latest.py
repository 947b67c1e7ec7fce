"""Work for the newest wish only: while a person goes on turning knobs, what they no longer ask for is left."""

import threading
from collections.abc import Callable
from typing import Any

from .base import EXPECTED, Cancelled, Job


class Overtaken(Exception):
    """Raised inside the work at its next step once there is a newer wish."""


class Latest:
    """`ask(wish)` runs `compute(wish)` off the kernel's thread; wishes that come meanwhile replace one
    another, and the last is computed next.

    `compute` calls `step` between its parts, which raises where the work is cancelled or its wish is
    overtaken. `on_error` gets an expected error, or Cancelled, in the same thread.
    """

    def __init__(self, compute: Callable[[Any], None], on_error: Callable[[BaseException], None]) -> None:
        self.compute, self.on_error = compute, on_error
        self.job = Job()
        self._lock = threading.Lock()
        self._wishes: list[Any] = []
        self._busy = False

    @property
    def busy(self) -> bool:
        """Whether a wish is being computed or waits."""
        return self._busy

    def ask(self, wish: Any) -> None:
        """Compute `wish` next, instead of what waited."""
        with self._lock:
            self._wishes = [wish]
            if self._busy:
                return
            self._busy = True
        self.job.wait()  # an ended one may still be on its last line
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
            self._busy = False

    def _next(self) -> list[Any]:
        """The newest wish in a list, or an empty one, after which `ask` starts a new thread."""
        with self._lock:
            wish, self._wishes = self._wishes, []
            self._busy = bool(wish)
            return wish
