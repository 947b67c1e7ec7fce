"""What is computed twice, compared: a product or a sum may round otherwise where its matrix lies elsewhere in
memory, on any machine.

So bits are compared only where nothing is computed twice: what is copied, stored and read back, chosen,
counted, or changed value by value. The tolerances below were found by adding noise of one unit in the last
place to every product and sum, and lie far below what the tests must see.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.rotate import dfrot
from dfrot_lab.rotate.steps import Refined

FLOAT32, FLOAT64 = 1e-5, 1e-12
"""Of the largest value: what some products and sums in a row, as a tiny model has them, leave of the equality
(measured: 5e-7 and 1e-14).
"""
FLIPPED = 5e-4
"""Of a window's loss: at the border of two codes the last bit decides on a whole step, which moves the loss
by up to 4e-4. It is rare.
"""
NOTICED = 1e-4
"""Of a window's loss: what another choice must make of it at least, ten times what rounding does."""
FLIPPED_PERPLEXITY = 0.01
"""Of a perplexity of e^5.9, which moves by 5.9 times as much as its loss."""
REFINED = 1e-6
"""Of a whole refinement in float64 on rows that fix R: no code is so near a border, and 25 steps make 1e-14
into 1e-9 (momentum: 1e-7).
"""


def apart(found: Any, wanted: Any) -> float:
    """The largest difference over the largest wanted value; NaN, which compares false, where one is not
    finite. Shapes and dtypes must be equal.
    """
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, (
        found.shape,
        wanted.shape,
        found.dtype,
        wanted.dtype,
    )
    found, wanted = (
        np.asarray(each.detach().double() if isinstance(each, Tensor) else each, dtype=np.float64)
        for each in (found, wanted)
    )
    largest = float(np.abs(wanted).max()) if wanted.size else 0.0
    return float(np.abs(found - wanted).max()) / (largest or 1.0) if wanted.size else 0.0


def assert_near(found: Any, wanted: Any, by: float = FLOAT32) -> None:
    """Of two computations of one tensor or array."""
    assert apart(found, wanted) <= by, (
        f"apart by {apart(found, wanted):.2g} of the largest value, more than {by:g}"
    )


def assert_same_refinement(found: Refined, wanted: Refined) -> None:
    """R and every number of the history, whose dtype a stored one may have changed."""
    assert_near(found.R, wanted.R, REFINED)
    pd.testing.assert_frame_equal(
        found.history, wanted.history, rtol=REFINED, atol=REFINED, check_dtype=False, check_like=True
    )


def stop_at_second(kept: list[Any]) -> Callable[[Any], None]:
    """A checkpoint that keeps what it sees in `kept`, and at the second one stops the run as Ctrl-C does."""

    def checkpoint(state: Any) -> None:
        kept.append(copy.deepcopy(state))
        if len(kept) == 2:
            raise KeyboardInterrupt

    return checkpoint


@contextmanager
def float64_refinements() -> Iterator[None]:
    """Refinements in float64: in float32, with massive rows weighted by 10,000, the last bit of a product
    decides on the R that is found.
    """
    sample = dfrot.sample_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dfrot, "sample_rows", lambda *arguments: (sample(*arguments)[0].double(), sample(*arguments)[1])
        )
        yield


def sharing(store: Store, root: Path, *kinds: str) -> Store:
    """Another store that holds `store`'s artefacts of some kinds and no other: a refinement of rows that
    differ in the last bit is another one.
    """
    root.mkdir(parents=True)
    for kind in kinds:
        (store.root / kind).mkdir(parents=True, exist_ok=True)
        (root / kind).symlink_to(store.root / kind, target_is_directory=True)
    return Store(root)
