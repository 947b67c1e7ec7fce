"""A state whose traits declare their controls, a status line, one job, rows of controls and plots."""

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ipywidgets as widgets
import traitlets

from dfrot_lab.explore.shell.job import Cancelled, Job
from dfrot_lab.explore.shell.plot import HEIGHT
from dfrot_lab.explore.shell.status import Status

Trait = TypeVar("Trait", bound=traitlets.TraitType)


def control(trait: Trait, kind: type[Any], label: str, width: int | None = None, **options: Any) -> Trait:
    """A trait of a state, moved by a control of this kind with a label, `width` pixels wide (a toggle's
    buttons, each).

    `options` are the control's own (min, step, ...); an Enum's values are the choices. What is only known
    once there is data is given to `Explorer(state, name={...})`."""
    if isinstance(trait, traitlets.Enum):
        options = {"options": trait.values, **options}
    if width and kind is widgets.ToggleButtons:
        options["style"] = {"button_width": f"{width}px"}
    elif width:
        options["layout"] = {"width": f"{width}px", **options.get("layout", {})}
    trait.tag(control=(kind, {"description": label, **options}))
    return trait


class Explorer(widgets.VBox):
    """A widget with a `state`, the `controls` of its traits by name, a `status` line and a `job`.

    A subclass gives its state, adds buttons, makes its plots, and sets `children`. Its name in small letters
    is its class on the page: `dfrot-massive`."""

    ONE, CANCELLED = "job", ""
    """What can only be done one at a time, and what is said when it was cancelled."""

    def __init__(self, state: traitlets.HasTraits, **late: Mapping[str, Any]) -> None:
        super().__init__(layout={"max_width": "1240px", "width": "100%"})
        self.add_class(f"dfrot-{type(self).__name__.lower()}")
        self.state, self.status, self.job = state, Status(), Job(self._ended)
        self.controls: dict[str, Any] = {}
        self._pressed: list[str] = []
        self._lock = threading.RLock()
        for name, trait in state.traits(control=lambda declared: declared is not None).items():
            self.controls[name] = self._linked(name, trait.metadata["control"], late.get(name, {}))

    def _linked(self, name: str, declared: tuple[Any, ...], late: Mapping[str, Any]) -> Any:
        """The declared control, which moves the state and follows it; without a value it moves nothing."""
        kind, options = declared
        made = kind(**{"value": getattr(self.state, name), **options, **late})
        made.style.description_width = "initial"  # the label is shown whole

        def move(change: Any) -> None:
            if change["new"] is not None:
                setattr(self.state, name, change["new"])

        made.observe(move, "value")
        self.state.observe(lambda change: setattr(made, "value", change["new"]), name)
        return made

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

    def work(self, text: str, do: Callable[[Job], None]) -> None:
        """Run `do(job)` in the background, `text` in the status line; while one runs, an error there."""
        if self.free():
            self.status.busy(text)
            self.job.start(do)
            self.enable()

    def enabled(self) -> dict[str, bool]:
        """Which buttons can be pressed now: `cancel` while the job runs, the others while it does not."""
        return {name: self.job.running == (name == "cancel") for name in self._pressed}

    def enable(self) -> None:
        """Set the buttons as `enabled` says."""
        with self._lock:
            for name, can_be_pressed in self.enabled().items():
                self.controls[name].disabled = not can_be_pressed

    def at_end(self, error: BaseException | None) -> str:
        """Draw what the work left, in the job's thread; the sentence on how it ended ('' leaves what is
        said). An error but Cancelled is said after it."""
        return self.CANCELLED if isinstance(error, Cancelled) else ""

    def _ended(self, error: BaseException | None) -> None:
        said = self.at_end(error)
        if error is not None and not isinstance(error, Cancelled):
            self.status.error(error)
        elif said:
            self.status.say(said)
        self.enable()

    def row(self, *parts: Any) -> widgets.HBox:
        """Controls (by name) and widgets beside one another; a list is a column."""
        placed = [
            widgets.VBox([self._part(p) for p in part]) if isinstance(part, list) else self._part(part)
            for part in parts
        ]
        layout = {"flex_flow": "row wrap", "align_items": "center", "grid_gap": "4px 12px"}
        return widgets.HBox(placed, layout=layout)

    def _part(self, part: Any) -> Any:
        return self.controls[part] if isinstance(part, str) else part


def beside(*parts: Any, shares: tuple[int, ...] = (), height: int = HEIGHT) -> widgets.HBox:
    """Plots or panels beside one another, of fixed height, each a share (percent) of the page's width."""
    widths = shares or (100 / len(parts),) * len(parts)
    fixed = {"height": f"{height}px", "overflow": "hidden"}
    boxes = [
        widgets.Box([part], layout={"width": f"{width:g}%", **fixed})
        for part, width in zip(parts, widths, strict=True)
    ]
    return widgets.HBox(boxes, layout={"width": "100%"})
