"""One line below the controls: busy, done, or what went wrong in one sentence."""

import html
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ipywidgets as widgets

from dfrot_lab.explore.shell.job import EXPECTED
from dfrot_lab.explore.shell.plot import GREY, Fit

log = logging.getLogger(__name__)

ERROR_COLOUR = "#CC2936"


class Status:
    """The line's height never changes, so nothing moves. With it comes what fits the plots to the page."""

    def __init__(self) -> None:
        self.line = widgets.HTML(layout={"height": "28px", "overflow": "hidden"})
        layout = {"flex_flow": "column", "overflow": "hidden", "flex": "0 0 auto"}
        self.widget = widgets.Box([self.line, Fit()], layout=layout)
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
        text = error.args[0] if isinstance(error, KeyError) and error.args else error  # else in quotes
        self._show("error", f"\u26a0 {text}")

    def _show(self, state: str, text: str) -> None:
        self.text, self.state = text, state
        words, colour = html.escape(text), ERROR_COLOUR if state == "error" else GREY
        about = f'class="dfrot-{state}" role="status" title="{words}" style="color:{colour}"'
        self.line.value = f"<span {about}>{words}</span>"

    @contextmanager
    def doing(self, text: str, then: str | Callable[[], str] = "") -> Iterator[None]:
        """While the block runs, say so; after it `then`, or the error, which is not raised further."""
        self.busy(text)
        try:
            yield
        except EXPECTED as error:
            log.debug("shown in the explorer", exc_info=True)
            self.error(error)
        else:
            self.say(then() if callable(then) else then)
