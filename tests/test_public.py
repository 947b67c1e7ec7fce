"""What is written to be sent away tells no place on this machine: files and folders of one's own go by name and
hash.
"""

import json
import re
from pathlib import Path

import pytest
from conftest import save_tiny
from safetensors import safe_open
from test_cli import bench, invoke  # noqa: F401

from dfrot_lab.disk import row_files
from dfrot_lab.model.public import public
from dfrot_lab.recipe import specs
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, Recipe, RefineSpec, RotationSpec
from dfrot_lab.study.setting import Setting

ROOT = Path(__file__).parents[1]


def test_names_and_hashes_in_place_of_paths(tmp_path: Path) -> None:
    spec = save_tiny(tmp_path / "one" / "tiny")
    other = save_tiny(tmp_path / "two" / "tiny", seed=1)
    text = tmp_path / "my text.txt"
    text.write_text("a word " * 500)
    corpus = CorpusSpec(name=str(text))
    said = public(
        Recipe(model=spec, corpus=corpus, rotation=RefineSpec(capture=specs.CaptureSpec(model=spec)))
    )
    assert re.fullmatch(r"tiny@[0-9a-f]{12}", said.model.source)
    assert said.rotation.capture.model == said.model != public(other)
    assert re.fullmatch(r"my text\.txt@[0-9a-f]{12}", said.corpus.name)
    assert str(tmp_path) not in said.to_yaml() and public(said) == said
    assert public(spec.with_(dtype="float64", device="cuda")).source == said.model.source
    assert public(ModelSpec(source=str(tmp_path / "gone"))).source == "gone"
    assert public(ModelSpec(source="C:\\Users\\me\\tiny")).source == "tiny"
    assert public(RotationSpec(kind="file", path=str(text))).path == said.corpus.name
    own = public(Setting(model=spec, corpus="wikitext2", calibration=str(text)))
    assert (own.corpus, own.calibration) == ("wikitext2", said.corpus.name)


@pytest.mark.parametrize("name", ["tiny", "./tiny", "here/../tiny", "."])
def test_a_name_in_the_current_folder_is_a_place_too(name: str, tmp_path: Path, monkeypatch) -> None:
    spec = save_tiny(tmp_path / "tiny")
    (tmp_path / "here").mkdir()
    (tmp_path / "wikitext2").write_text("not the text of that name")
    monkeypatch.chdir(tmp_path / "tiny" if name == "." else tmp_path)
    assert public(ModelSpec(source=name)).source == public(spec).source
    assert public(CorpusSpec(name="wikitext2")).name == "wikitext2"


@pytest.mark.parametrize("spec", [Recipe(), RefineSpec(), Setting(), ModelSpec(source="models/tiny")])
def test_what_has_no_absolute_path_is_left_alone(spec) -> None:
    assert public(spec) == spec and public(spec).key == spec.key


def strict(text: str) -> object:
    """JSON that any reader takes."""

    def odd(word: str) -> object:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=odd)


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_export_tells_a_place(bench: list[str], tmp_path: Path) -> None:  # noqa: F811
    """Every file that a command writes, all kinds of them: rows, recipes, sidecars, rotations, reports, logs."""
    out = tmp_path / "out"
    own = [*bench, "--calibration", bench[3]]
    invoke(
        "refine",
        *bench,
        "--tokens",
        "200",
        "--steps",
        "2",
        "--gamma",
        "inf",
        "--out",
        f"{out}/R1.safetensors",
    )
    rows = [*own, "--windows", "1", "--bits", "16-4-16", "--out", f"{out}/rows.jsonl"]
    shown = invoke("evaluate", *rows, "--rotation", f"{out}/R1.safetensors", "--json").stdout
    invoke("evaluate", *rows, "--rotation", "RO")
    invoke("models", *bench[:2], "--out", f"{out}/model.json")
    invoke("fetch", *bench, "--out", f"{out}/fetched.json")
    invoke("capture", *bench, "--tokens", "200", "--out", f"{out}/massive.jsonl")
    invoke("errors", *bench, "--tokens", "200", "--out", f"{out}/errors.json")
    for name in ("gamma-sweep", "token-orders", "massive-activations"):
        invoke("experiment", name, *own, "--quick", "--out", f"{out}/experiments")
    invoke("report", *own, "--windows", "1", "--out", f"{out}/report.html")
    files = written(out)
    assert len(files) > 20 and {Path(name).suffix for name in files} >= {
        ".jsonl",
        ".json",
        ".yaml",
        ".html",
        ".svg",
    }
    told = [
        name for name, data in {**files, "stdout": shown.encode()}.items() if str(tmp_path).encode() in data
    ]
    assert not told
    for name, data in files.items():
        lines = data.splitlines() if name.endswith(".jsonl") else [data] if name.endswith(".json") else []
        for text in lines:
            strict(text.decode())
    with safe_open(out / "R1.safetensors", framework="pt") as file:
        assert "model@" in file.metadata()["spec"]
    table = row_files.load(out / "rows.jsonl")
    assert table["model"].str.fullmatch(r"model@[0-9a-f]{12}").all()
    for key in table["recipe"]:
        assert Recipe.from_yaml(out / f"rows.{key}.yaml").key == key
    swept = row_files.load(next(out.glob("experiments/gamma-sweep-*.jsonl")))
    assert swept["gamma"].dtype == float


COMMITTED = [path for folder in ("data/results", "figures") for path in (ROOT / folder).rglob("*.json*")]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_committed_is_json_and_tells_no_place(path: Path) -> None:
    text = path.read_text()
    for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
        strict(part)
    assert not re.findall(r'"(?:/|~|[A-Z]:\\\\)[^"]*/[^"]*"', text)
