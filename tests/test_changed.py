"""What changes while it is used: a model's weights, a text, a GGUF file. There is the right number or an
error, and nothing is kept under the name of what was there before.
"""

import os
from pathlib import Path

import pytest
import torch
from conftest import save_tiny, tiny_model
from gguf_writer import write_gguf

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.disk.atomic import still
from dfrot_lab.model import checkpoint, gguf_files
from dfrot_lab.model.loading import load_model
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, Recipe, recipe_of
from dfrot_lab.score import perplexity

SAID = "changed while (they were used|it was read)"


@pytest.fixture(params=["", "0"], ids=["kept", "streamed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(checkpoint.MEMORY, request.param)
    return str(request.param)


def recipe(model: Path, text: Path, bits: str = "4-4-16") -> Recipe:
    corpus = CorpusSpec(name=str(text))
    spec = recipe_of(bits, model=ModelSpec(source=str(model)), corpus=corpus, windows=3, window=32)
    return spec.with_(
        weights=spec.weights.with_(windows=2, window=32, corpus=corpus.with_(split="calibration"))
    )


def overwrite(path: Path, with_: Path, in_place: bool) -> None:
    """As `dd conv=notrunc` does, or as a new file of the same name."""
    if in_place:
        with path.open("r+b") as file:
            file.write(with_.read_bytes())
    else:
        (new := path.with_name("new")).write_bytes(with_.read_bytes())
        new.replace(path)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("part", ["layer", "window"])
def test_weights_that_change_while_they_are_used_give_no_number(
    part: str, in_place: bool, way: str, tmp_path: Path, text_file: Path, store: Store
):
    mine, other = (tmp_path / name for name in ("mine", "other"))
    for folder, seed in ((mine, 0), (other, 1)):
        save_tiny(folder, seed=seed)
    weights, before = mine / "model.safetensors", (mine / "model.safetensors").read_bytes()
    spec, changed = recipe(mine, text_file), list[str]()
    right = perplexity.evaluate(spec, Store(tmp_path / "right")).losses

    def change(what: str, _done: int, _total: int) -> None:
        if what == part and not changed:
            overwrite(weights, other / "model.safetensors", in_place)
            changed.append(what)

    if way and part == "window":
        pytest.skip("a model read layer by layer has no window by itself")
    with pytest.raises(ValueError, match=SAID):
        perplexity.evaluate(spec, store, on_part=change)
    made = {a.kind for a in store.list()} - {"reference"}  # of what was there before
    assert changed and made == ({"weights"} if part == "window" else set())
    weights.write_bytes(before)
    assert perplexity.evaluate(spec, store).losses.tolist() == right.tolist()


def test_a_loaded_model_is_no_view_of_its_file(tmp_path: Path):
    save_tiny(folder := tmp_path / "m")
    loaded = load_model(ModelSpec(source=str(folder), dtype="float32"))
    before = {name: weight.clone() for name, weight in loaded.model.named_parameters()}
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.model.named_parameters())
    path.write_bytes(b"")  # a view of a file that was cut would end the process here
    assert all(torch.equal(weight, before[name]) for name, weight in loaded.model.named_parameters())


def test_a_text_that_changes_before_it_is_read_gives_no_number(tmp_path: Path, text_file: Path, store: Store):
    save_tiny(tmp_path / "m")
    (text := tmp_path / "mine.txt").write_bytes(text_file.read_bytes())
    spec, changed = recipe(tmp_path / "m", text), list[str]()

    def change(what: str, _done: int, _total: int) -> None:
        if what == "layer" and not changed:
            text.write_text(text.read_text()[::-1])
            changed.append(what)

    with pytest.raises(ValueError, match=SAID):
        perplexity.evaluate(spec, store, on_part=change)
    assert changed and not [a for a in store.list() if a.kind in ("evaluation", "weights")]


def test_a_gguf_file_that_changes_while_it_is_converted_is_not_kept(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
):
    path, other = tmp_path / "m.gguf", tmp_path / "o.gguf"
    write_gguf(path, tiny_model())
    write_gguf(other, tiny_model(seed=1))
    read, seen, before = gguf_files._weight, list[str](), path.read_bytes()

    def weight(header: gguf_files.Header, name: str) -> torch.Tensor:
        if len(seen) == 3:
            overwrite(path, other, in_place=True)
        seen.append(name)
        return read(header, name)

    with monkeypatch.context() as patch:
        patch.setattr(gguf_files, "_weight", weight)
        with pytest.raises(ValueError, match=SAID):
            load_model(ModelSpec(source=str(path)), store)
    assert len(seen) > 3 and not store.list()
    path.write_bytes(before)
    found, right = (load_model(ModelSpec(source=str(path)), at) for at in (store, Store(tmp_path / "right")))
    for (name, a), (_, b) in zip(found.model.named_parameters(), right.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_inputs_are_asked_for_again_and_must_be_the_same(store: Store):
    answers = iter([{"a": 1}, {"a": 1}, {"a": 2}])
    again = still(lambda: next(answers))
    assert again() == {"a": 1}
    with pytest.raises(ValueError, match=SAID):
        again()
    answers = iter([{"a": 1}, {"a": 2}])
    with pytest.raises(ValueError, match=SAID):
        store.get_or_make("k", lambda: next(answers), lambda writer: writer.save_json("x", 1))
    assert not store.list() and not list(store.root.glob("k/*.partial"))
