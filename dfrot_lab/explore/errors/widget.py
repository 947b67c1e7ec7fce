"""Every token's quantization error under two rotations or three; brush to list tokens, click to open one."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from traitlets import Bool, Float, HasTraits, Int, Tuple, Unicode

from dfrot_lab.disk import rotation_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.errors import plots
from dfrot_lab.explore.page import GREY, HEIGHT, SCHEMES, Stage, beside, drawing, html_table, panel
from dfrot_lab.explore.shell import Explorer, Job, control
from dfrot_lab.maths import quantizers, rotations
from dfrot_lab.observe import errors as token_errors, massive
from dfrot_lab.observe.capture import Capture, capture
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import DEFAULT_RULE, RefineSpec
from dfrot_lab.rotate import dfrot
from dfrot_lab.show import figures
from dfrot_lab.show.theme import MASSIVE_COLOUR, ORDINARY_COLOUR, span
from dfrot_lab.study import setting

KEPT = 16  # rotated sites kept: of 2048 tokens and 576 channels 5 MB each
PANELS = len(plots.AXES)
NONE = "none"


class ErrorRows:
    """A capture's rows under named rotations R (channels, channels). `rotated(site, name)` is x @ R, and
    `verdicts(site)` names the rules that call each token massive; both are kept."""

    def __init__(self, acts: Capture, matrices: Mapping[str, Tensor]) -> None:
        self.acts, self.matrices, self.texts = acts, dict(matrices), acts.texts
        self.rotated = functools.lru_cache(KEPT)(self._rotated)
        self.verdicts = functools.cache(lambda site: token_errors.massive_names(acts, sites=[site])[0])

    def put(self, name: str, R: Tensor) -> None:
        """A new rotation, or another one under a name that is there."""
        self.matrices[name] = R
        self.rotated.cache_clear()

    def _rotated(self, site: str, name: str) -> Tensor:
        x = self.acts.rows(site)
        return x if name == "NR" else x @ self.matrices[name].to(x)

    def table(self, site: str, quantizer: QuantSpec) -> pd.DataFrame:
        """Each token's E(x R) at a site, as `errors.wide` has them: site, token, text, massive, rotations."""
        found = {n: quantizers.squared_error(self.rotated(site, n), quantizer).numpy() for n in self.matrices}
        tokens, heavy = np.arange(len(self.texts)), massive.find(self.acts, DEFAULT_RULE, [site])[0].numpy()
        return pd.DataFrame({"site": site, "token": tokens, "text": self.texts, "massive": heavy, **found})


class _State(HasTraits):
    site = control(Unicode(), widgets.SelectionSlider, "site", 560, continuous_update=False)
    bits = control(Int(4), widgets.IntSlider, "bits", 220, min=2, max=8)
    symmetric = control(Bool(), widgets.Checkbox, "symmetric", 110, indent=False)
    clip = control(Float(1.0), widgets.FloatText, "clip ratio", 150, step=0.05)
    seed = control(Int(0), widgets.BoundedIntText, "seed of RO, RH", 190, max=10_000)
    x = control(Unicode(), widgets.Dropdown, "x axis", 190)
    y = control(Unicode(), widgets.Dropdown, "y axis", 190)
    z = control(Unicode(NONE), widgets.Dropdown, "z axis", 190)
    path = control(Unicode(), widgets.Text, "saved R1", 420, placeholder="path of a .safetensors file")
    token = control(Int(0), widgets.BoundedIntText, "token", 140)
    panels = control(Tuple(), widgets.SelectMultiple, "rotations shown", 300, rows=4)
    brushed = Tuple()


def grid(quantizer: QuantSpec) -> dict[str, Any]:
    """The controls of a per-token quantizer."""
    return {"bits": quantizer.bits, "symmetric": quantizer.symmetric, "clip": quantizer.clip_ratio}


def named(acts: Capture, rotation: Mapping[str, Tensor] | None, found: Tensor | None) -> dict[str, Tensor]:
    """The matrices by name: those given, or NR, RO, RH and, where it was `found`, DFRot. ValueError."""
    given = token_errors.default_rotations(acts.channels) if rotation is None else rotation
    if not given:
        raise ValueError("rotation must name at least one matrix; got none")
    matrices = {name: rotations.check(R, acts.channels) for name, R in given.items()}
    return matrices if rotation is not None or found is None else {**matrices, "DFRot": found}


