"""A rotation method, a weight quantizer and a model family, each in one file and one line of a table: they
are offered, evaluated and shown wherever the others are.
"""

from collections.abc import Callable

import conftest
import pytest
from again import FLOAT32, NOTICED, apart, assert_near
from test_evaluate import RH, save_lively, spec_for
from toys import family
from typer.testing import CliRunner

from dfrot_lab.cli.app import app
from dfrot_lab.disk import row_files
from dfrot_lab.explore.generate.widget import Generate
from dfrot_lab.explore.page import PICKED
from dfrot_lab.explore.worth.widget import Worth
from dfrot_lab.maths import tables
from dfrot_lab.model.families import FAMILIES
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.base import MethodSpec
from dfrot_lab.recipe.registry import Choice
from dfrot_lab.recipe.specs import Recipe, WeightSpec
from dfrot_lab.score import rows
from dfrot_lab.score.perplexity import evaluate
from dfrot_lab.show import report
from dfrot_lab.study.setting import Setting


@pytest.fixture
def toys(monkeypatch):
    """One line each."""
    monkeypatch.setitem(registry.METHODS, "toy", Choice("toys.method", rows=("TOY",)))
    monkeypatch.setitem(registry.WEIGHTS, "down", Choice("toys.weights"))
    monkeypatch.setitem(FAMILIES, family.NAME, family.ROLES)


def help_page() -> str:
    """What `dfrot-lab --help` lists at its end."""
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output
    return " ".join(shown.split("What can be chosen")[1].split())


OFFERS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "the help page": (help_page, ("toy", "TOY", "down", family.NAME)),
    "rows by name": (registry.rows, ("TOY",)),
    "weight quantizers": (lambda: registry.WEIGHTS, ("down",)),
    "a mistyped rotation": (lambda: said(lambda: registry.spec_of("TOI")), ("TOY",)),
    "a mistyped method": (lambda: said(lambda: MethodSpec.of({"method": "toi"})), ("toy",)),
    "a mistyped quantizer": (lambda: said(lambda: WeightSpec(method="up")), ("down",)),
}
"""Places where a choice is offered: what is offered there (text, or names), and which toys must be in it."""


def said(mistake: Callable[[], object]) -> str:
    """The error of a mistake, which lists what there is."""
    with pytest.raises(ValueError, match=r"there are|must be one of") as caught:
        mistake()
    return str(caught.value)


@pytest.mark.parametrize("place", OFFERS)
def test_toys_are_offered_where_the_others_are(toys, place):
    offered, names = OFFERS[place]
    assert all(name in offered() for name in names)


@pytest.mark.parametrize("place", OFFERS)
def test_without_their_lines_they_are_not(place):
    offered, names = OFFERS[place]
    assert not any(name in offered() for name in names)


@pytest.fixture
def setting(tmp_path, text_file) -> Setting:
    """A tiny model's, with one window."""
    model = save_lively(tmp_path / "model")
    return Setting(model=model, corpus=str(text_file), windows=1, window=64, gptq_windows=1, builds=1)


@pytest.mark.parametrize("explorer", [Worth, Generate])
def test_toys_can_be_picked_in_explorers(toys, setting, store, explorer):
    """Picked first are this lab's own, which are found in seconds, and not all there is."""
    widget = explorer(setting, store)
    assert "TOY" in widget.controls["rotations"].options and set(PICKED) <= set(widget.state.rotations)
    widget.controls["rotations"].value = ("TOY",)
    assert widget.state.rotations == ("TOY",) and "SpinQuant" in widget.controls["rotations"].options
    assert "down" in widget.controls["weights"].options
    widget.state.weights = "down"
    found = setting.row("4-4-16", setting.method("TOY"), weights="down")
    assert (found.rotation.name, found.weights.method) == ("TOY", "down")


def test_toys_are_named_in_the_report(toys, setting, store):
    page = report.page(report.values(report.collect(setting, store)))
    assert (
        "OSTQuant R1, SmoothQuant, OptRot, DuQuant R1, DuQuant, FlatQuant, AWQ, OS+, TOY; rtn, gptq, gptaq, qep, foem, lwc, rsq, aespa, down"
        in page
    )
    assert "LlamaForCausalLM, cpu" in page


