"""What is taken away is the model: the folder's logits by plain transformers are the original's, the lab finds in
it what it put there, and an export that failed or was killed leaves nothing.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_families import folder_of
from test_stream import TOKENS, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dfrot_lab.cli.app import app
from dfrot_lab.disk import atomic, rotation_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export import folders, hf, r1
from dfrot_lab.maths import rotations
from dfrot_lab.model import checkpoint, loading, public
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import ModelSpec, Recipe, RotationSpec
from dfrot_lab.score import perplexity

PLAIN = ("llama", "qwen2", "qwen3", "gemma", "phi3", "mistral", "granite", "smollm3", "glm")
REFUSED = {"opt": "LayerNorms", "gemma2": "while it runs", "mixtral": "experts"}
IDS = torch.arange(3 * 40).reshape(3, 40) * 7 % 90 + 32


def logits(folder, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(IDS).logits


def apart(one, other) -> float:
    return float((one - other).norm() / other.norm())


def spec_of(tmp_path, text_file, case: str, kind: str = "RH", dtype: str = "float64") -> Recipe:
    found = recipe(folder_of(case, tmp_path / "original"), text_file, "4-4-16", weights="rtn")
    rotation = RotationSpec(kind=kind, seed=3)
    return found.with_(rotation=rotation, model=found.model.with_(dtype=dtype))


@pytest.fixture
def tiny(tmp_path, text_file) -> Recipe:
    return spec_of(tmp_path, text_file, "llama")


# ---- a Hugging Face folder


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "RH") for case in PLAIN), ("llama", "RO"), ("llama", "NR")]
)
def test_plain_transformers_gives_the_logits_of_the_original(case, kind, tmp_path, text_file, store):
    spec = spec_of(tmp_path, text_file, case, kind)
    folder = hf.export(spec, tmp_path / "made", store)
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "original", folder))
    assert type(after) is type(before) and not after.config.tie_word_embeddings
    assert apart(logits(folder), logits(tmp_path / "original")) < 1e-6
    moved = after.get_input_embeddings().weight - before.get_input_embeddings().weight
    assert bool(moved.abs().max() > 1e-3) == (kind != "NR")


def test_it_is_read_by_the_lab_as_the_same_model_without_a_gain_left(tiny, tmp_path, store):
    """By nothing rotated it scores what the original does (norms compute in float32), and its norms are 1."""
    folder = hf.export(tiny, tmp_path / "made", store)
    own = tiny.with_(model=ModelSpec(source=str(folder), dtype="float64"), rotation=RotationSpec(kind="NR"))
    full, of_full = (
        perplexity.evaluate(r.with_(weights=r.weights.with_(quantizer=W16), activations=A16), store)
        for r in (own, tiny.with_(rotation=RotationSpec(kind="NR")))
    )
    assert full.losses == pytest.approx(of_full.losses, abs=1e-6)
    loaded = loading.load_model(own.model)
    norms = [x for name, x in loaded.model.named_parameters() if "norm" in name]
    assert norms and all(bool((x == 1).all()) for x in norms)


W16 = Recipe().weights.quantizer.with_(bits=16)
A16 = Recipe().activations.with_(bits=16)


def test_what_lies_in_it(tiny, tmp_path, store):
    folder = hf.export(tiny, tmp_path / "made", store)
    assert {p.name for p in folder.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "README.md",
        "dfrot_lab",
    }
    R = rotation_files.load(folder / "dfrot_lab" / "R1.safetensors")
    assert torch.equal(R, rotations.make(tiny.rotation, 64))
    said = Recipe.from_yaml(folder / "dfrot_lab" / "recipe.yaml")
    assert said.rotation == tiny.rotation and said.bits == "4-4-16"
    text = "a sheep went over the hill"
    old, new = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "original", folder))
    assert old(text)["input_ids"] == new(text)["input_ids"]
    modes = {p.stat().st_mode & 0o444 for p in folder.rglob("*")}
    assert modes == {folder.stat().st_mode & 0o444}, "who may read the folder may read what is in it"
    everything = "\n".join(p.read_text() for p in folder.rglob("*") if p.suffix in (".json", ".md", ".yaml"))
    assert str(tmp_path) not in everything, "no export tells a place"


def test_the_card_says_what_it_scores_once_it_was_scored(tiny, tmp_path, store):
    before = (hf.export(tiny, tmp_path / "before", store) / "README.md").read_text()
    assert "Not measured at 4-4-16 yet" in before and "rotated by RH" in before
    found = perplexity.evaluate(tiny, store)
    after = (hf.export(tiny, tmp_path / "after", store) / "README.md").read_text()
    assert f"| perplexity | {found.perplexity:.2f} |" in after and "Not measured" not in after
    assert f"2 windows of {TOKENS} tokens" in after


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_in_the_dtype_of_the_recipe(dtype, tmp_path, text_file, store):
    spec = spec_of(tmp_path, text_file, "llama", dtype=dtype)
    folder = hf.export(spec, tmp_path / "made", store)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {x.dtype for x in model.parameters()} == {getattr(torch, dtype)}
    assert apart(logits(folder), logits(tmp_path / "original")) < (2e-5 if dtype == "float32" else 0.1)


def test_a_model_read_layer_by_layer_is_written_the_same(tiny, tmp_path, store, monkeypatch):
    """In several files, each with as much as may be held."""
    whole = hf.export(tiny, tmp_path / "whole", store)
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    monkeypatch.setattr(folders, "SHARD_BYTES", 1)
    parts = hf.export(tiny, tmp_path / "parts", Store(tmp_path / "other"))
    files = sorted(p.name for p in parts.glob("*.safetensors"))
    assert len(files) == 5 and files[0] == "model-00001-of-00005.safetensors"
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    held = sum(p.numel() * 8 for p in AutoModelForCausalLM.from_pretrained(whole).parameters())
    assert index["metadata"]["total_size"] == held and set(index["weight_map"].values()) == set(files)
    assert torch.equal(logits(parts), logits(whole))


@pytest.mark.parametrize("case", REFUSED)
def test_a_family_that_weights_alone_cannot_rotate_is_refused_before_any_work(
    case, tmp_path, text_file, store
):
    spec = spec_of(tmp_path, text_file, case)
    with pytest.raises(ValueError, match=f"must be one that weights alone can rotate: .*{REFUSED[case]}"):
        hf.export(spec, tmp_path / "made", store)
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob(".made*"))


# ---- whole or not at all


@pytest.mark.parametrize("taken", ["a file", "a folder with something", "a link"])
def test_a_name_that_is_taken_is_refused(taken, tiny, tmp_path, store):
    at = tmp_path / "made"
    if taken == "a link":
        at.symlink_to(tmp_path)
    elif taken == "a file":
        at.write_text("mine")
    else:
        at.mkdir()
        (at / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"--out must be a name that is free or an empty folder; got .*made"):
        hf.export(tiny, at, store)
    assert at.is_symlink() or (at if at.is_file() else at / "mine").read_text() == "mine"


def test_an_empty_folder_is_filled_and_one_that_failed_goes(tiny, tmp_path, store, monkeypatch):
    (tmp_path / "made").mkdir()
    monkeypatch.setattr(
        folders, "_write_weights", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(OSError, match="No space left"):
        hf.export(tiny, tmp_path / "made", store)
    assert not list((tmp_path / "made").iterdir()) and not list(tmp_path.glob(".made*"))
    monkeypatch.undo()
    assert (hf.export(tiny, tmp_path / "made", store) / "model.safetensors").is_file()


KILLED = """
import os, signal, sys
from pathlib import Path
from dfrot_lab.export import hf
from dfrot_lab.recipe.specs import Recipe
hf.folders._write_config = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
hf.export(Recipe.from_yaml(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_killed_export_leaves_no_folder_that_loads_and_the_next_clears_up(
    tiny, tmp_path, store, monkeypatch
):
    (tmp_path / "r.yaml").write_text(tiny.to_yaml())
    command = [sys.executable, "-c", KILLED, str(tmp_path / "r.yaml"), str(tmp_path / "made")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    [left] = tmp_path.glob(".made.*.tmp")
    assert not (tmp_path / "made").exists() and (left / "model.safetensors").is_file()
    assert not (left / "config.json").exists(), "what nothing loads without is written last"
    past = time.time() - 2 * atomic.STALE
    for path in (left, *left.rglob("*")):
        os.utime(path, (past, past))
    hf.export(tiny, tmp_path / "made", store)
    assert not left.exists() and (tmp_path / "made" / "README.md").is_file()


def test_what_a_living_writer_or_another_name_has_begun_stays(tmp_path):
    """However long ago: weights of a large model take hours before the first file is written."""
    past = time.time() - 2 * atomic.STALE
    with atomic.new_folder(tmp_path / "made.v2") as theirs, atomic.new_folder(tmp_path / "made") as mine:
        gone = tmp_path / f".made.{1 << 22}.tmp"  # more than any pid of Linux
        gone.mkdir()
        for path in (theirs, mine, gone):
            os.utime(path, (past, past))
        atomic._clear(tmp_path / "made")
        assert theirs.is_dir() and mine.is_dir() and not gone.exists()
    assert (tmp_path / "made").is_dir() and (tmp_path / "made.v2").is_dir()


def test_a_folder_that_cannot_be_replaced_is_refused_before_work(tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    (tmp_path / "mine").touch()
    rule = "--out must be a name that is free or an empty folder"
    with pytest.raises(ValueError, match=rule), atomic.new_folder(tmp_path / "new/.."):
        pytest.fail("work was begun")
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda path: path.name == "new")
    with (
        pytest.raises(ValueError, match=r"--out must be a name in .*new, which is a mount point"),
        atomic.new_folder(tmp_path / "new"),
    ):
        pytest.fail("work was begun")


def test_a_disk_that_fills_up_with_the_tokenizer_is_said(tiny, tmp_path, store, monkeypatch):
    """tokenizers raises an error of its own, with no errno."""
    loaded = loading.load_model(tiny.model, store)

    def full(_folder):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(loaded.tokenizer), "save_pretrained", lambda self, folder: full(folder))
    with pytest.raises(OSError, match=r"cannot write .*No space left on device.*free some space"):
        hf.export(tiny, tmp_path / "made", store)
    assert not list(tmp_path.glob("*made*"))


# ---- R1 alone, and the command


@pytest.mark.parametrize("row", ["RO", "RH", "Offset"])
def test_r1_is_that_of_the_recipe(row, tiny, tmp_path, store):
    of = registry.spec_of(row, seed=5, capture=None)
    if "capture" in type(of).model_fields:
        text = tiny.corpus.with_(split="calibration")
        of = of.with_(capture=of.capture.with_(corpus=text, tokens=64))
    path = r1.export(tiny.with_(rotation=of), tmp_path / "R1.safetensors", store)
    R = rotation_files.load(path, 64)
    assert rotations.orthogonality_error(R) < 1e-12
    own = tiny.with_(rotation=RotationSpec(kind="file", path=str(path)))
    same = tiny.with_(rotation=of)
    assert perplexity.evaluate(own, store).losses.tolist() == perplexity.evaluate(same, store).losses.tolist()


def test_r1_takes_no_other_file_s_place(tiny, tmp_path, store):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--out must be a file ending in \.safetensors; got .*notes\.txt"):
        r1.export(tiny, tmp_path / "notes.txt", store)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    weights = tmp_path / "original" / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(ValueError, match=r"--out must be a name that is free; got .*model\.safetensors"):
        r1.export(tiny, weights, store)
    assert weights.read_bytes() == before


def test_how_the_source_generates_is_taken_along(tiny, tmp_path, store):
    said = {"eos_token_id": [10, 11], "do_sample": True, "temperature": 0.3}
    (tmp_path / "original" / "generation_config.json").write_text(json.dumps(said))
    folder = hf.export(tiny, tmp_path / "made", store)
    assert json.loads((folder / "generation_config.json").read_text()) == said


def test_no_relative_path_is_told(tiny, tmp_path, store, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    folder = hf.export(tiny.with_(model=tiny.model.with_(source="../original")), tmp_path / "made", store)
    for path in (folder / "README.md", folder / "dfrot_lab" / "recipe.yaml"):
        assert "../" not in path.read_text() and "original@" in path.read_text()


def test_scales_that_help_nothing_are_said_to_be_left_out(tiny, tmp_path, store, caplog):
    from test_stream import looking

    recipe = looking(tiny, "scales").with_(activations=A16)
    hf.export(recipe, tmp_path / "made", store)
    assert "channel scales are left out" in caplog.text


def test_nr_has_no_matrix(tiny, tmp_path, store):
    with pytest.raises(ValueError, match="--rotation must be one with a matrix R1 to export; got NR"):
        r1.export(tiny.with_(rotation=RotationSpec(kind="NR")), tmp_path / "R1.safetensors", store)
    assert not (tmp_path / "R1.safetensors").exists()


def test_of_two_exports_to_one_name_the_first_is_kept(tmp_path):
    with (
        pytest.raises(
            ValueError, match=r"--out must be a name that is free; another process .*; got .*made$"
        ),
        atomic.new_folder(tmp_path / "made") as temporary,
    ):
        (temporary / "mine").touch()
        (tmp_path / "made").mkdir()
        (tmp_path / "made/theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "theirs"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127])
def test_a_name_as_long_as_names_can_be_is_taken_and_a_longer_one_refused(name, tmp_path):
    with atomic.new_folder(tmp_path / name) as temporary:
        (temporary / "mine").touch()
    assert [path.name for path in (tmp_path / name).iterdir()] == ["mine"]
    atomic.write_text(tmp_path / f"{name[:-5]}.json", "text")
    for write in (atomic.new_folder, atomic.replacing):
        with (
            pytest.raises(OSError, match=r"^\[Errno 36\] x+ must be a shorter name"),
            write(tmp_path / ("x" * 256)),
        ):
            pytest.fail("work was begun")
    assert len(list(tmp_path.iterdir())) == 2


def ask(*words: str):
    return CliRunner().invoke(app, ["export", *words])


def test_the_command(tiny, tmp_path, text_file, monkeypatch):
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    of = ["--model", str(tmp_path / "original"), "--corpus", str(text_file), "--window", str(TOKENS)]
    found = ask(*of, "--rotation", "RO", "--out", str(tmp_path / "made"), "--json")
    assert found.exit_code == 0, found.output
    about = json.loads(found.stdout)
    assert about["format"] == "hf" and about["rotation"] == "RO" and about["written"] == "made"
    assert apart(logits(tmp_path / "made"), logits(tmp_path / "original")) < 2e-5
    again = ask(*of, "--rotation", str(tmp_path / "made/dfrot_lab/R1.safetensors"), "--to", "r1",
                "--out", str(tmp_path / "R1.safetensors"))  # fmt: skip
    assert again.exit_code == 0 and "as r1" in again.stdout, again.output
    one, other = (tmp_path / name for name in ("made/dfrot_lab/R1.safetensors", "R1.safetensors"))
    assert torch.equal(rotation_files.load(one), rotation_files.load(other))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "onnx", "--out", "x"], "--to must be one of hf, compressed-tensors, gguf, r1; got 'onnx'"),
        (["--to", "hf"], "--out"),
        (["--recipe", "r.yaml", "--rotation", "RO", "--out", "x"], "--rotation must be left out: the"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(Recipe().to_yaml())
    found = ask(*words)
    assert found.exit_code != 0 and said in found.output
    assert not (tmp_path / "x").exists()


def test_the_recipe_of_an_export_is_run_where_its_files_lie_now(tiny, tmp_path, text_file, store):
    """It names them by the hash of their bytes: no others are taken for them."""
    hf.export(tiny, tmp_path / "made", store)
    printed = Recipe.from_yaml(tmp_path / "made/dfrot_lab/recipe.yaml")
    assert "@" in printed.model.source and "@" in printed.corpus.name
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "original", moved / "m")
    (moved / "t.txt").write_bytes(text_file.read_bytes())
    places = {"model": str(moved / "m"), "corpus": str(moved / "t.txt")}
    found = public.found(printed, places)
    assert found.model.source == places["model"] and str(tmp_path / "original") not in found.to_yaml()
    one, other = (perplexity.evaluate(spec, store).losses for spec in (tiny, found))
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    (moved / "t.txt").write_text("another text")
    with pytest.raises(ValueError, match=r"t.txt must be what .*@[0-9a-f]{12} names; got one with"):
        public.found(printed, places)
    with pytest.raises(
        ValueError, match=r"wikitext2 must be what .*@.* names; got no file or folder that is"
    ):
        public.found(printed, {"corpus": "wikitext2"})
    with pytest.raises(ValueError, match="--calibration must be left out: the recipe names no calibration"):
        public.found(printed, {"calibration": str(moved / "t.txt")})


def test_every_format_is_in_the_help():
    assert all(name in ask("--help").output for name in registry.EXPORTS)
