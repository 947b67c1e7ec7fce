"""A size of which no Hadamard matrix is known: the largest block stands in its place, by name, said once."""
# ruff: noqa: F811

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from test_cli import bench, invoke  # noqa: F401 a fixture
from transformers import AutoConfig, AutoModelForCausalLM

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import hadamard, rotations
from dfrot_lab.maths.hadamard import block_of, hadamard_matrix
from dfrot_lab.model import door, shapes, surgery
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.specs import (
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    Recipe,
    RefineSpec,
    RotationSpec,
    WeightSpec,
    recipe_of,
)
from dfrot_lab.score import build, perplexity, rows
from dfrot_lab.show import gallery, report
from dfrot_lab.study import main, needs
from dfrot_lab.study.setting import Setting

CHANNELS, HEAD, INNER = 54, 6, 2 * 107  # no order of any is known here: each has blocks of 2


def save_odd(folder: Path, inner: int = INNER) -> ModelSpec:
    """A tiny random model none of whose sizes has a Hadamard matrix; newlines are massive."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        "llama", vocab_size=256, hidden_size=CHANNELS, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=2,
        head_dim=HEAD, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(25)
        model.model.embed_tokens.weight[tokenizer("\n").input_ids[0], 3] += 400
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSpec(source=str(folder))


@pytest.fixture
def odd(tmp_path: Path) -> ModelSpec:
    return save_odd(tmp_path / "odd")


@pytest.fixture(autouse=True)
def not_said_yet() -> None:
    hadamard._say_blocks.cache_clear()


def recipe(model: ModelSpec, text: Path, rotation: RotationSpec | RefineSpec, bits: str = "4-4-4") -> Recipe:
    corpus = CorpusSpec(name=str(text))
    weights = {"corpus": corpus.with_(split="calibration"), "windows": 2, "window": 32}
    spec = recipe_of(bits, model=model, corpus=corpus, rotation=rotation, windows=2, window=32)
    return spec.with_(weights=spec.weights.with_(**weights))


@pytest.mark.parametrize(
    ("n", "block"), [(214, 2), (13696, 128), (27392, 256), (780, 156), (576, 576), (107, 1)]
)
def test_the_block_is_the_largest_divisor_with_a_matrix(n: int, block: int):
    assert block_of(n) == block
    assert all(hadamard.factors(size) is None for size in range(block + 1, n + 1) if n % size == 0)


def test_what_stands_in_the_place_of_a_matrix_is_said_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert [block_of(n) for n in (214, 214, 107, 64)] == [2, 2, 1, 64]
    assert [record.getMessage() for record in caplog.records] == [
        "no Hadamard matrix of order 214 is known here: what is 214 wide is rotated in 107 blocks of 2 on the diagonal",
        "no Hadamard matrix of order 107 is known here: what is 107 wide is rotated not at all",
    ]


@pytest.mark.parametrize("block", [3, 107, 214, 428])
def test_a_block_that_does_not_fit_is_refused_by_name(block: int):
    rule = r"Recipe\.mlp_block must be a divisor of 214 of which a Hadamard matrix is known, such as 2; got"
    with pytest.raises(ValueError, match=f"{rule} {block}$"):
        block_of(214, block, "Recipe.mlp_block")


@pytest.mark.parametrize("block", [2, 32, 96])
def test_the_transform_in_blocks_is_the_product_with_them_on_the_diagonal(block: int):
    x = torch.randn(2, 3, 5, 96, dtype=torch.float64)
    H = torch.block_diag(*[hadamard_matrix(block) / block**0.5] * (96 // block))
    torch.testing.assert_close(surgery.hadamard(x, block), x @ H.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", [(None, None), (2, 4), (8, 32)])
def test_r2_to_r4_in_blocks_leave_every_logit_and_need_the_same_blocks_online(blocks: surgery.Blocks):
    loaded, ids = tiny_model(dtype=torch.float64), torch.arange(40)[None]
    wanted = loaded.model(ids).logits
    surgery.prepare(loaded)
    surgery.rotate_heads(loaded, block=blocks[0])
    surgery.rotate_down(loaded, block=blocks[1])
    with surgery.online(loaded, r3=True, r4=True, blocks=blocks):
        torch.testing.assert_close(loaded.model(ids).logits, wanted, rtol=1e-6, atol=1e-6)
    with surgery.online(loaded, r3=True, r4=True, blocks=(blocks[0], 16)):
        assert (loaded.model(ids).logits - wanted).abs().max() > 1e-3


def test_the_door_names_the_blocks_that_a_model_has_to_have(odd: ModelSpec, text_file: Path):
    found = door.resolved(recipe(odd, text_file, RotationSpec()))
    assert (found.rotation.name, found.head_block, found.mlp_block) == ("RH-b2", 2, 2)
    assert door.resolved(found) is found
    ro = door.resolved(recipe(odd, text_file, RotationSpec(kind="RO")))
    assert (ro.rotation.name, *ro.blocks) == ("RO", 2, 2), "R1 needs none, R2 to R4 do"
    assert door.resolved(recipe(odd, text_file, RotationSpec(kind="NR"))).blocks == (None, None)
    alone = door.resolved(RefineSpec(capture=CaptureSpec(model=odd, corpus=CorpusSpec(name=str(text_file)))))
    assert alone.init.name == "RH-b2"
    with pytest.raises(ValueError, match=r"Recipe\.mlp_block must be a divisor of 214"):
        door.resolved(recipe(odd, text_file, RotationSpec()).with_(mlp_block=107))


FLOAT32 = ModelSpec(dtype="float32")  # what `auto` becomes on a CPU


def test_where_there_is_a_matrix_nothing_is_named_and_no_key_changes(tiny_spec: ModelSpec, text_file: Path):
    """Recipe keys as they were before there were blocks: what is kept is found."""
    assert (Recipe(model=FLOAT32, windows=6).key, RefineSpec(capture=CaptureSpec(model=FLOAT32)).key) == (
        "c9e2de6c1e84dce9b21ec6bab155a7ac",
        "8a496f7ac4df0643701926d059d8cb85",
    )
    spec = door.resolved(recipe(tiny_spec, text_file, RotationSpec()))
    assert (spec.rotation.name, spec.blocks) == ("RH", (None, None))
    assert set(keys.weights(spec, door.prints)) == {"model", "rotation", "weights"}
    assert "mlp_block" not in keys.evaluation(spec, door.prints)["recipe"]
    whole, halves = (door.resolved(spec.with_(mlp_block=block)) for block in (96, 48))
    assert whole == spec, "an H of the whole width is the default"
    assert len({build.build_key(each) for each in (spec, halves)}) == 2 == len({spec.key, halves.key})
    assert Recipe.from_yaml(halves.to_yaml()) == halves


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
def test_a_model_without_any_matrix_is_evaluated_and_its_rows_say_how(
    odd: ModelSpec, text_file: Path, store: Store, weights: str
):
    capture = CaptureSpec(tokens=64, corpus=CorpusSpec(name=str(text_file), split="calibration"))
    found = {}
    for rotation in (RotationSpec(kind="RO"), RotationSpec(), RefineSpec(capture=capture, steps=2)):
        spec = recipe(odd, text_file, rotation)
        result = perplexity.evaluate(spec.with_(weights=spec.weights.with_(method=weights)), store)
        found[rotation.name] = rows.rows([result])[0]
        assert result.perplexity < float("inf")
    assert [row["rotation"] for row in found.values()] == ["RO", "RH-b2", "DFRot"]
    assert all("head_block=2, mlp_block=2" in row["parameters"] for row in found.values())
    assert "init=RH-b2" in found["DFRot"]["parameters"]


def test_the_integer_path_and_the_fake_one_agree_in_blocks(
    tiny_spec: ModelSpec, text_file: Path, store: Store
):
    spec = door.resolved(recipe(tiny_spec, text_file, RotationSpec()).with_(mlp_block=32, head_block=4))
    built = build.build(spec.with_(weights=WeightSpec(method="rtn", corpus=None)), store)
    ids, logits = torch.arange(40)[None], {}
    for fake in (False, True):
        with build.quantized(built, spec, fake=fake):
            logits[fake] = built.loaded.model(ids).logits
    torch.testing.assert_close(logits[True], logits[False], rtol=1e-4, atol=1e-4)
    with surgery.online(built.loaded, r3=True, r4=True, blocks=spec.blocks):
        assert (built.loaded.model(ids).logits - logits[True]).abs().max() > 1e-3, "4 bits show"


def test_a_dry_run_says_which_rotations_a_model_can_have(odd: ModelSpec, bench: list[str]):
    said = "Hadamard rotations: R1 (RH) of 54: 27 blocks of 2, R2 and R3 of 6: 3 blocks of 2, R4 of 214: 107 blocks of 2"
    assert said in invoke("run", "--dry-run", "--model", odd.source).stdout
    rows_said = json.loads(invoke("run", "--dry-run", "--json", "--model", odd.source).stdout)
    assert {row["rotations"] for row in rows_said} == {said}
    whole = "R1 (RH) of 4096: whole, R2 and R3 of 128: whole, R4 of 11008: whole"
    assert needs.hadamards(shapes.SHAPES["llama-2-7b"]) == f"Hadamard rotations: {whole}"
    odd_width = shapes.Shape(64, 2, 107, 4, 2, 16, 256)
    assert needs.hadamards(odd_width).endswith("R4 of 107: none is known")


def test_blocks_can_be_asked_for_by_a_rotations_name(bench: list[str]):
    short = [*bench, "--windows", "2", "--weights", "rtn"]
    said = json.loads(invoke("evaluate", *short, "--rotation", "RH-b16", "--json").stdout)
    assert said["rotation"] == "RH-b16"
    wrong = invoke("evaluate", *short, "--rotation", "RH-b5", code=1).stderr
    assert "RotationSpec.block must divide the 64 channels; got 5" in wrong
    for name in ("RH-b", "RH-bx", "RHb2", "DFRot-b"):
        assert "--rotation must be NR, RO" in invoke("evaluate", *short, "--rotation", name, code=1).stderr
    assert (
        "RefineSpec has no field 'block'"
        in invoke("evaluate", *short, "--rotation", "DFRot-b2", code=1).stderr
    )


def test_a_rotation_of_such_a_size_has_the_blocks_its_name_would_say():
    R = rotations.make(RotationSpec(seed=3), CHANNELS)
    assert torch.equal(R, rotations.make(RotationSpec(seed=3, block=2), CHANNELS))
    assert R.count_nonzero() == 2 * CHANNELS


def test_the_main_job_of_such_a_model_runs_to_its_end(
    odd: ModelSpec, text_file: Path, store: Store, tmp_path: Path
):
    sizes = {"windows": 2, "window": 64, "gptq_windows": 2, "steps": 3, "builds": 2}
    setting = Setting(model=odd, corpus=str(text_file), **sizes)
    result = main.run(setting, store)
    assert len(result.found) == len(main.recipes(main.rows_by_build(main.rows, setting.resolved())))
    assert set(result.table["rotation"]) == {"NR", "RO", "RH-b2", "DFRot"}
    assert "RH-b2, kept out" in gallery.report(result)
    assert gallery.save(result, tmp_path / "rows.jsonl", tmp_path / "figures")
    assert "RH-b2" in report.page(report.values(report.collect(setting, store)))
