"""What every explorer is made of: a state with its controls, a status line, and work in the background."""

import html
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import ipywidgets as widgets
import traitlets

from dfrot_lab.explore.page import GREY
from dfrot_lab.explore.take import Take, said

log = logging.getLogger(__name__)

# errors whose message is for the reader; anything else is a defect and keeps its traceback
EXPECTED = (ValueError, KeyError, TypeError, RuntimeError, OSError, ImportError)
Trait = TypeVar("Trait", bound=traitlets.TraitType)
Work = Callable[["Job"], object]


class Cancelled(Exception):
    """Raised inside a job's work at its next step once it is cancelled."""


class Job:
    """`start(work)` runs `work(job)` in a thread, which calls `job.step()` between its parts. At the end
    `on_done` is called in that thread with None or the error; the job no longer counts as running then."""

    def __init__(self, on_done: Callable[[BaseException | None], None]) -> None:
        self.on_done, self.running = on_done, False
        self._go, self._stop, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._next: Work | None = None

    @property
    def paused(self) -> bool:
        """Whether it waits for `resume`."""
        return self.running and not self._go.is_set()

    def start(self, work: Work) -> None:
        """Run `work` in a thread; RuntimeError while the last one still runs."""
        if self.running:
            raise RuntimeError("one job at a time: cancel the one that runs, or wait for it")
        self.wait()  # one that has ended may still be in `on_done`
        self.running = True
        self._go.set()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, args=[work], daemon=True)
        self._thread.start()

    def instead(self, work: Work) -> None:
        """Run `work` as soon as what runs has left at its next step, in place of what waited for that."""
        with self._lock:
            if self.running:
                self._next = work
                self._stop.set()
                return
        self.start(work)

    def _run(self, work: Work | None) -> None:
        try:
            while work is not None:
                error: BaseException | None = None
                try:
                    work(self)
                except (Cancelled, *EXPECTED) as raised:
                    log.debug("shown in the explorer", exc_info=True)
                    error = raised.with_traceback(None)  # which would hold what the work held
                with self._lock:
                    work, self._next = self._next, None
                    self.running = work is not None
                    self._stop.clear()
        finally:
            self.running = False
        self.on_done(error)

    def step(self) -> None:
        """Between two parts of the work: waits while it is paused, raises Cancelled once it is cancelled."""
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


class Status:
    """One line of fixed height: busy, done, or what went wrong."""

    def __init__(self) -> None:
        self.line = widgets.HTML(layout={"height": "28px", "overflow": "hidden", "flex": "0 0 auto"})
        self.line.add_class("dfrot-status")
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
        words, colour = html.escape(text), "#CC2936" if state == "error" else GREY
        about = f'class="dfrot-{state}" role="status" title="{words}" style="color:{colour}"'
        self.line.value = f"<span {about}>{words}</span>"

    @contextmanager
    def doing(self, text: str, then: str | Callable[[], str] = "") -> Iterator[None]:
        """While the block runs, say so; after it `then`, if any, or the error, not raised further."""
        self.busy(text)
        try:
            yield
        except EXPECTED as error:
            log.debug("shown in the explorer", exc_info=True)
            self.error(error)
        else:
            if then:
                self.say(then() if callable(then) else then)


def control(trait: Trait, kind: type[Any], label: str, width: int | None = None, **options: Any) -> Trait:
    """A trait of a state, moved by a control of this kind, `width` pixels wide (or each of its buttons);
    `options` are the control's own. What hangs on the data is given to `Explorer(state, name={...})`."""
    if isinstance(trait, traitlets.Enum):
        options = {"options": trait.values, **options}
    if width and kind is widgets.ToggleButtons:
        options["style"] = {"button_width": f"{width}px"}
    elif width:
        options["layout"] = {"width": f"{width}px", **options.get("layout", {})}
    trait.tag(control=(kind, {"description": label, **options}))
    return trait


