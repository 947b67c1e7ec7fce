"""What the report's own script (`report.js`) draws, as plain values: tokens under rotations, and a dial."""

from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from dfrot_lab.maths import dial
from dfrot_lab.maths.quantizers import levels
from dfrot_lab.observe import massive
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.show.theme import VISIBLE, visible
from dfrot_lab.study.main import MainResult

ROTATIONS = ("NR", "RO", "RH", "DFRot")
PAIRS = (("RO", "RH"), ("NR", "RO"), ("NR", "RH"), ("RH", "DFRot"))  # across, up; the first at the start
STEPS, BINS, DIGITS = 24, 60, 4
LARGEST = 2048  # channels up to which the way to a rotation is found in seconds


def tokens(wide: pd.DataFrame) -> dict[str, Any]:
    """Every token of `errors.wide` at one site: its `texts` to read, which are `massive`, their `errors` by
    rotation, and the `pairs` of rotations that can be compared."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(wide.columns)]
    texts = [visible(text).replace(VISIBLE[" "], " ") for text in wide["text"]]
    errors = {name: rounded(wide[name]) for name in ROTATIONS if name in wide}
    return {"pairs": pairs, "texts": texts, "massive": wide["massive"].tolist(), "errors": errors}


def rounded(values: Any) -> list[float | None]:
    """Numbers with a few digits; none where one is not finite."""
    numbers = np.asarray(values, dtype=float)
    return [float(f"{x:.{DIGITS}g}") if np.isfinite(x) else None for x in numbers.tolist()]


def turning(result: MainResult, site: str, token: int) -> dict[str, Any]:
    """A token of the capture on the way to each rotation there is, in STEPS: `ways`, empty for a
    model of more than LARGEST channels."""
    rows, quantizer = result.capture.rows(site), result.setting.refine.quantizer
    if rows.shape[1] > LARGEST:
        return {"ways": {}}
    heavy = massive.find(result.capture, result.setting.rule, [site])[0]
    heavy[token] = True
    x, others = rows[token].double(), dial.ordinary(rows, heavy)
    names = [name for name in ROTATIONS[:0:-1] if name in result.matrices]  # the best first
    ways = {name: _way(x, others, result.matrices[name], quantizer) for name in names}
    return {"channels": rows.shape[1], "ways": ways}


def _way(x: Tensor, others: Tensor, R: Tensor, quantizer: QuantSpec) -> dict[str, Any]:
    """Errors of a token and of ordinary ones, step by step, and how many of its values lie in which bin:
    `counts` from `low` on, each bin `width` wide; its grid's `levels`, the lowest and the step."""
    to = dial.way(R.cpu())
    line = dial.curve(x, others, to, quantizer, STEPS)
    frames = []
    for y in dial.turned(x[None], to, line["share"].tolist())[:, 0]:
        grid = levels(y, quantizer)
        counts, edges = dial.histogram(y, grid, BINS)
        low, width, *own = rounded([edges[0], edges[1] - edges[0], grid[0], grid[1] - grid[0]])
        frames.append({"counts": counts.tolist(), "low": low, "width": width, "levels": [*own, len(grid)]})
    return {"token": rounded(line["token"]), "ordinary": rounded(line["ordinary"]), "frames": frames}