def test_a_toy_method_is_evaluated_from_yaml_and_shown_in_its_row(toys, tmp_path, store, text_file):
    """At 16 bits it changes nothing, at 4 it does, and its own field is in the key and in the row."""
    base = spec_for(save_lively(tmp_path / "model"), text_file, "16-4-16")
    said = base.to_yaml().replace("method: random\n  kind: RH\n", "method: toy\n  second: 3\n")
    said = said.replace("  block: null\n  path: null\n", "", 1)
    recipe = Recipe.from_yaml(said)
    assert type(recipe.rotation).__name__ == "ToySpec" and Recipe.from_yaml(recipe.to_yaml()) == recipe
    result = evaluate(recipe, store)
    row = rows.rows([result])[0]
    assert (row["method"], row["rotation"], row["parameters"], row["seed"]) == ("toy", "TOY", "second=3", 0)
    assert tables.comparison(tables.table([row])).index.tolist() == ["TOY"]
    assert apart(result.losses, evaluate(recipe.with_(rotation=RH), store).losses) > NOTICED
    other = recipe.rotation.with_(second=2)
    assert recipe.with_(rotation=other).key != recipe.key
    full = spec_for(base.model, text_file, "16-16-16")
    assert_near(evaluate(full.with_(rotation=other), store).losses, evaluate(full, store).losses, FLOAT32)


def test_a_toy_method_is_a_row_of_a_setting_with_each_build_s_seed(toys):
    found = [own.method("TOY") for own in Setting(seed=4, builds=3).each()]
    assert [(spec.name, spec.first_seed) for spec in found] == [("TOY", 4), ("TOY", 5), ("TOY", 6)]


def test_a_toy_method_is_evaluated_by_the_command_line(toys, tmp_path, text_file, monkeypatch):
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    model = save_lively(tmp_path / "model", context=4096)
    text_file.write_text(text_file.read_text() * 6)
    out = tmp_path / "rows.jsonl"
    command = ["evaluate", "--model", model.source, "--corpus", str(text_file), "--windows", "1"]
    command += ["--bits", "16-4-16", "--rotation", "TOY", "--seed", "5", "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and done.stdout.startswith("TOY 16-4-16 on "), done.output
    [row] = tables.records(row_files.load(out))
    assert (row["method"], row["rotation"], row["seed"]) == ("toy", "TOY", 5)
    assert Recipe.from_yaml(out.with_name(f"rows.{row['recipe']}.yaml")).key == row["recipe"]


def test_a_toy_weight_quantizer_is_evaluated_and_shown_in_its_row(toys, tmp_path, store, text_file):
    rtn = spec_for(save_lively(tmp_path / "model"), text_file, "4-16-16")
    recipe = rtn.with_(weights=rtn.weights.with_(method="down"))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe and recipe.canonical().weights.method == "down"
    result = evaluate(recipe, store)
    row = rows.rows([result])[0]
    assert (row["weights"], row["weight_quantizer"]) == ("down", "sym4-channel")
    assert row["calibration"].endswith("2 x 64")
    worse = result.losses - evaluate(rtn, store).losses
    assert abs(worse).max() > NOTICED


def test_a_toy_family_is_evaluated_and_shown_in_its_row(toys, tmp_path, store, text_file, monkeypatch):
    """Rotated and not it gives the same at 16 bits; at 4-4-4, GPTQ and all, it gives a number."""
    monkeypatch.setitem(conftest.FAMILIES, "arcee", family.NAME)
    model = save_lively(tmp_path / "model", "arcee")
    full = spec_for(model, text_file)
    plain = full.with_(rotation=RH.with_(kind="NR"))
    assert_near(evaluate(full, store).losses, evaluate(plain, store).losses, FLOAT32)
    low = spec_for(model, text_file, "4-4-4")
    result = evaluate(low.with_(weights=low.weights.with_(method="gptq")), store)
    assert {row["family"] for row in rows.rows([result])} == {family.NAME}
    assert apart(result.losses, evaluate(full, store).losses) > NOTICED
    [weights] = [each for each in store.list() if each.kind == "weights"]
    assert {key.split(":")[0] for key in weights.tensors("layer-000")} == set(family.ROLES.linears(None))


def test_without_its_line_the_family_is_refused_by_name(tmp_path, store, text_file, monkeypatch):
    monkeypatch.setitem(conftest.FAMILIES, "arcee", family.NAME)
    with monkeypatch.context() as patch:
        patch.setitem(FAMILIES, family.NAME, family.ROLES)
        model = save_lively(tmp_path / "model", "arcee")
    with pytest.raises(ValueError, match=f"{family.NAME} is not in the table of roles .* Supported: Llama"):
        evaluate(spec_for(model, text_file), store)
