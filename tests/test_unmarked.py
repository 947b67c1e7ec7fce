"""A model in which no rule marks a token: everything ends with what can be had, and says so in one line."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT, save_tiny
from matplotlib.figure import Figure

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.errors.widget import Errors as errors_explorer
from dfrot_lab.explore.massive.numbers import look, sentence, token_table
from dfrot_lab.explore.refinement import Refinement
from dfrot_lab.model import loading
from dfrot_lab.observe import capture, errors, massive
from dfrot_lab.recipe.specs import MASSIVE_RULES
from dfrot_lab.rotate import dfrot
from dfrot_lab.show import gallery, report
from dfrot_lab.show.experiment_figures import FIGURES
from dfrot_lab.show.theme import theme
from dfrot_lab.study import experiments, main
from dfrot_lab.study.setting import Setting

NONE = "no token is massive here"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setting, Store]:
    folder = tmp_path_factory.mktemp("plain")
    model = save_tiny(folder / "m", plant=False)
    (folder / "text.txt").write_text(TEXT)
    sizes: dict[str, Any] = {
        "windows": 2,
        "window": 64,
        "gptq_windows": 2,
        "steps": 4,
        "builds": 2,
        "quick": True,
    }
    setting = Setting(model=model, corpus=str(folder / "text.txt"), weights="rtn", **sizes)
    return setting.resolved(), Store(folder / "store")


@pytest.fixture(scope="module")
def recorded(lab: tuple[Setting, Store]) -> capture.Capture:
    return capture.capture(lab[0].capture, lab[1])


def texts(figure: Figure) -> str:
    """All that is written on a figure."""
    return " ".join(text.get_text() for text in figure.findobj(lambda each: hasattr(each, "get_text")))


@pytest.mark.parametrize("rule", MASSIVE_RULES)
def test_no_rule_marks_a_token_and_each_says_so(recorded: capture.Capture, rule: str):
    assert not massive.find(recorded, rule).any()
    assert massive.doubt(recorded, rule) == (
        f"no token is massive by {rule}: there is none to look at, and gamma has no effect"
    )
    assert set(errors.summary(errors.token_errors(recorded, rule=rule))["tokens"]) == {"ordinary"}
    assert massive.table(recorded).empty


def test_the_main_job_its_figures_and_its_report_end(lab: tuple[Setting, Store], tmp_path: Path):
    setting, store = lab
    result = main.run(setting, store)
    assert len(result.found) == len(main.recipes(main.rows_by_build(main.rows, setting)))
    written = gallery.save(result, tmp_path / "rows.jsonl", tmp_path / "figures")
    assert all(path.is_file() for path in written)
    nothing = "No token of the first calibration window is massive by any rule."
    assert gallery.report(result).startswith(nothing)
    page = report.page(report.values(report.collect(setting, store)))
    said = (nothing, "no token is massive by ratio_8", "none being massive there")
    assert all(words in page for words in said) and ">nan<" not in page
    with theme():
        drawn = gallery.main_figures(result, result.errors(result.capture.sites[:1]))
    assert NONE in texts(drawn["token-errors"][0])
    assert "Refining R1, no row massive" in texts(drawn["residual-and-refinement"][0])
    assert "massive rows" not in texts(drawn["residual-and-refinement"][0])


@pytest.mark.parametrize(
    "name", [name for name in experiments.EXPERIMENTS if name not in ("main", "zero-shot")]
)
def test_every_experiment_and_its_figure_end(lab: tuple[Setting, Store], name: str, tmp_path: Path):
    setting, store = lab
    table = experiments.run(name, setting, store)
    assert len(table)
    with theme():
        figure = FIGURES[name](table)
    if name == "massive-magnitudes":
        assert "No token is massive by Sun et al.'s rule" in texts(figure)
    assert gallery.save_experiment(name, table, setting, tmp_path, tmp_path, store)


def test_gamma_has_no_effect_and_that_is_said(lab: tuple[Setting, Store], caplog: pytest.LogCaptureFixture):
    setting, store = lab
    massive._warn_once.cache_clear()
    with caplog.at_level(logging.INFO):
        one, other = (dfrot.refined(setting.refine.with_(gamma=gamma), store) for gamma in (3.0, 300.0))
    assert torch.equal(one.R, other.R) and one.history["massive"].isna().all()
    assert sum("gamma has no effect" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(ValueError, match="finite where rule ratio_8 finds no massive row; got inf"):
        dfrot.refined(setting.refine.with_(gamma=float("inf")), store)


def test_the_explorers_show_ordinary_tokens(lab: tuple[Setting, Store], recorded: capture.Capture):
    setting, store = lab
    loaded = loading.load_model(setting.model, store)
    seen = look(loaded, torch.tensor(recorded.artefact.json("about")["ids"]))
    for rule in MASSIVE_RULES:
        assert sentence(token_table(seen, 1, rule), 1, rule).startswith(
            f"No token is massive here by rule {rule}."
        )
    view = errors_explorer(recorded, store=store)
    assert "64 tokens, none massive." in view.status.text and "massive by no rule" in view.about.value
    assert NONE in texts(view.static())
    live = Refinement(recorded, store)
    live.job.wait(60)
    live.state.steps = 3
    live.start()
    live.job.wait(60)
    assert "none massive, distance" in live.status.text
    assert "no row massive" in texts(live.static())
