"""A clip ratio for each site (learned ones: FlatQuant, arXiv 2410.09426): of a few the one with which the
site's grid loses least of calibration tokens. It scales the range that a quantizer takes anyway, so it costs
nothing when the model runs. A token counts by its squared error: large ones count most."""

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.model import hooks, stream
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.prefix import after
from dfrot_lab.recipe.grids import QuantSpec

KIND = "clips"
RATIOS = tuple(1 - step / 20 for step in range(13))  # 1 to 0.4: the error is flat about its least
EVERY = 4  # of a text's tokens every so many are looked at: their sum is known to 1%


def find(
    loaded: LoadedModel, ids: Tensor, quantizer: QuantSpec, online: hooks.Online, skip: int = 0
) -> dict[str, float]:
    """By site the clip ratio of the linears' inputs with the least squared error on a text `ids` (windows,
    window), but for the first tokens of each window to `skip`, while what is `online` acts. A site that no
    token reaches has none."""
    grids = [quantizer.with_(clip_ratio=ratio) for ratio in RATIOS]
    lost: dict[str, Tensor] = {}

    def see(site: str, x: Tensor) -> None:
        rows = after(x, skip).reshape(-1, x.shape[-1])[::EVERY].float()
        errors = torch.stack([squared_error(rows, grid).double().sum() for grid in grids])
        lost[site] = lost[site] + errors if site in lost else errors

    with online(function=see, sites=hooks.sites_of(loaded, *hooks.LINEAR_INPUTS)):
        stream.through(loaded, ids.split(1), "clips")
    return {site: RATIOS[int(errors.argmin())] for site, errors in lost.items() if errors.any()}
