"""The errors explorer's numbers: one site's tokens under every rotation, rotated once and quantized again at
each move of a control.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import code_range, scale_zero, squared_error
from dfrot_lab.observe import errors
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import QuantSpec, RotationSpec
from dfrot_lab.show import figures

from . import base

KEPT = 16
"""Rotated sites kept: of 2048 tokens and 576 channels 5 MB each."""
SEEDED = ("RO", "RH")
MASSIVE_RULES = "nr_error|sun"
"""The rules that colour a point, as in the printed figures."""


class ErrorRows:
    """A capture's rows under named rotations R (channels, channels); what is asked for twice is computed
    once.
    """

    def __init__(self, acts: Capture, matrices: Mapping[str, Tensor]) -> None:
        self.acts, self.matrices, self.texts = acts, dict(matrices), acts.texts
        self._rotated: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._verdicts: dict[str, np.ndarray] = {}
        self._cast: dict[str, Tensor] = {}

    def put(self, name: str, R: Tensor) -> None:
        """A new rotation, or another one under a name that is there."""
        self.matrices[name] = R
        self._cast.pop(name, None)
        for key in [key for key in self._rotated if key[1] == name]:
            del self._rotated[key]

    def matrix(self, name: str, x: Tensor) -> Tensor:
        """A rotation in the rows' own dtype."""
        if name not in self._cast:
            self._cast[name] = self.matrices[name].to(x)
        return self._cast[name]

    def rotated(self, site: str, name: str) -> Tensor:
        """x @ R of a site (tokens, channels)."""
        key = (site, name)
        if key not in self._rotated:
            x = self.acts.rows(site)
            self._rotated[key] = x if name == "NR" else x @ self.matrix(name, x)
            while len(self._rotated) > KEPT:
                self._rotated.popitem(last=False)
        self._rotated.move_to_end(key)
        return self._rotated[key]

    def verdicts(self, site: str) -> np.ndarray:
        """The rules that call each token of a site massive (tokens,), joined by commas."""
        if site not in self._verdicts:
            self._verdicts[site] = errors.massive_names(self.acts, sites=[site])[0]
        return self._verdicts[site]

    def table(self, site: str, quantizer: QuantSpec) -> pd.DataFrame:
        """Each token's E(x R) at a site: site, token, text, massive, and a column a rotation, as
        `errors.wide` of `errors.token_errors` has them.
        """
        found = {name: squared_error(self.rotated(site, name), quantizer).numpy() for name in self.matrices}
        about = {
            "site": site,
            "token": np.arange(len(self.texts)),
            "text": self.texts,
            "massive": self.verdicts(site),
        }
        return pd.DataFrame({**about, **found})

    def values(self, site: str, token: int, names: Sequence[str], quantizer: QuantSpec) -> pd.DataFrame:
        """One token before and after quantization (Fig. 4): rotation, channel, value, quantized."""
        x = self.acts.rows(site)
        return errors.massive_values(
            self.acts, site, token, {name: self.matrix(name, x) for name in names}, quantizer
        )


def levels(value: np.ndarray, quantizer: QuantSpec) -> np.ndarray:
    """All values the quantizer can give a row of these values (channels,), lowest first."""
    scale, zero = scale_zero(torch.from_numpy(value.copy())[None], quantizer)
    low, high = code_range(quantizer)
    return ((torch.arange(low, high + 1) - zero) * scale)[0].numpy()


def is_massive(table: pd.DataFrame) -> np.ndarray:
    """Which tokens are drawn as massive (tokens,)."""
    return table["massive"].str.contains(MASSIVE_RULES).to_numpy()


def seeded(channels: int, seed: int) -> dict[str, Tensor]:
    """RO and RH of a seed."""
    return {kind: rotations.make(RotationSpec(kind=kind, seed=seed), channels) for kind in SEEDED}


def static(table: pd.DataFrame, axes: Sequence[str], title: str) -> Figure:
    """The scatter as a matplotlib figure: two axes or three, massive tokens marked."""
    with figures.theme():
        fig = Figure(figsize=(6.4, 5.2), layout="constrained")
        if len(axes) == 2:
            figures.plot_error_pair(table, *axes, ax=fig.add_subplot()).legend(fontsize=8)
        else:
            ax = fig.add_subplot(projection="3d")
            heavy = is_massive(table)
            for part, colour, size in (
                (table[~heavy], base.ORDINARY_COLOUR, 6),
                (table[heavy], base.MASSIVE_COLOUR, 30),
            ):
                ax.scatter(*(part[name] for name in axes), c=colour, s=size)
            ax.set(**{f"{letter}label": f"E({name})" for letter, name in zip("xyz", axes, strict=True)})
        fig.suptitle(title, fontsize=10)
    return fig


def static_token(values: pd.DataFrame, quantizer: QuantSpec, title: str) -> Figure:
    """Fig. 4 of one token as a matplotlib figure: a panel a rotation, the grid's levels drawn."""
    names = list(dict.fromkeys(values["rotation"]))
    with figures.theme():
        fig = Figure(figsize=(2.9 * len(names), 3.2), layout="constrained")
        for ax, name in zip(fig.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            figures.plot_massive_values(values, name, ax=ax)
            for level in levels(values.loc[values["rotation"] == name, "value"].to_numpy(), quantizer):
                ax.axhline(level, c=base.GREY, lw=0.5, zorder=0)
        fig.suptitle(title, fontsize=10)
    return fig
