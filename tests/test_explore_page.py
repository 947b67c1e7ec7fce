"""What makes plotly's figures at home in a page, as far as it can be seen without one: batches that are
whole, plots that stay.
"""

import numpy as np
from plotly.basedatatypes import Undefined

from dfrot_lab.explore import base


def sent(plot) -> list[dict]:
    """The batches that go to the page from now on."""
    batches: list[dict] = []
    plot.observe(lambda change: change["new"] and batches.append(change["new"]), "_py2js_update")
    return batches


def test_a_batch_says_what_it_does_not_change():
    plot = base.figure()
    plot.add_heatmap(y=np.array([0.0, 3.0]))
    plot.add_scatter()
    batches = sent(plot)
    with plot.batch_update():
        plot.data[0].z = [[1.0], [2.0]]
        plot.data[1].update(x=[5], y=[6])
    (batch,) = batches
    style = batch["style_data"]
    assert not any(value is Undefined for values in style.values() for value in values)
    assert style["y"][0].tolist() == [0.0, 3.0] and list(style["y"][1]) == [6]
    assert style["x"][0] is None and style["z"][1] is None
    assert plot.data[0].y.tolist() == [0.0, 3.0]


def test_figures_follow_the_page_and_keep_their_height():
    plot = base.figure(300)
    assert plot._config == {"responsive": True, "displaylogo": False}
    assert plot.layout.height == 300 and plot.layout.width is None


def test_a_stage_shows_one_plot_and_keeps_the_others_on_the_page():
    first, second = base.figure(), base.figure()
    stage = base.Stage(first, width="60%")
    (box,) = stage.children
    stage.turn(second)
    assert stage.shown is second
    assert stage.children[0] is box and [part.layout.display for part in stage.children] == ["none", None]
    stage.turn(first)
    assert len(stage.children) == 2 and [part.layout.display for part in stage.children] == [None, "none"]
