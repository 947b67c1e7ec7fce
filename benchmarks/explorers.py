"""From a moved control to new data in the explorers' plots, in Python: `python benchmarks/explorers.py`.

The bar is 0.3 s at 2048 tokens. Baseline: the same view made anew, as a notebook cell without the explorers
would: the table and a whole new figure. The default model; the time the browser takes to draw comes on top.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go
from common import Row, options, report, seconds

from dfrot_lab import explore
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.massive.numbers import token_table
from dfrot_lab.observe import errors
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.grids import QuantSpec

TOKENS, RUNS, BAR_S = 2048, 9, 0.3
MOVES: dict[str, Iterable[object]] = {
    "bits": (3, 4, 5, 6),
    "clip": (0.9, 0.8, 0.7),
    "symmetric": (False, True),
    "site": [f"layers.{layer}.input_norm" for layer in range(16, 30)],
    "seed": range(1, 100),
    "token": range(TOKENS),
}
"""Control of the errors explorer: the values it is moved to; a site and a seed are new at each move."""


def mover(control: Any, values: Iterable[object]) -> Callable[[], None]:
    """Each call moves the control to its next value."""
    places = itertools.cycle(values)
    return lambda: setattr(control, "value", next(places))


def new_heat_map(top: Any) -> None:
    """A layer's table and a heat map of all its tokens and channels."""
    seen, layer = top.seen, top.state.layer
    token_table(seen, layer, top.state.rule)
    go.FigureWidget(go.Heatmap(z=np.log10(seen.streams[layer].abs().T.numpy() + 1e-3)))


def new_scatter(top: Any) -> None:
    """A site's error table and a scatter of it."""
    rows = top.rows
    table = errors.wide(
        errors.token_errors(
            rows.acts, rows.matrices, [QuantSpec(bits=top.state.bits)], sites=[top.state.site]
        )
    )
    go.FigureWidget(go.Scattergl(x=table["RO"], y=table["RH"], mode="markers", text=table["text"]))


def row(explorer: str, what: str, move: Callable[[], None], baseline: float) -> Row:
    """One control's row; the note says whether it holds the bar in seconds."""
    ours = seconds(move, RUNS)
    return Row(
        "explorers",
        f"{explorer}, {what}",
        ours,
        baseline,
        at_least=True,
        note=f"{'within' if ours < BAR_S else 'beyond'} {BAR_S:g} s",
    )


def main() -> None:
    """Measure and print."""
    given = options(__doc__).parse_args()
    store = Store()
    acts = capture(store=store)
    top = explore.massive(acts, store=store, tokens=TOKENS)
    baseline = seconds(lambda: new_heat_map(top))
    layers = range(len(top.seen.streams))
    rows = []
    for view in ("heat map", "3-D"):
        top.controls["view"].value = view
        rows.append(row("massive", f"layer, {view}", mover(top.controls["layer"], layers), baseline))
    top = explore.errors(acts, store=store)
    baseline = seconds(lambda: new_scatter(top))
    rows += [
        row("errors", name, mover(top.controls[name], values), baseline) for name, values in MOVES.items()
    ]
    report(rows, given.out)


if __name__ == "__main__":
    main()
