"""Evaluations brought from one store to another: the same numbers under the same name, and nothing else."""

import json
from pathlib import Path

import pytest
from test_evaluate import RH, at, base  # noqa: F401
from typer.testing import CliRunner

from dfrot_lab.cli.app import app
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.score import exchange, perplexity
from dfrot_lab.score.perplexity import by_token, evaluate


@pytest.fixture
def brought(base, tmp_path) -> tuple[Path, Store, list, list]:  # noqa: F811
    """A file of two evaluations, another store that has read it, the recipes, the results."""
    here, there, path = Store(tmp_path / "here"), Store(tmp_path / "there"), tmp_path / "kept.jsonl"
    specs = [at(base, "4-4-4", rotation=RH), at(base, "4-4-4", rotation=RH, sample=0, jitter=1)]
    found = [evaluate(spec, here) for spec in specs]
    assert exchange.write(path, [result.key for result in found], here) == 2
    assert exchange.read(path, there) == 2
    return path, there, specs, found


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
    lines = [
        [json.loads(line) for line in file.read_text().splitlines()] for file in (path, tmp_path / "on.jsonl")
    ]
    for one, other in zip(*lines, strict=True):
        one["note"].pop("made", None), other["note"].pop("made", None)
        assert one == other


def test_tokens_are_not_brought_and_that_is_said(brought):
    _, there, specs, _ = brought
    with pytest.raises(KeyError, match="made elsewhere"):
        by_token(evaluate(specs[0], there), there)


def test_no_path_of_this_machine_leaves_it(brought, base):  # noqa: F811
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


def test_the_commands_carry_a_store_to_another(base, tmp_path, monkeypatch):  # noqa: F811
    result, file = evaluate(base), tmp_path / "kept.jsonl"
    assert "evaluations: 1" in CliRunner().invoke(app, ["cache", "export", str(file)]).output
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "other"))
    assert perplexity.stored(base, Store()) is None
    assert "new evaluations: 1" in CliRunner().invoke(app, ["cache", "import", str(file)]).output
    again = perplexity.stored(base, Store())
    assert again is not None and (again.losses == result.losses).all()
    assert CliRunner().invoke(app, ["cache", "import", str(tmp_path / "none")]).exit_code == 1
