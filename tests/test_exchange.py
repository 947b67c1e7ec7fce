"""Evaluations brought from one store to another: the same numbers under the same name, and nothing else."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from typer.testing import CliRunner

from dfrot_lab.cli.app import app
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, Recipe, RefineSpec, recipe_of
from dfrot_lab.score import exchange, perplexity
from dfrot_lab.score.perplexity import EvalResult, by_token, evaluate

Brought = tuple[Path, Store, list[Recipe], list[EvalResult]]


@pytest.fixture
def base(tmp_path: Path, text_file: Path) -> Recipe:
    """A tiny model at 4-4-4 on 2 windows of 64 tokens, its linears large enough for what is done to them to
    show.
    """
    loaded = tiny_model()
    for name, parameter in loaded.model.named_parameters():
        if "proj.weight" in name:
            parameter.mul_(6)
    loaded.model.save_pretrained(tmp_path / "tiny")
    loaded.tokenizer.save_pretrained(tmp_path / "tiny")
    own = {"model": ModelSpec(source=str(tmp_path / "tiny")), "corpus": CorpusSpec(name=str(text_file))}
    return recipe_of("4-4-4", weights="rtn", **own, windows=2, window=64)


@pytest.fixture
def brought(base: Recipe, tmp_path: Path) -> Brought:
    """A file of two evaluations, another store that has read it, the recipes, the results."""
    here, there, path = Store(tmp_path / "here"), Store(tmp_path / "there"), tmp_path / "kept.jsonl"
    specs = [base, base.with_(sample=0, jitter=1)]
    found = [evaluate(spec, here) for spec in specs]
    assert exchange.write(path, [result.key for result in found], here) == 2
    assert exchange.read(path, there) == 2
    assert not np.array_equal(found[0].losses, found[1].losses)
    return path, there, specs, found


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_is_brought_is_found_and_not_computed_again(brought, monkeypatch):
    path, there, specs, found = brought
    monkeypatch.setattr(perplexity, "build", None)
    for spec, result in zip(specs, found, strict=True):
        again = evaluate(spec, there)
        assert (again.losses == result.losses).all() and (again.divergences == result.divergences).all()
        assert (again.key, again.seconds, again.versions) == (result.key, result.seconds, result.versions)
        assert again.commit == result.commit and (again.agreements == result.agreements).all()
    assert exchange.read(path, there) == 0, "what is there stays"


def test_a_file_brought_on_is_the_same_file(brought, tmp_path):
    path, there, _, found = brought
    exchange.write(tmp_path / "on.jsonl", [result.key for result in found], there)
    assert read_rows(path) == read_rows(tmp_path / "on.jsonl")


def test_a_folder_of_files_brings_the_same(brought, tmp_path):
    path, there, specs, found = brought
    (folder := tmp_path / "kept").mkdir()
    (folder / "0.jsonl").write_text("what an older export left\n")
    keys = [result.key for result in found]
    assert exchange.write(folder, keys, there) == 2
    rows = [(file.stem, row) for file in sorted(folder.glob("*.jsonl")) for row in read_rows(file)]
    assert all(row["key"][0] == digit for digit, row in rows)
    assert [row for _, row in rows] == read_rows(path)
    fourth = Store(tmp_path / "fourth")
    assert exchange.read(folder, fourth) == 2
    for spec, result in zip(specs, found, strict=True):
        again = perplexity.stored(spec, fourth)
        assert again is not None and (again.losses == result.losses).all()


def test_an_infinite_gamma_is_brought_too(base, tmp_path):
    capture = CaptureSpec(model=base.model, corpus=base.corpus, tokens=64)
    rotation = RefineSpec(capture=capture, gamma=math.inf, rule="ro_vs_nr", steps=1)
    here, there, spec = Store(tmp_path / "one"), Store(tmp_path / "other"), base.with_(rotation=rotation)
    result = evaluate(spec, here)
    assert exchange.write(tmp_path / "inf.jsonl", [result.key], here) == 1
    json.loads((tmp_path / "inf.jsonl").read_text(), parse_constant=pytest.fail)
    assert exchange.read(tmp_path / "inf.jsonl", there) == 1
    again = perplexity.stored(spec, there)
    assert again is not None and (again.losses == result.losses).all() and again.key == result.key


def test_tokens_are_not_brought_and_that_is_said(brought):
    _, there, specs, _ = brought
    with pytest.raises(KeyError, match="made elsewhere"):
        by_token(evaluate(specs[0], there), there)


def test_no_path_of_this_machine_leaves_it(brought, base):
    path, *_ = brought
    assert str(Path(base.model.source).parent) not in path.read_text()


@pytest.mark.parametrize(
    "change, rule",
    [({"key": "0" * 32}, "that of its inputs"), ({"losses": ["a"]}, "could not convert|finite"),
     ({"losses": [None]}, "finite"), ({"inputs": {}}, "that of its inputs")],
)  # fmt: skip
def test_a_line_that_was_changed_is_refused(brought, change, rule):
    path, there, *_ = brought
    first, second = path.read_text().splitlines()
    path.write_text(json.dumps({**json.loads(first), **change}) + "\n" + second + "\n")
    with pytest.raises(ValueError, match=rule):
        exchange.read(path, there)


def test_a_line_that_was_cut_is_named(brought):
    path, there, *_ = brought
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match="line 2 must be JSON"):
        exchange.read(path, there)


def test_a_line_without_a_part_is_refused(brought):
    path, there, *_ = brought
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="an evaluation, with"):
        exchange.read(path, there)


def test_evaluations_of_other_formulas_are_left_out(brought, tmp_path, monkeypatch, caplog):
    path, *_ = brought
    monkeypatch.setattr(exchange, "FORMULAS", 999)
    assert exchange.read(path, Store(tmp_path / "third")) == 0
    assert "by other formulas" in caplog.text


def test_the_commands_carry_a_store_to_another(base, tmp_path, monkeypatch):
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "own"))
    result, file = evaluate(base), tmp_path / "kept.jsonl"
    assert "evaluations: 1" in CliRunner().invoke(app, ["cache", "export", str(file)]).output
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "other"))
    assert perplexity.stored(base, Store()) is None
    assert "new evaluations: 1" in CliRunner().invoke(app, ["cache", "import", str(file)]).output
    again = perplexity.stored(base, Store())
    assert again is not None and (again.losses == result.losses).all()
    assert CliRunner().invoke(app, ["cache", "import", str(tmp_path / "none")]).exit_code == 1
