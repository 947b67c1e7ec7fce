"""Token errors: every token's quantization error under two rotations or three; brush to list tokens, click
one to see its values on the grid.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import traitlets
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.observe.capture import Capture, capture
from dfrot_lab.observe.errors import default_rotations
from dfrot_lab.recipe.specs import QuantSpec, RefineSpec
from dfrot_lab.rotate import dfrot
from dfrot_lab.study import setting

from . import base, error_rows
from .error_plots import PANEL_HEIGHT, PANELS, Panels, Scatter
from .error_rows import ErrorRows
from .parts import html_table, panel, spec_of

LISTED = 200
"""Rows of the brushed table at most."""
NONE = "none"
NAMES = ("site", "bits", "symmetric", "clip", "x", "y", "z", "panels")
"""The controls that need no rotation made anew."""


class ErrorsState(traitlets.HasTraits):
    """Where a reader stands: site and quantizer, the seed of RO and RH, the rotations on the axes and in Fig.
    4, the token, what is brushed.
    """

    site = traitlets.Unicode()
    bits = traitlets.Int(4)
    symmetric = traitlets.Bool(True)
    clip = traitlets.Float(1.0)
    seed = traitlets.Int(0)
    x, y, z = traitlets.Unicode(), traitlets.Unicode(), traitlets.Unicode(NONE)
    panels = traitlets.Tuple()
    token = traitlets.Int(0)
    brushed = traitlets.Tuple()


class ErrorsView:
    """The widget's parts and what moves them; `top` is what the notebook shows."""

    def __init__(self, rows: ErrorRows, seeded: bool, spec: RefineSpec | None, store: Store) -> None:
        self.rows, self.spec, self.store, self._quiet = rows, spec, store, False
        site = setting.figure_site(rows.acts.sites)
        names = list(rows.matrices)
        token = int(rows.acts.residual_max[rows.acts.sites.index(site)].argmax())
        x, y = ("RO", "RH") if {"RO", "RH"} <= set(names) else (names[0], names[-1])
        self.state = ErrorsState(site=site, x=x, y=y, token=token, panels=tuple(names[:PANELS]))
        self.status, self.job = base.Status(), base.Job(self._refined)
        self.scatter = Scatter(rows.texts, self._click, self._brush)
        self.panels = Panels()
        self.listed, self.about = panel(base.HEIGHT), panel(26)
        self.controls = self._controls(seeded)
        self.redraw()
        self._connect()
        self.top = self._layout()

    # ---- what is shown
    # ------------------------------------------------------------------------------------------------------------------

    def redraw(self, *_: Any) -> None:
        """All plots and tables as the controls say; where they ask for the impossible, the status says so and
        the view stays.
        """
        if self._quiet:
            return
        with self.status.doing("computing"):
            s = self.state
            quantizer = QuantSpec(
                bits=s.bits, scheme="symmetric" if s.symmetric else "asymmetric", clip_ratio=s.clip
            )
            self.shown, self.quantizer = self.rows.table(s.site, quantizer), quantizer
            self.axes = [s.x, s.y] if s.z == NONE else [s.x, s.y, s.z]
            self.scatter.draw(self.shown, self.axes, list(self.rows.matrices))
            self._list()
            self._fig4()
        if self.status.state != "error":
            self.status.say(self._summary())

    def _summary(self) -> str:
        heavy = error_rows.is_massive(self.shown)
        medians = ", ".join(f"{name} {self.shown[name].median():.3g}" for name in self.rows.matrices)
        where = f"{self.state.site}, {self.quantizer.name}"
        return (
            f"{where}: {len(heavy):,} tokens, {int(heavy.sum())} massive (red, larger). Median E: {medians}"
        )

    def _list(self) -> None:
        """The brushed tokens, largest error on the y axis first."""
        rows = self.selected()
        name = self.axes[1]
        caption = (
            f"{len(rows):,} brushed tokens, largest E({name}) first"
            if len(rows)
            else "Brush a region of the plot: its tokens are listed here"
        )
        order = dict.fromkeys(
            ["token", "text", *self.axes, *self.rows.matrices, "massive"]
        )  # the plot's own rotations stay in sight
        shown = rows.sort_values(name, ascending=False).head(LISTED)[list(order)]
        self.listed.value = html_table(shown if len(rows) else shown.iloc[:0, :2], caption)

    def _fig4(self) -> None:
        """The chosen token's values before and after quantization."""
        names = [name for name in self.state.panels if name in self.rows.matrices] or list(self.rows.matrices)
        token, site = self.state.token, self.shown["site"].iloc[0]
        if not 0 <= token < len(self.rows.texts):
            raise ValueError(f"token must be in 0..{len(self.rows.texts) - 1}; got {token}")
        self.values = self.rows.values(site, token, names[:PANELS], self.quantizer)
        grid = {
            str(name): error_rows.levels(part["value"].to_numpy(), self.quantizer)
            for name, part in self.values.groupby("rotation", sort=False)
        }
        self.panels.draw(self.values, grid)
        rules = self.shown["massive"].iloc[token].replace(",", ", ") or "no rule"
        text = f"Token {token} \u2018{base.span(self.rows.texts[token])}\u2019 before and after quantization; massive by {rules}. Lines: the grid."
        self.about.value = f'<span class="dfrot-fig4">{text}</span>'

    def selected(self) -> pd.DataFrame:
        """The brushed tokens' rows of `table()`."""
        return self.shown.iloc[list(self.state.brushed)].reset_index(drop=True)

    # ---- what a reader does
    # -------------------------------------------------------------------------------------------------------------

    def _click(self, token: int) -> None:
        self.state.token = token

    def _brush(self, tokens: list[int]) -> None:
        self.state.brushed = tuple(tokens)

    def _pick(self, _change: Any) -> None:
        with self.status.doing("opening the token"):
            self._fig4()
        if self.status.state != "error":
            self.status.say(self._summary())

    def _reseed(self, _change: Any) -> None:
        with self.status.doing("making RO and RH"):
            for name, R in error_rows.seeded(self.rows.acts.channels, self.state.seed).items():
                self.rows.put(name, R)
        if self.status.state != "error":
            self.redraw()

    def add(self, name: str, R: Tensor) -> None:
        """One more rotation, on the y axis at once."""
        self.rows.put(name, R)
        options = list(self.rows.matrices)
        panels = self.state.panels
        self._quiet = True
        for control in ("x", "y", "panels"):
            self.controls[control].options = options  # which goes to its first value
        self.controls["z"].options = [NONE, *options]
        self.state.x, self.state.y = self.axes[0], name
        self.state.z = self.axes[2] if len(self.axes) == 3 else NONE
        self.state.panels = (*[n for n in panels if n != name], name)[-PANELS:]
        self._quiet = False
        self.redraw()

    def load(self, *_: Any) -> None:
        """The saved R1 that the path names."""
        path = self.controls["path"].value.strip()
        R = None
        with self.status.doing(f"reading {path}"):
            R = rotations.load(Path(path).expanduser(), self.rows.acts.channels)
        if R is not None:
            self.add(Path(path).name, R)

    def refine(self, *_: Any) -> None:
        """Compute the default refinement off the kernel's thread; a cancelled one goes on where it was."""
        spec, store = self.spec, self.store
        if spec is None or self.job.running:
            return

        def work(job: base.Job) -> None:
            def seen(state: Any) -> None:
                self.status.busy(f"refining: step {state.history[-1]['step']} of {spec.steps}")
                job.step()

            R = dfrot.refined(spec, store, checkpoint=seen).R
            job.step()
            self.add("DFRot", R)

        self.controls["refine"].disabled, self.controls["cancel"].disabled = True, False
        self.status.busy("refining")
        self.job.start(work)

    def _refined(self, error: BaseException | None) -> None:
        if isinstance(error, base.Cancelled):
            self.status.say("refinement cancelled; it goes on from its last checkpoint")
        elif error is not None:
            self.status.error(error)
        self.controls["refine"].disabled, self.controls["cancel"].disabled = error is None, True

    # ---- controls
    # -----------------------------------------------------------------------------------------------------------------------

    def _controls(self, seeded: bool) -> dict[str, Any]:
        s, names, narrow = self.state, list(self.rows.matrices), {"layout": {"width": "190px"}}
        sites = {"layout": {"width": "560px"}, "continuous_update": False}
        made = {
            "site": widgets.SelectionSlider(
                description="site", options=self.rows.acts.sites, value=s.site, **sites
            ),
            "bits": widgets.IntSlider(
                description="bits", value=s.bits, min=2, max=8, layout={"width": "220px"}
            ),
            "symmetric": widgets.Checkbox(
                description="symmetric", value=s.symmetric, indent=False, layout={"width": "110px"}
            ),
            "clip": widgets.FloatText(
                description="clip ratio", value=s.clip, step=0.05, layout={"width": "150px"}
            ),
            "seed": widgets.BoundedIntText(
                description="seed of RO, RH",
                value=0,
                max=10_000,
                disabled=not seeded,
                layout={"width": "190px"},
            ),
            "x": widgets.Dropdown(description="x axis", options=names, value=s.x, **narrow),
            "y": widgets.Dropdown(description="y axis", options=names, value=s.y, **narrow),
            "z": widgets.Dropdown(description="z axis", options=[NONE, *names], value=s.z, **narrow),
            "path": widgets.Text(
                description="saved R1", placeholder="path of a .safetensors file", layout={"width": "420px"}
            ),
            "token": widgets.BoundedIntText(
                description="token", value=s.token, max=len(self.rows.texts) - 1, layout={"width": "140px"}
            ),
            "panels": widgets.SelectMultiple(
                description="rotations shown",
                options=names,
                value=s.panels,
                rows=4,
                layout={"width": "300px"},
            ),
        }
        buttons = {
            "load": widgets.Button(description="add", tooltip="add the rotation in this file"),
            "refine": widgets.Button(
                description="refine (about 15 s)",
                tooltip="compute DFRot with the default settings",
                disabled=self.spec is None,
            ),
            "cancel": widgets.Button(description="cancel", tooltip="stop refining", disabled=True),
        }
        return {**{name: base.wide_label(control) for name, control in made.items()}, **buttons}

    def _connect(self) -> None:
        c = self.controls
        for name in (*NAMES, "seed", "token"):
            traitlets.link((self.state, name), (c[name], "value"))
        self.state.observe(self.redraw, list(NAMES))
        self.state.observe(self._turn, "z")
        self.state.observe(self._reseed, "seed")
        self.state.observe(self._pick, "token")
        self.state.observe(lambda _change: self._list(), "brushed")
        for name, act in (
            ("load", self.load),
            ("refine", self.refine),
            ("cancel", lambda _b: self.job.cancel()),
        ):
            c[name].on_click(act)

    def _turn(self, _change: Any) -> None:
        self.stage.turn(self.scatter.plane if self.state.z == NONE else self.scatter.space)

    def _layout(self) -> Any:
        c, box = self.controls, {"height": f"{base.HEIGHT}px", "overflow": "hidden"}
        self.stage = base.Stage(self.scatter.plane, width="64%", **box)
        beside = widgets.Box([self.listed], layout={"width": "36%", **box})
        where = base.row(c["site"], c["bits"], c["symmetric"], c["clip"], c["seed"])
        axes = base.row(c["x"], c["y"], c["z"], c["path"], c["load"])
        more = [] if "DFRot" in self.rows.matrices else [c["refine"], c["cancel"]]
        fig4 = widgets.Box(
            [self.panels.plot], layout={"width": "100%", "height": f"{PANEL_HEIGHT}px", "overflow": "hidden"}
        )
        parts = (
            where,
            axes,
            *([base.row(*more)] if more else []),
            self.status.widget,
            widgets.HBox([self.stage, beside]),
        )
        top = base.column(*parts, base.row(c["token"], c["panels"]), self.about, fig4)
        top.add_class("dfrot-errors")
        for name in ("state", "controls", "status", "job"):
            setattr(top, name, getattr(self, name))
        top.view, top.plot, top.space, top.fig4 = (
            self,
            self.scatter.plane,
            self.scatter.space,
            self.panels.plot,
        )
        top.table, top.selected = lambda: self.shown.copy(), self.selected
        top.static = lambda: error_rows.static(
            self.shown, self.axes, f"{self.shown['site'].iloc[0]}, {self.quantizer.name}"
        )
        top.static_token = lambda: error_rows.static_token(
            self.values, self.quantizer, f"token {self.state.token} at {self.state.site}"
        )
        return top


def errors(
    acts: Capture | None = None, rotation: Mapping[str, Tensor] | None = None, *, store: Store | None = None
) -> Any:
    """A widget that shows each token's error E(x R) at a site of `acts` (default: the default capture) under
    two rotations or three.

    `rotation` names matrices R (channels, channels), as `errors.token_errors` takes them; default NR, RO, RH,
    whose seed can then be turned, and DFRot where the store has it (else a button computes it). The widget
    has `table()` (one row a token at the site shown), `selected()` (those brushed), `static()` and
    `static_token()` (matplotlib figures), `state`, `controls`, `status`, `plot`, `space` and `fig4`.
    """
    store = store or Store()
    acts = acts or capture(store=store)
    made_by = spec_of(acts)
    spec = RefineSpec(capture=made_by) if made_by is not None else None
    given = dict(rotation) if rotation is not None else default_rotations(acts.channels)
    if not given:
        raise ValueError("rotation must name at least one matrix; got none")
    matrices = {name: rotations.check(R, acts.channels) for name, R in given.items()}
    if rotation is None and spec is not None and (found := dfrot.stored(spec, store)) is not None:
        matrices["DFRot"] = found.R
    return ErrorsView(ErrorRows(acts, matrices), rotation is None, spec, store).top
