"""The paper's numbers beside ours: all 599 are kept, each has a number of ours or a reason, and ours are
those of the experiments' tables.
"""

import math
from pathlib import Path

import pandas as pd
import pytest

from dfrot_lab.maths import tables
from dfrot_lab.show import figures
from dfrot_lab.study import paper
from dfrot_lab.study.experiments import EXPERIMENTS

ROOT = Path(__file__).parents[1]
NUMBERS = paper.published(ROOT / "data" / "paper" / "published.csv")


def row(rotation: str, value: float, seed: int | None = 0, **changes) -> dict:
    """A perplexity row as an experiment's table has it."""
    about = {"model": "smollm2-135m", "rotation": rotation, "gamma": None, "weights": "gptq", "seed": seed}
    about |= {"bits": "4-4-16", "keep_out": False, "builds": 6}
    about |= {"metric": tables.PERPLEXITY, "value": value}
    return about | changes


def place(lines: pd.DataFrame, **columns) -> pd.Series:
    """The one line of a table with these values."""
    for name, value in columns.items():
        lines = lines[lines[name] == value]
    assert len(lines) == 1, f"{len(lines)} lines with {columns}"
    return lines.iloc[0]


def test_all_published_numbers_are_kept_as_printed():
    assert len(NUMBERS) == 599
    assert NUMBERS["printed"].map(str).str.len().gt(0).all()
    assert set(NUMBERS["source"]) == {"v4", "README", "REV", "T"}
    words = NUMBERS[NUMBERS["value"].isna()]["printed"]
    assert set(words) == {"NaN"}, "what is no number in the paper is a NaN the paper prints"
    assert (
        place(NUMBERS, table="T1", method="QuaRot-RO", w_a_kv_bits="4-4-16", model="LLaMA2-7B")["value"]
        == 7.71
    )
    assert math.isinf(
        place(NUMBERS, table="T1", method="GPTQ", w_a_kv_bits="4-4-4", model="LLaMA2-13B")["value"]
    )


def test_no_number_is_there_twice():
    assert not NUMBERS.duplicated([*paper.PLACE, "source", "model"]).any()


