"""One site's tokens under every rotation, rotated once and quantized again at each move of a control."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.explore.shell.offers import levels
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.observe import errors
from dfrot_lab.observe.capture import Capture
from dfrot_lab.observe.massive import find
from dfrot_lab.recipe.specs import DEFAULT_RULE, QuantSpec

KEPT = 16
"""Rotated sites kept: of 2048 tokens and 576 channels 5 MB each."""


class ErrorRows:
    """A capture's rows under named rotations R (channels, channels); a site is rotated once."""

    def __init__(self, acts: Capture, matrices: Mapping[str, Tensor]) -> None:
        self.acts, self.matrices, self.texts = acts, dict(matrices), acts.texts
        self._rotated: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._verdicts: dict[str, np.ndarray] = {}

    def put(self, name: str, R: Tensor) -> None:
        """A new rotation, or another one under a name that is there."""
        self.matrices[name] = R
        for key in [key for key in self._rotated if key[1] == name]:
            del self._rotated[key]

    def rotated(self, site: str, name: str) -> Tensor:
        """x @ R of a site (tokens, channels)."""
        key = (site, name)
        if key not in self._rotated:
            x = self.acts.rows(site)
            self._rotated[key] = x if name == "NR" else x @ self.matrices[name].to(x)
            while len(self._rotated) > KEPT:
                self._rotated.popitem(last=False)
        self._rotated.move_to_end(key)
        return self._rotated[key]

    def verdicts(self, site: str) -> np.ndarray:
        """The rules that call each token of a site massive, in words (tokens,)."""
        if site not in self._verdicts:
            self._verdicts[site] = errors.massive_names(self.acts, sites=[site])[0]
        return self._verdicts[site]

    def table(self, site: str, quantizer: QuantSpec) -> pd.DataFrame:
        """Each token's E(x R) at a site, as `errors.wide` has them: site, token, text, massive, rotations."""
        found = {name: squared_error(self.rotated(site, name), quantizer).numpy() for name in self.matrices}
        tokens, massive = np.arange(len(self.texts)), find(self.acts, DEFAULT_RULE, [site])[0].numpy()
        return pd.DataFrame({"site": site, "token": tokens, "text": self.texts, "massive": massive, **found})

    def values(self, site: str, token: int, names: Sequence[str], quantizer: QuantSpec) -> pd.DataFrame:
        """One token before and after quantization (Fig. 4): rotation, channel, value, quantized."""
        if not 0 <= token < len(self.texts):
            raise ValueError(f"token must be in 0..{len(self.texts) - 1}; got {token}")
        matrices = {name: self.matrices[name] for name in names}
        return errors.massive_values(self.acts, site, token, matrices, quantizer)


def grids(values: pd.DataFrame, quantizer: QuantSpec) -> dict[str, np.ndarray]:
    """The levels of each rotation's grid for one token's `values`."""
    parts = values.groupby("rotation", sort=False)["value"]
    return {str(name): levels(torch.tensor(part.to_numpy()), quantizer).numpy() for name, part in parts}


def is_massive(table: pd.DataFrame) -> np.ndarray:
    """Which tokens are drawn as massive (tokens,)."""
    return table["massive"].to_numpy()