class Explorer(widgets.VBox):
    """A widget with a `state`, the `controls` of its traits by name, a `status` line and a `job`; a subclass
    adds buttons and plots, and sets `children`. Its class on the page is its name: `dfrot-massive`."""

    ONE, STOPPING, CANCELLED, DONE = "job", "", "", ""
    """What can only be done one at a time; what is said while it stops, once it did, once it is done."""
    texts: Any = ()  # of the tokens that `state.token` is one of
    table: Any  # a method: what is shown, as a table

    def __new__(cls, *args: Any, **named: Any) -> Self:
        """Remember what it was made of, for `line`."""
        made = super().__new__(cls, *args, **named)
        made._made_of = inspect.signature(cls.__init__).bind(made, *args, **named).arguments
        return made

    def __init__(self, state: traitlets.HasTraits, **late: Any) -> None:
        name = type(self).__name__.lower()
        self.take = Take(name=name)
        super().__init__(layout={"max_width": "1240px", "width": "100%"})
        self.add_class(f"dfrot-{name}")
        self.state: Any = state
        self.take.on_msg(lambda *_message: self._give())
        self.status, self.job, self.controls = Status(), Job(self._ended), dict[str, Any]()
        self._pressed, self._lock = list[str](), threading.RLock()
        for name, trait in state.traits(control=lambda declared: declared is not None).items():
            self.controls[name] = self._linked(name, late.get(name, {}), *trait.metadata["control"])
        self._first = dict(state.trait_values())  # a control may have made another value of one
        state.observe(lambda _change: self.take.set_trait("line", self.line()))
        self.take.line = self.line()

    def _linked(self, name: str, late: Any, kind: Any, options: dict[str, Any]) -> Any:
        """The declared control, which moves the state and follows it; without a value it moves nothing."""
        late = late if isinstance(late, dict) else {"options": late}
        made = kind(**{"value": getattr(self.state, name), **options, **late})
        if hasattr(made, "style"):
            made.style.description_width = "initial"  # the label is shown whole

        def move(change: Any) -> None:
            if change["new"] is not None:
                setattr(self.state, name, change["new"])

        made.observe(move, "value")
        self.state.observe(lambda change: setattr(made, "value", change["new"]), name)
        return made

    @traitlets.validate("children")
    def _with_foot(self, proposal: Any) -> Any:
        return (*(part for part in proposal["value"] if part is not self.take), self.take)

    def line(self) -> str:
        """One line of Python that makes this view again: what is not usual, in the package's own names."""
        of = {name: value for name, value in self._made_of.items() if name != "self" and value is not None}
        now = {n: v for n, v in self.state.trait_values().items() if v != self._first[n]}
        given, moved = (", ".join(f"{n}={said(v, n)}" for n, v in all_.items()) for all_ in (of, now))
        return f"explore.{self.take.name}({given})" + (f".at({moved})" if moved else "")

    def at(self, **view: Any) -> Self:
        """The view that `line` says: these values of the state. ValueError: no such value, or none of its."""
        self.job.wait(0 if self.job.paused else 60)  # what it opens may be what there is to choose from
        for name, value in view.items():
            if not self.state.has_trait(name):
                raise ValueError(f"{name!r} must be one of {', '.join(self._first)}")
            try:
                setattr(self.state, name, value)
            except traitlets.TraitError as error:
                raise ValueError(f"{name} cannot be {value!r} here: {error}") from None
        return self

    def _give(self) -> None:
        with self.status.doing("making the table", self.status.text.strip):  # then as now
            self.take.send(self.table().to_csv(index=False))

    def button(self, name: str, label: str, act: Callable[[], None], **look: Any) -> None:
        """One more control: a button that calls `act()`; `look` is ipywidgets' (tooltip, icon, ...)."""
        self.controls[name] = widgets.Button(description=label, **look)
        self.controls[name].on_click(lambda _button: act())
        self._pressed.append(name)

    def on(self, names: str, act: Callable[[], None]) -> None:
        """Call `act()` when one of these traits (words, apart by blanks) of the state changes."""
        self.state.observe(lambda _change: act(), names.split())

    def free(self) -> bool:
        """Whether no work runs; where some does, the status line says so."""
        if self.job.running:
            self.status.error(f"one {self.ONE} at a time: cancel the one that runs, or wait for it")
        return not self.job.running

    def work(self, text: str, do: Work) -> None:
        """Run `do(job)` in the background, `text` in the status line; while one runs, an error there."""
        if self.free():
            self.status.busy(text)
            self.job.start(do)
            self.enable()

    def cancel(self) -> None:
        """Stop the work at its next step."""
        if self.job.running and self.STOPPING:
            self.status.busy(self.STOPPING)
        self.job.cancel()

    def _enabled(self) -> dict[str, bool]:
        """Which buttons can be pressed now: `cancel` while the job runs, the others while it does not."""
        return {name: self.job.running == (name == "cancel") for name in self._pressed}

    def enable(self) -> None:
        """Set the buttons as `_enabled` says."""
        with self._lock:
            for name, can_be_pressed in self._enabled().items():
                self.controls[name].disabled = not can_be_pressed

    def _at_end(self, error: BaseException | None) -> str:
        """Draw what the work left, in the job's thread; the sentence on how it ended ('': as it is)."""
        return self.DONE if error is None else self.CANCELLED

    def _ended(self, error: BaseException | None) -> None:
        said = self._at_end(error)
        if error is not None and not isinstance(error, Cancelled):
            self.status.error(error)
        elif said:
            self.status.say(said)
        self.enable()

    def row(self, *parts: Any) -> widgets.HBox:
        """Controls (by name) and widgets beside one another; a list is a column."""
        layout = {"flex_flow": "row wrap", "align_items": "center", "grid_gap": "4px 12px"}
        return widgets.HBox([self._part(part) for part in parts], layout=layout)

    def _part(self, part: Any) -> Any:
        if isinstance(part, list):
            return widgets.VBox([self._part(each) for each in part])
        return self.controls[part] if isinstance(part, str) else part