class Errors(Explorer):
    """Each token's error E(x R) at a site of `acts` (default: the default capture). `rotation` names matrices
    R (channels, channels); default NR, RO, RH, and DFRot where the store has it. It opens on the grid that
    DFRot is refined for, and says so: on another one a refined rotation can be worse than it began."""

    ONE, CANCELLED = "refinement", "refinement cancelled; it goes on from its last checkpoint"

    def __init__(
        self, acts: Capture | None = None, rotation: Mapping[str, Tensor] | None = None, *,
        store: Store | None = None,
    ) -> None:  # fmt: skip
        self.store, self._quiet, seeded = store or Store(), False, rotation is None
        acts = acts or capture(store=self.store)
        self.spec = RefineSpec(capture=acts.spec)
        stored = dfrot.stored(self.spec, self.store) if seeded else None
        self.rows = rows = ErrorRows(acts, named(acts, rotation, stored.R if stored else None))
        self.texts = rows.texts
        sites, names = rows.acts.sites, list(rows.matrices)
        site = setting.figure_site(sites)
        token = rows.acts.largest(site)
        x, y = ("RO", "RH") if {"RO", "RH"} <= set(names) else (names[0], names[-1])
        offered = {"x": names, "y": names, "z": [NONE, *names], "panels": names, "site": sites}
        first = {"site": site, "x": x, "y": y, "token": token, "panels": tuple(names[:PANELS])}
        state = _State(**first, **grid(self.spec.quantizer))
        super().__init__(state, **offered, seed={"disabled": not seeded}, token={"max": len(rows.texts) - 1})
        self.button("load", "add", self.load, tooltip="add the rotation in this file")
        self.button("refine", "refine DFRot (15 s)", self.refine, tooltip="with the default settings")
        self.button("cancel", "cancel", self.cancel, tooltip="stop refining")
        tell = state.set_trait
        self.plot, self.space = (plots.Tokens(rows.texts, tell, space=space) for space in (False, True))
        self.fig4, self.listed, self.about = plots.Panels(), panel(HEIGHT), panel(26)
        self.stage = Stage(self.plot)
        self.redraw()
        self.enable()
        self.on("site bits symmetric clip x y z panels", self.redraw)
        self.on("z", lambda: self.stage.turn(self.plot if self.state.z == NONE else self.space))
        self.on("seed", self._reseed)
        self.on("token", self._pick)
        self.on("brushed", self._list)
        what = self.row("site", "bits", "symmetric", "clip", "seed")
        chosen = [what, self.row("x", "y", "z", "path", "load")]
        chosen += [] if "DFRot" in names else [self.row("refine", "cancel")]
        below = [self.row("token", "panels"), self.about, beside(self.fig4, height=plots.PANEL_HEIGHT)]
        scatter = beside(self.stage, self.listed, shares=(64, 36))
        self.children = [*chosen, self.status.line, scatter, *below]

    def redraw(self) -> None:
        """All plots and tables as the controls say; the impossible is said, and the view stays."""
        if self._quiet:
            return
        with self.status.doing("computing", self._summary):
            s = self.state
            quantizer = QuantSpec(bits=s.bits, scheme=SCHEMES[s.symmetric], clip_ratio=s.clip)
            self.shown, self.quantizer = self.rows.table(s.site, quantizer), quantizer
            own = quantizer == self.spec.quantizer and "DFRot" in self.rows.matrices
            self.where = f"{s.site}, {quantizer.name}{', the grid DFRot is refined for' if own else ''}"
            self.axes = [s.x, s.y] if s.z == NONE else [s.x, s.y, s.z]
            view = self.plot if s.z == NONE else self.space
            view.draw(self.shown, self.axes, list(self.rows.matrices), self._checked())
            self._list()
            self._fig4()

    def _checked(self) -> int:
        """The token that is picked; ValueError where there is none such."""
        if not 0 <= self.state.token < len(self.texts):
            raise ValueError(f"token must be in 0..{len(self.texts) - 1}; got {self.state.token}")
        return int(self.state.token)

    def _summary(self) -> str:
        medians = ", ".join(f"{name} {self.shown[name].median():.3g}" for name in self.rows.matrices)
        heavy = self.shown["massive"].sum()
        heavy_said = f"{heavy} massive (red, larger)" if heavy else "none massive"
        return f"{self.where}: {len(self.shown):,} tokens, {heavy_said}. Median E: {medians}"

    def _list(self) -> None:
        """The brushed tokens, largest error on the y axis first; the plot's own rotations stay in sight."""
        rows, name = self.selected(), self.axes[1]
        caption = f"{len(rows):,} brushed tokens, largest E({name}) first"
        order = list(dict.fromkeys(["token", "text", *self.axes, *self.rows.matrices, "massive"]))
        if rows.empty:
            caption, order = "Brush a region of the plot: its tokens are listed here", ["site", "token"]
        table = rows.sort_values(name, ascending=False).head(200)[order]
        self.listed.value = html_table(table, caption, self.state.token)

    def _fig4(self) -> None:
        """The chosen token's values before and after quantization."""
        known, token, site = self.rows.matrices, self._checked(), self.shown["site"].iloc[0]
        names = [name for name in self.state.panels if name in known] or list(known)
        matrices = {name: known[name] for name in names[:PANELS]}
        self.values = token_errors.massive_values(self.rows.acts, site, token, matrices, self.quantizer)
        self.fig4.draw(self.values, self.quantizer)
        rules = self.rows.verdicts(site)[token] or "no rule"
        named = f"Token {token} \u2018{span(self.rows.texts[token])}\u2019 before and after quantization"
        self.about.value = f'<span class="dfrot-fig4">{named}; massive by {rules}. Lines: the grid.</span>'

    def table(self) -> pd.DataFrame:
        """Every token at the site shown: site, token, text, massive, and its error under each rotation."""
        return self.shown.copy()

    def selected(self) -> pd.DataFrame:
        """Those that are brushed."""
        return self.shown.iloc[list(self.state.brushed)].reset_index(drop=True)

    def static(self) -> Figure:
        """The scatter as a matplotlib figure."""
        table, axes, flat = self.shown, self.axes, len(self.axes) == 2
        options: dict[str, Any] = {} if flat else {"subplot_kw": {"projection": "3d"}}
        with drawing(size=(6.4, 5.2), layout="constrained", **options) as (drawn, (ax,)):
            if flat:
                figures.plot_error_pair(table, *axes, ax=ax).legend(fontsize=8)
            else:
                for heavy, colour, size in ((False, ORDINARY_COLOUR, 6), (True, MASSIVE_COLOUR, 30)):
                    ax.scatter(*(table[table["massive"] == heavy][name] for name in axes), c=colour, s=size)
                ax.set(**{f"{letter}label": f"E({name})" for letter, name in zip("xyz", axes, strict=True)})
            drawn.suptitle(self.where, fontsize=10)
        return drawn

    def static_token(self) -> Figure:
        """The chosen token's values (Fig. 4) as a matplotlib figure: a panel a rotation, its grid drawn."""
        grids = plots.grids(self.values, self.quantizer)
        with drawing(len(grids), size=(2.9 * len(grids), 3.2), layout="constrained") as (drawn, axes):
            for ax, (name, levels) in zip(axes, grids.items(), strict=True):
                figures.plot_massive_values(self.values, name, ax=ax)
                for level in levels:
                    ax.axhline(level, c=GREY, lw=0.5, zorder=0)
            drawn.suptitle(f"token {self.state.token} at {self.state.site}", fontsize=10)
        return drawn

    def _pick(self) -> None:
        with self.status.doing("opening the token", self._summary):
            (self.plot if self.state.z == NONE else self.space).pick(self._checked())
            self._list()
            self._fig4()

    def _reseed(self) -> None:
        self.status.busy("making RO and RH")
        for name, R in token_errors.default_rotations(self.rows.acts.channels, self.state.seed).items():
            self.rows.put(name, R)
        self.redraw()

    def add(self, name: str, R: Tensor) -> None:
        """One more rotation, on the y axis at once."""
        self.rows.put(name, R)
        names, panels = list(self.rows.matrices), self.state.panels
        self._quiet = True  # a control whose options are replaced goes to its first value
        for axis in ("x", "y", "panels"):
            self.controls[axis].options = names
        self.controls["z"].options = [NONE, *names]
        self.state.x, self.state.y, self.state.z = self.axes[0], name, [*self.axes, NONE][2]
        self.state.panels = (*[other for other in panels if other != name], name)[-PANELS:]
        self._quiet = False
        self.redraw()

    def at(self, **view: Any) -> Self:
        """As `Explorer.at`; a saved R1 is read first, and what was brushed is brushed again."""
        if view.get("path"):
            self.state.path = view["path"]
            self.load()
        super().at(**view)
        self.plot.data[0].selectedpoints = self.state.brushed or None
        return self

    def load(self) -> None:
        """The saved R1 that the path names."""
        path = Path(self.state.path.strip())
        with self.status.doing(f"reading {path}"):
            self.add(path.name, rotation_files.load(path.expanduser(), self.rows.acts.channels))

    def refine(self) -> None:
        """Compute the default refinement off the kernel's thread; a cancelled one goes on where it was."""
        self.work("refining", self._refine)

    def _refine(self, job: Job) -> None:
        def seen(state: Any) -> None:
            self.status.busy(f"refining: step {state.history[-1]['step']} of {self.spec.steps}")
            job.step()

        R = dfrot.refined(self.spec, self.store, checkpoint=seen).R
        job.step()
        self.add("DFRot", R)

    def _enabled(self) -> dict[str, bool]:
        able = super()._enabled()
        return {**able, "load": True, "refine": able["refine"] and "DFRot" not in self.rows.matrices}
