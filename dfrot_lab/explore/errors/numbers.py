"""One site's tokens under every rotation, rotated once and quantized again at each move of a control."""

import functools
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
    """A capture's rows under named rotations R (channels, channels).

    `rotated(site, name)` is x @ R (tokens, channels), `verdicts(site)` the rules that call each token massive
    (tokens,), joined by commas; both are kept."""

    def __init__(self, acts: Capture, matrices: Mapping[str, Tensor]) -> None:
        self.acts, self.matrices, self.texts = acts, dict(matrices), acts.texts
        self.rotated = functools.lru_cache(KEPT)(self._rotated)
        self.verdicts = functools.cache(lambda site: errors.massive_names(acts, sites=[site])[0])

    def put(self, name: str, R: Tensor) -> None:
        """A new rotation, or another one under a name that is there."""
        self.matrices[name] = R
        self.rotated.cache_clear()

    def _rotated(self, site: str, name: str) -> Tensor:
        x = self.acts.rows(site)
        return x if name == "NR" else x @ self.matrices[name].to(x)

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
