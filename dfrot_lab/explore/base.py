"""What every explorer is made of: safe token text, a status line that never moves the page, work that can be
paused and cancelled, plain plots.
"""

import html
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go

from dfrot_lab.show.markup import VISIBLE, safe, span, visible
from dfrot_lab.show.theme import COLOURS, MASSIVE_COLOUR, ORDINARY_COLOUR

from .page import Fit, Plot, Stage

log = logging.getLogger(__name__)

HEIGHT = 420
"""Pixels of one plot: fixed, so that nothing moves while a new one is computed."""
GREY = "#808080"
"""Text and axes: readable on a white and on a dark page (contrast 3.9 and 5.3)."""
EXPECTED = (ValueError, KeyError, TypeError, RuntimeError, OSError, ImportError)
"""Errors whose message is for the reader; anything else is a defect and keeps its traceback."""

__all__ = ["COLOURS", "MASSIVE_COLOUR", "ORDINARY_COLOUR", "VISIBLE", "Stage", "safe", "span", "visible"]


class Status:
    """One line below the controls: busy, done, or what went wrong in one sentence. Its height never changes.
    With it comes what fits the plots.
    """

    def __init__(self) -> None:
        self.line = widgets.HTML(layout=widgets.Layout(height="28px", overflow="hidden"))
        self.widget = widgets.Box(
            [self.line, Fit()], layout=widgets.Layout(flex_flow="column", overflow="hidden", flex="0 0 auto")
        )
        self.widget.add_class("dfrot-status")
        self.say("")

    def say(self, text: str) -> None:
        """A plain sentence."""
        self._show("ready", text)

    def busy(self, text: str) -> None:
        """Something is being computed."""
        self._show("busy", f"\u25d4 {text}\u2026")

    def error(self, error: BaseException | str) -> None:
        """What went wrong, in one sentence."""
        text = (
            error.args[0] if isinstance(error, KeyError) and error.args else error
        )  # str() of a KeyError adds quotes
        self._show("error", f"\u26a0 {text}")

    def _show(self, state: str, text: str) -> None:
        colour = {"error": "#CC2936"}.get(state, GREY)
        self.text = text
        self.state = state
        self.line.value = f'<span class="dfrot-{state}" role="status" title="{html.escape(text)}" style="color:{colour}">{html.escape(text)}</span>'

    @contextmanager
    def doing(self, text: str, then: str = "") -> Iterator[None]:
        """While the block runs, say it is busy; after it `then`, or the error, which is not raised further."""
        self.busy(text)
        try:
            yield
        except EXPECTED as error:
            log.debug("shown in the explorer", exc_info=True)
            self.error(error)
        else:
            self.say(then)


class Cancelled(Exception):
    """Raised inside a job's work at its next step once it is cancelled."""


@dataclass
class Job:
    """Work off the kernel's own thread: `start(work)` runs `work(job)`, which calls `job.step()` between its
    parts.

    `step` waits while the job is paused and raises Cancelled once it is cancelled. `on_done` is called with
    None or the error, in the same thread.
    """

    on_done: Callable[[BaseException | None], None] = lambda _error: None
    _go: threading.Event = field(default_factory=threading.Event)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended (a paused job is running)."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def paused(self) -> bool:
        """Whether it waits for `resume`."""
        return self.running and not self._go.is_set()

    def start(self, work: Callable[["Job"], None]) -> None:
        """Run `work` in a thread; RuntimeError while the last one still runs."""
        if self.running:
            raise RuntimeError("one job at a time: cancel the one that runs, or wait for it")
        self._go.set()
        self._stop.clear()

        def run() -> None:
            error: BaseException | None = None
            try:
                work(self)
            except Cancelled as cancelled:
                error = cancelled
            except EXPECTED as expected:
                log.debug("shown in the explorer", exc_info=True)
                error = expected
            self.on_done(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

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
        if self._thread:
            self._thread.join(seconds)


def figure(height: int = HEIGHT, **layout: Any) -> go.FigureWidget:
    """An empty plotly figure in the explorers' look: transparent, grey text, fixed height, no animation."""
    shown = Plot()
    axis = {
        "gridcolor": "rgba(128,128,128,0.25)",
        "zerolinecolor": "rgba(128,128,128,0.5)",
        "linecolor": GREY,
        "automargin": True,
    }
    shown.update_layout(
        height=height,
        margin={"l": 60, "r": 16, "t": 36, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 12},
        hovermode="closest",
        hoverlabel={"namelength": -1, "align": "left", "bgcolor": "#303030", "font": {"color": "#ffffff"}},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": "#0072B2"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis=axis,
        yaxis=axis,
        **layout,
    )
    return shown


def wide_label(widget: Any) -> Any:
    """A control whose description is shown whole."""
    widget.style.description_width = "initial"
    return widget


def column(*parts: Any) -> widgets.VBox:
    """Parts below one another, as wide as the page lets them and no wider than 1240 px."""
    return widgets.VBox(list(parts), layout=widgets.Layout(max_width="1240px", width="100%"))


def row(*parts: Any) -> widgets.HBox:
    """Controls beside one another, wrapped where the page is narrow."""
    return widgets.HBox(
        list(parts), layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 12px")
    )
