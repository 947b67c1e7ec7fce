"""Every experiment has a figure, which draws its table whole; table and figure are kept together, and a
stopped write leaves what was there.
"""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_experiments import EVALUATING, LOOKING, Lab, lab  # noqa: F401 (a fixture is used by its name)

from dfrot_lab.disk import row_files
from dfrot_lab.maths import tables
from dfrot_lab.show import figures, gallery
from dfrot_lab.show.experiment_figures import ORDER_COLOURS, ORDER_MARKERS
from dfrot_lab.study.experiments import EXPERIMENTS


def test_every_experiment_has_a_figure_and_every_figure_an_experiment():
    assert set(gallery.FIGURES) == set(EXPERIMENTS)


def drawn(name: str, table: pd.DataFrame) -> Figure:
    with figures.theme():
        figure = gallery.FIGURES[name](table)
        figure.canvas.draw()  # what cannot be laid out or labelled fails here
    return figure


def marks(figure: Figure) -> int:
    """Lines and scattered collections that hold data."""
    return sum(len(ax.lines) + len(ax.collections) for ax in figure.axes)


@pytest.mark.parametrize("name", [*EVALUATING, *LOOKING])
def test_each_figure_draws_its_experiment_s_table(lab: Lab, name):  # noqa: F811
    figure = drawn(name, lab.table(name))
    assert marks(figure) > 0
    assert all(ax.get_xlabel() or ax.get_title() for ax in figure.axes), "an axis says what it shows"
    plt.close(figure)


def test_tasks_are_drawn_with_their_errors():
    tasks = ("piqa", "winogrande", "average of six")
    rows = [
        {"row": row, "task": task, "metric": "acc", "value": value, "stderr": 0.05, "items": 100}
        | {"rotation": row.split()[0] if "4-4" in row else None}
        for row, value in (("plain transformers", 0.5), ("RO 4-4-16", 0.4), ("DFRot 4-4-16", 0.45))
        for task in tasks
    ]
    figure = drawn("zero-shot", pd.DataFrame(rows))
    assert [ax.get_title() for ax in figure.axes] == list(tasks)
    ax = figure.axes[0]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["plain transformers", "RO 4-4-16", "DFRot 4-4-16"]
    assert [float(line.get_xdata()[0]) for line in ax.lines] == pytest.approx([50, 40, 45])
    bars = [bar.get_segments()[0][:, 0] for bar in ax.collections]
    assert np.concatenate(bars) == pytest.approx([45, 55, 35, 45, 40, 50])
    plt.close(figure)


def test_colours_and_markers_tell_the_orders_apart():
    assert len(set(ORDER_COLOURS.values())) == len(set(ORDER_MARKERS.values())) == 6


@pytest.mark.parametrize(("limit", "ending"), [(5000, "jsonl"), (3, "parquet")])
def test_table_and_figure_are_kept_with_what_they_were_made_from(
    lab: Lab,  # noqa: F811
    tmp_path,
    monkeypatch,
    limit,
    ending,
):
    monkeypatch.setattr(gallery, "SMALL", limit)
    table = lab.table("clip-sweep")
    written = gallery.save_experiment(
        "clip-sweep", table, lab.setting, tmp_path / "tables", tmp_path / "figures"
    )
    assert [path.name for path in written] == [f"clip-sweep-text.{ending}", "clip-sweep.png"]
    if ending == "jsonl":
        lines = [json.loads(line) for line in written[0].read_text().splitlines()]
        assert [line["value"] for line in lines] == pytest.approx(table["value"].tolist())
    else:
        assert pd.read_parquet(written[0])["value"].tolist() == table["value"].tolist()
    about = json.loads(written[1].with_suffix(".json").read_text())
    assert (about["experiment"], about["rows"]) == ("clip-sweep", len(table))
    assert set(about["recipes"]) == set(table["recipe"])
    assert written[1].with_suffix(".svg").exists()


def test_replacing_a_table_leaves_the_old_one_where_writing_fails(tmp_path):
    path = tmp_path / "rows.jsonl"
    row_files.replace(path, [{"value": 1}])
    with pytest.raises(TypeError):
        row_files.replace(path, [{"value": 2}, {"value": object()}])
    assert path.read_text() == '{"value": 1}\n'
    row_files.replace(path, [{"value": 3}])
    assert path.read_text() == '{"value": 3}\n'


def test_a_kept_table_is_read_where_its_setting_is_the_same_and_computed_where_not(
    lab: Lab,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    table = lab.table("gamma-sweep")
    gallery.save_experiment(
        "gamma-sweep", table, lab.setting, tmp_path / "data" / "results", tmp_path / "figures" / "text"
    )
    computed = []
    monkeypatch.setattr(
        gallery.experiments, "run", lambda name, setting: computed.append((name, setting)) or table
    )
    read = gallery.table("gamma-sweep", lab.setting, tmp_path)
    assert not computed and list(read.columns) == list(table.columns)
    assert read["value"].tolist() == pytest.approx(table["value"].tolist())
    assert (
        read["gamma"].fillna(-1).tolist() == table["gamma"].fillna(-1).tolist()
        and float("inf") in read["gamma"].tolist()
    )
    assert {name: str(read[name].dtype) for name in tables.WHOLE} == {name: "Int64" for name in tables.WHOLE}
    plt.close(drawn("gamma-sweep", read))
    other = lab.setting.with_(seed=7)
    gallery.table("gamma-sweep", other, tmp_path)
    gallery.table("clip-sweep", lab.setting, tmp_path)
    assert computed == [("gamma-sweep", other), ("clip-sweep", lab.setting)]
