"""What cannot be right is refused before work, in words that are true; what is printed as JSON is JSON."""
# ruff: noqa: F811

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny
from safetensors.torch import load_file, save_file
from test_cli import bench, invoke  # noqa: F401 a fixture

from dfrot_lab.disk import rotation_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import corpus
from dfrot_lab.recipe.base import strict_json
from dfrot_lab.recipe.specs import CorpusSpec, RotationSpec, recipe_of
from dfrot_lab.score import perplexity


def strict(text: str) -> object:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_has_no_nan_and_no_infinity():
    said = {"a": math.nan, "b": [math.inf, 1.5, {"c": (-math.inf, None, True)}], 3: Path("x")}
    assert strict(strict_json(said)) == {"a": None, "b": ["inf", 1.5, {"c": ["-inf", None, True]}], "3": "x"}


@pytest.mark.parametrize("windows", ["1", "2"])
def test_one_build_printed_as_json_has_no_interval(bench: list[str], tmp_path: Path, windows: str):
    """However many windows it has: of one seed and jitter they do not know that there are others."""
    out = tmp_path / "rows.jsonl"
    short = [*bench, "--windows", windows, "--bits", "16-4-16", "--out", str(out), "--json"]
    assert strict(invoke("evaluate", *short).stdout)["ci95"] is None
    rows = [strict(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3 and all(row["ci95"] is row["verdict"] is row["smallest"] is None for row in rows)
    shown = invoke("evaluate", *short[:-1]).stdout
    assert "nan" not in shown and "[" not in shown


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, text_file: Path, store: Store):
    spec = save_tiny(tmp_path / "m")
    file = next((tmp_path / "m").glob("*.safetensors"))
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
    save_file(weights, file, {"format": "pt"})
    recipe = recipe_of("16-16-16", model=spec, corpus=CorpusSpec(name=str(text_file)), windows=2, window=32)
    with pytest.raises(
        ValueError,
        match=r"must be finite in float32; model\.layers\.1\.mlp\.down_proj\.weight has NaN or Inf",
    ):
        perplexity.evaluate(recipe, store)
    assert perplexity.stored(recipe, store) is None


def test_a_loss_that_is_no_number_is_not_kept(
    tmp_path: Path, text_file: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """As of a model whose later layers are broken, which the few tokens of its proof may not reach."""
    spec = save_tiny(tmp_path / "m")
    recipe = recipe_of("16-16-16", model=spec, corpus=CorpusSpec(name=str(text_file)), windows=2, window=32)
    whole = math.nan * torch.ones(31, 3)
    monkeypatch.setattr(perplexity, "window_measures", lambda *_: whole)
    with pytest.raises(ValueError, match=r"losses of .*m at 16-16-16 must be finite .*; got \[nan, nan\]"):
        perplexity.evaluate(recipe, store)
    assert perplexity.stored(recipe, store) is None
    monkeypatch.setattr(perplexity.stream, "loss", lambda *_: torch.tensor(math.nan))
    fresh = Store(tmp_path / "fresh")
    with pytest.raises(ValueError, match=r"loss of .*m in full precision must be finite .*; got nan"):
        perplexity.evaluate(recipe, fresh)
    assert not list(fresh.list())
    monkeypatch.undo()
    assert math.isfinite(perplexity.evaluate(recipe, store).perplexity)


@pytest.mark.parametrize("ending", ["bin", "pt"])
def test_a_rotation_in_torchs_own_format_is_called_what_it_is(tmp_path: Path, ending: str):
    path = tmp_path / f"R1.{ending}"
    torch.save({"R1": torch.eye(8)}, path)
    said = rf"must be a safetensors file; got .*R1\.{ending}, which is torch's own format.*save_file"
    with pytest.raises(ValueError, match=said):
        rotation_files.load(path, 8)


def test_a_rotation_in_a_numpy_file_is_read_and_nothing_else_of_one(tmp_path: Path):
    R = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    path = tmp_path / "R1.npy"
    for kind in (np.float64, np.float32):
        np.save(path, R.astype(kind))
        assert rotation_files.load(path, 8).numpy() == pytest.approx(R, abs=1e-6)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"rotation.path must be a whole array of floats; got .*R1\.npy"):
        rotation_files.load(path, 8)
    np.save(path, np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"must be a whole array of floats; got .*npy"):
        rotation_files.load(path, 1)
    np.save(path, np.array([["a"]]))
    with pytest.raises(ValueError, match=r"must be a whole array of floats"):
        rotation_files.load(path, 1)
    np.save(path, np.eye(8, dtype=np.int64))
    with pytest.raises(
        ValueError, match=r"rotation.dtype must be a float dtype; got torch.int64 \(in .*npy\)"
    ):
        rotation_files.load(path, 8)


@pytest.mark.parametrize(
    ("command", "out", "text"),
    [
        ("refine", "folder", "--out must be a file; folder is a folder"),
        ("evaluate", "folder", "--out must be a file; folder is a folder"),
        ("evaluate", "rows.csv", "--out must be a file ending in .jsonl; got rows.csv"),
        ("refine", "R1.bin", "--out must be a file ending in .safetensors; got R1.bin"),
        ("refine", "file/R1.safetensors", "--out must be where files can be written; "),
        ("capture", "folder", "--out must be a file ending in .parquet, .csv, .json, .jsonl; got folder"),
        (
            "errors",
            "table.txt",
            "--out must be a file ending in .parquet, .csv, .json, .jsonl; got table.txt",
        ),
        ("experiment", "file", "file"),
    ],
)
def test_what_cannot_be_written_is_refused_before_work(
    bench: list[str], tmp_path: Path, command: str, out: str, text: str
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    name = ["main"] if command == "experiment" else []
    assert text in invoke(command, *name, *bench, "--out", out, code=1).stderr
    assert not list((tmp_path / "cache" / "store").glob("*/*")) or command == "experiment"


@pytest.mark.parametrize("text", ["a", "two words"])
def test_a_text_too_short_for_one_window_says_what_it_lacks(tmp_path: Path, text: str):
    from conftest import byte_tokenizer

    (tmp_path / "t.txt").write_text(text)
    spec = CorpusSpec(name=str(tmp_path / "t.txt"), split="calibration")
    with pytest.raises(
        ValueError,
        match=r"t\.txt \(calibration\) must be a text of at least one window of 16 tokens; got \d token",
    ):
        corpus.token_blocks(spec, byte_tokenizer(), blocks=1, window=16)


def test_no_hint_names_what_only_python_can_say(bench: list[str]):
    said = invoke(
        "evaluate", *bench, "--rotation", "RH-b7", "--windows", "2", "--weights", "rtn", code=1
    ).stderr
    assert (
        "RotationSpec.block must divide the 64 channels; got 7. Use one of [1, 2, 4, 8, 16, 32, 64]" in said
    )
    assert RotationSpec(block=16).name == "RH-b16", "and such a block can be said as --rotation RH-b16"