def test_a_file_without_the_columns_is_refused_by_name(tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text("source,table,value\nv4,T1,3\n")
    with pytest.raises(
        ValueError, match=r"numbers\.csv must have the columns .* lacks .*method, metric, model"
    ):
        paper.published(path)


def test_without_a_measurement_every_number_has_a_reason():
    both = paper.beside(NUMBERS, paper.ours({}))
    assert len(both) == 599
    assert both["ours"].isna().all()
    assert (both["why"] != "").all()
    reasons = both.groupby("why").size()
    assert reasons[reasons.index.str.startswith("needs items")].sum() == 111, (
        "72 averages of nine, 12 of MMLU, 27 of three tasks"
    )
    assert reasons[reasons.index.str.startswith("not measured yet")].sum() > 200


def test_a_row_s_mean_over_builds_and_their_number_stand_in_its_place():
    table = pd.DataFrame(
        [
            row("RO", 55.0),
            row("RO", 45.0, keep_out=True),
            row("RO", 99.0, metric=tables.change("RH")),
            row("RH", 42.0),
            row("NR", 9e4, None, builds=1),
            row("RH", 7.0, weights="rtn"),
        ]
    )
    ours = paper.ours({"keep-out": table})
    found = place(ours, method="QuaRot-RO")
    assert (found["value"], found["builds"], found["table"], found["metric"]) == (
        55.0,
        6,
        "T1",
        "wikitext2_ppl",
    )
    assert place(ours, method="QuaRot-RO.FP16()")["value"] == 45.0
    assert (place(ours, method="GPTQ")["value"], place(ours, method="GPTQ")["builds"]) == (9e4, 1)
    assert place(ours, method="QuaRot-RH")["value"] == 42.0, "the paper's Table 1 is by GPTQ"
    assert set(ours["command"]) == {"dfrot-lab experiment keep-out"}


def test_ours_stand_beside_every_model_s_number_and_nothing_is_lost():
    both = paper.beside(NUMBERS, paper.ours({"keep-out": pd.DataFrame([row("RO", 55.0)])}))
    assert len(both) == 599
    mine = both[(both["table"] == "T1") & (both["method"] == "QuaRot-RO") & (both["w_a_kv_bits"] == "4-4-16")]
    assert len(mine) == 5
    assert (mine["ours"] == 55.0).all()
    assert (mine["why"] == "").all()


def test_another_model_s_command_says_so():
    ours = paper.ours({"keep-out": pd.DataFrame([row("RO", 7.7, model="hub:meta-llama/Llama-2-7b-hf")])})
    assert (
        place(ours, method="QuaRot-RO")["command"]
        == "dfrot-lab experiment keep-out --model hub:meta-llama/Llama-2-7b-hf"
    )


def test_rtn_has_its_own_place_and_full_precision_too():
    rows = [row("NR", 300.0, None, weights="rtn"), row("RH", 80.0, weights="rtn"), row("RH", 42.0)]
    rows += [row("NR", 22.0, None, weights=None, bits="16-16-16"), row("DFRot", 41.0)]
    table = pd.DataFrame(rows).assign(extra_minutes=[0.0, 0.0, 0.0, 0.0, 0.25])
    ours = paper.ours({"main-table": table})
    old = ours[ours["table"] == "T2old"]
    assert place(old, method="RTN", weight_quantizer="rtn")["value"] == 300.0
    assert place(old, method="QuaRot-RH", weight_quantizer="rtn")["value"] == 80.0
    assert place(old, method="FP16", weight_quantizer="none", w_a_kv_bits="16-16-16")["value"] == 22.0
    assert place(old, metric="extra_minutes_A100")["value"] == 0.25


def test_the_gamma_sweep_s_notes_are_the_paper_s():
    gammas = (1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, math.inf)
    rows = [
        row("DFRot", 40.0 + n, gamma=g, init=kind, line="DFRot")
        for kind in ("RH", "RO")
        for n, g in enumerate(gammas)
    ]
    rows += [row(kind, 50.0, init=kind, line="QuaRot") for kind in ("RH", "RO")]
    rows.append(row("RH", 30.0, init="RH", line="QuaRot.FP16()", keep_out=True))
    both = paper.beside(NUMBERS, paper.ours({"gamma-sweep": pd.DataFrame(rows)}))
    of_figures = both[both["table"].isin(["F5", "F6"])]
    assert len(of_figures) == 84 and of_figures["ours"].notna().all()
    assert set(of_figures[of_figures["method"] == "QuaRot-RH.FP16()"]["ours"]) == {30.0}


def test_calibration_s_notes_are_the_paper_s():
    ways = (
        [("sample", str(n)) for n in range(5)]
        + [("rows", f"{n} x 2048") for n in (48, 32, 24, 16, 8)]
        + [("text", "a -> b")]
    )
    rows = [row("DFRot", 40.0, varied=varied, level=level) for varied, level in ways]
    both = paper.beside(NUMBERS, paper.ours({"calibration": pd.DataFrame(rows)}))
    assert both[both["table"] == "T3"]["ours"].notna().all()


def test_tasks_are_in_percent_and_acc_norm_where_there_is_one():
    rows = []
    for name in (
        "plain transformers",
        "NR 16-16-16",
        "RH 16-16-16",
        "RO 4-4-16",
        "RH 4-4-16",
        "DFRot 4-4-16",
    ):
        rows += [
            {"row": name, "task": "piqa", "metric": metric, "value": value}
            for metric, value in (("acc", 0.5), ("acc_norm", 0.6))
        ]
        rows.append({"row": name, "task": "winogrande", "metric": "acc", "value": 0.7})
    ours = paper.ours({"zero-shot": pd.DataFrame(rows).assign(model="smollm2-135m")})
    assert set(ours["method"]) == {"FP16", "QuaRot-RO", "QuaRot-RH", "DFRot"}
    ours = ours[ours["table"] == "zero-shot"]
    assert place(ours, method="DFRot", metric="acc_piqa")["value"] == 60.0
    assert place(ours, method="FP16", metric="acc_winogrande")["value"] == 70.0


def test_the_massive_token_s_error_is_that_of_its_values():
    lines = [
        {"rotation": name, "site": site, "value": 1.0, "quantized": 1.0 - error, "model": "smollm2-135m"}
        for site in ("layers.14.input_norm", "layers.15.input_norm")
        for name, error in (
            ("NR", 2.0),
            ("RO", 3.0),
            ("RH", 1.0),
            ("DFRot", 0.5 if site.startswith("layers.15") else 9.0),
        )
    ]
    ours = paper.ours({"massive-token": pd.DataFrame(lines)})
    assert ours.set_index("method")["value"].to_dict() == {"NR": 4.0, "RO": 9.0, "RH": 1.0, "DFRot": 0.25}


@pytest.mark.parametrize("table", sorted(set(NUMBERS["table"])))
def test_a_table_shows_all_its_numbers_as_printed_and_ours_last(table):
    both = paper.beside(NUMBERS, paper.ours({}))
    spread = paper.spread(both, table)
    part = NUMBERS[NUMBERS["table"] == table]
    assert list(spread.columns)[-1] == "ours"
    assert spread.drop(columns="ours").notna().sum().sum() == len(part)
    assert sorted(spread.drop(columns="ours").melt()["value"].dropna().astype(str)) == sorted(
        part["printed"].astype(str)
    )


def test_a_row_of_the_appendix_has_the_average_that_table_2_prints():
    """Its numbers were taken from a transcript, so this is what says that they are right."""
    rows = NUMBERS[NUMBERS["table"] == "T5"].groupby(["model", "method", "w_a_kv_bits"])["value"]
    averages = NUMBERS[(NUMBERS["table"] == "T2") & (NUMBERS["metric"] == "acc_average9")]
    assert len(rows) == 9 and set(rows.count()) == {9}
    for (model, method, bits), mean in rows.mean().items():
        printed = place(averages, model=model, method=method, w_a_kv_bits=bits)["value"]
        assert mean == pytest.approx(printed, abs=0.006)


def compared(rotation: str, value: float, verdict: str, *, to: str = "RH", **about) -> dict:
    """A change against another row, with an interval of one percent to both sides."""
    own = {"metric": tables.change(to), "ci95": [value - 1, value + 1], "verdict": verdict}
    return row(rotation, value, **own | about)


def test_changes_are_those_of_each_model_and_ours_with_its_interval():
    table = pd.DataFrame([
        compared("RO", 27.0, "worse"), compared("RO", -16.0, "better", to="RO", keep_out=True),
        compared("DFRot", 9.0, "worse", bits="4-4-4"), compared("KLT", 3.0, "worse"),
    ])  # fmt: skip
    found = paper.changes(NUMBERS, table)
    ro = found[(found["comparison"] == "RO against RH") & (found["bits"] == "4-4-16")]
    by = ro.set_index("model")["change"]
    assert by["LLaMA2-7B"] == pytest.approx(100 * (7.71 / 6.20 - 1)) and by["ours"] == 27.0
    assert set(by.index) == {"LLaMA-7B", "LLaMA2-7B", "LLaMA2-13B", "LLaMA3-8B", "Mistral-7B-v0.3", "ours"}
    mine = place(ro, model="ours")
    assert (mine["low"], mine["high"], mine["verdict"]) == (26.0, 28.0, "worse")
    kept = found[(found["comparison"] == "RO kept out against RO") & (found["model"] == "ours")]
    assert kept["change"].tolist() == [-16.0]


@pytest.mark.parametrize(
    ("verdict", "bits", "count", "said"),
    [
        ("worse", "4-4-16", "5 worse", "the same"),
        ("better", "4-4-16", "5 worse", "no"),
        ("cannot tell", "4-4-16", "5 worse", "cannot tell"),
        ("better", "4-8-16", "4 level, 1 better", "as some of them"),
    ],
)
def test_whether_ours_says_the_same_as_all_of_theirs(verdict, bits, count, said):
    found = paper.agreement(paper.changes(NUMBERS, pd.DataFrame([compared("RO", 2.0, verdict, bits=bits)])))
    assert len(found) == 1, "a comparison that we have not measured has no line"
    line = found.iloc[0]
    assert (line["their models"], line["as theirs"]) == (count, said)
    assert line["ours"] == f"+2.0% [1.0, 3.0] {verdict}" and line["from, %"] <= line["to, %"]


def test_the_picture_of_it_has_a_panel_a_comparison_and_a_dot_a_model():
    table = pd.DataFrame([compared("RO", 27.0, "worse"), compared("DFRot", -2.0, "cannot tell")])
    fig = figures.figure_agreement(paper.changes(NUMBERS, table))
    assert [ax.get_title() for ax in fig.axes] == list(paper.COMPARED)
    theirs, ours = fig.axes[0].collections[0], fig.axes[0].collections[-1]
    assert len(theirs.get_offsets()) == 5 * 2 + 5 and ours.get_offsets()[0][0] == 27.0
    figures.plt.close(fig)


def test_every_reader_is_an_experiment():
    assert set(paper._READERS) <= set(EXPERIMENTS)
