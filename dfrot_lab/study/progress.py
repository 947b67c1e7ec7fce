"""How far a job of many steps is, and how long the rest will take."""

import logging
import time
from collections.abc import Sequence

from dfrot_lab.study.cost import duration

log = logging.getLogger(__name__)


class Progress:
    """Logs what is done and how long the rest will take; `costs` are its steps' nominal seconds."""

    def __init__(self, costs: Sequence[float] = ()) -> None:
        self.costs, self.begun, self.at = list(costs), 0, time.perf_counter()
        self.nominal, self.spent = 1.0, 1.0
        self.finished = set[int]()  # places of steps that run side by side

    def begin(self, what: str) -> None:
        """Announce the next step; the pace comes from steps that really ran, not from those the store had."""
        cost = self.costs[self.begun - 1] if self.begun else 0.0
        self._count(cost, time.perf_counter() - self.at > 0.1 * cost)
        self._say(self.begun + 1, what, self.costs[self.begun :])
        self.begun += 1

    def finish(self, place: int, what: str, ran: bool) -> None:
        """Announce that the step at `place` is done, of all from `begun` on that run side by side; `ran`: the
        store did not have it."""
        self._count(self.costs[place], ran)
        self.finished.add(place)
        left = [cost for at, cost in enumerate(self.costs) if at >= self.begun and at not in self.finished]
        self._say(self.begun + len(self.finished), f"{what} is done", left)

    def _count(self, cost: float, ran: bool) -> None:
        now = time.perf_counter()
        if ran:
            self.nominal, self.spent = self.nominal + cost, self.spent + now - self.at
        self.at = now

    def _say(self, number: int, what: str, costs: Sequence[float]) -> None:
        left = sum(costs) * self.spent / self.nominal
        rest = f"about {duration(left)} left" if left > 1 else "stored"
        log.info("[%2d/%d] %s; %s", number, len(self.costs), what, rest)
