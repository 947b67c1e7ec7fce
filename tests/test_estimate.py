"""The cost model counts what the code does: parameters and flops against real models, and the directions in
which costs must grow.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, save_tiny, tiny_model
from gguf_writer import write_gguf
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig

from dfrot_lab.maths import rotations
from dfrot_lab.model import loading, shapes, surgery
from dfrot_lab.model.shapes import SHAPES, Shape
from dfrot_lab.recipe.specs import ModelSpec, Recipe, RotationSpec
from dfrot_lab.study import cost, main, needs
from dfrot_lab.study.cost import GPU_80GB, Machine, Work, duration
from dfrot_lab.study.setting import Setting
from dfrot_lab.weights import gptq


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))


SMALL = Shape(64, 2, 96, 4, 2, 16, 256)
"""The shape of conftest's tiny model."""
HERE = Machine("here", 1e11, 5e10, 4e11, 1e10, 24e9, "made up")
STAGES = [
    "load and rotate",
    "capture",
    "refine",
    "GPTQ",
    "evaluate, 16-bit weights",
    "evaluate, integer",
    "total",
]


def main_job(**fields: int) -> list[Recipe]:
    """The main job's recipes in all builds, each once."""
    return main.recipes(main.rows_by_build(main.rows, Setting(**fields)))


def calibrated_job(**fields: int) -> list[Recipe]:
    """The main job's and, beside them, one whose weights are calibrated: then every stage has work."""
    setting = Setting(**fields)
    return [*main_job(**fields), setting.row("4-4-16", setting.rotation("RH"), weights="gptq")]


def seconds(
    shape: Shape, machine: Machine = HERE, recipes: Sequence[Recipe] | None = None, **sizes: int
) -> list[float]:
    return list(cost.estimate(shape, machine, recipes or calibrated_job(), **sizes)["seconds"])


def flops(work: Callable[[], object]) -> int:
    """Flops of the matrix products that a call runs, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("smollm2-135m", 134_515_008),
        ("qwen2.5-coder-0.5b", 494_032_768 - 24 * (896 + 2 * 128) + 896 * 151_936),  # no biases; lm_head
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-70b", 70_553_706_496),
    ],
)
def test_parameters_are_the_published_counts_norms_included(name, count):
    assert SHAPES[name].parameters == count


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_of_a_model_counts_its_parameters_and_its_memory_once_untied(tied):
    loaded = tiny_model(tied=tied)
    shape = shapes.shape_of(loaded.model.config)
    assert shape == replace(SMALL, tied=tied)
    assert shape.parameters == loaded.model.num_parameters()
    surgery.untie(loaded)
    assert shape.model_bytes == 4 * loaded.model.num_parameters()


def test_a_config_without_head_size_or_key_value_heads_has_the_usual_ones():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    config.head_dim = config.num_key_value_heads = None
    assert (shapes.shape_of(config).head, shapes.shape_of(config).kv_heads) == (16, 4)


def test_linears_and_their_inputs_are_the_models_in_order():
    loaded = tiny_model()
    shapes = [
        tuple(loading.linear(loaded.layers[0], name).weight.shape)
        for name in loaded.roles.linears(loaded.layers[0])
    ]
    assert list(SMALL.linears) == shapes
    assert list(SMALL.inputs) == [shapes[i][1] for i in (0, 3, 4, 6)]


def test_forward_counts_the_products_of_a_forward_pass():
    loaded, ids = tiny_model(), torch.zeros(3, 32, dtype=torch.long)
    loaded.model.set_attn_implementation("eager")
    beyond_causal = 3 * LAYERS * 2 * 32**2 * 64  # eager attention computes all pairs of tokens
    assert (
        flops(lambda: loading.body(loaded)(ids, use_cache=False)) - beyond_causal
        == cost.forward(SMALL, 32, 3).float_flops
    )


def test_load_counts_the_products_of_r1():
    loaded, R = tiny_model(), rotations.make(RotationSpec(kind="RH"), 64)
    surgery.prepare(loaded)
    counted = flops(lambda: surgery.rotate_residual(loaded, R)) - flops(lambda: rotations.check(R, 64))
    assert counted == cost.load(SMALL, loads=1, rotated=1).double_flops


def test_gptq_counts_half_a_hessian_for_each_input():
    full, half = replace(SMALL, channels=768, head=192, mlp=768), 16 * 32 * 4 * 768**2 * LAYERS
    columns = LAYERS * sum(out * into**2 for out, into in full.linears)
    assert cost.gptq(full, 32).float_flops - cost.forward(full, 32, 16).float_flops - columns == half
    assert (
        1 <= flops(lambda: gptq.hessian_of(torch.zeros(16, 768))) / (16 * 768**2) < 1.3
    )  # the blocks on the diagonal are whole


def test_a_drift_is_a_second_forward_and_whole_products():
    products = LAYERS * sum(2 * 32 * 16 * into**2 for into in SMALL.inputs)
    found = cost.drift(SMALL, 32, 16)
    assert found.float_flops - cost.forward(SMALL, 32, 16).float_flops == products
    x = torch.zeros(32 * 16, SMALL.channels)
    assert flops(lambda: x.T @ x) == 2 * 32 * 16 * SMALL.channels**2
    assert found.memory > cost.forward(SMALL, 32, 16).memory


def test_weights_that_know_their_inputs_are_announced_as_longer(store, tmp_path, text_file):
    model = save_tiny(tmp_path / "m")
    setting = Setting(model=model, corpus=str(text_file), window=64, gptq_windows=4)
    found = {}
    for by in ("rtn", "gptq", "gptaq"):
        found[by] = cost.seconds([setting.row("4-4-16", setting.rotation("RH"), weights=by)], store)[0]
    assert found["rtn"] < found["gptq"] < found["gptaq"]


def test_integer_windows_move_the_linears_flops_to_int8_and_nothing_else():
    floats, integers = cost.float_window(SMALL, 32), cost.integer_window(SMALL, 32)
    assert integers.int8_ops == 2 * SMALL.linear_weights * 32
    assert floats.float_flops == integers.float_flops + integers.int8_ops
    assert integers.memory >= floats.memory


def test_the_main_job_is_counted_from_its_recipes():
    """In each of 7 builds full precision, and RO, RH and DFRot with weights of 16 and of 4 bits; NR with both
    in one: 51 models, 42 of them rotated. 7 captures load the model too. 43 rows have 16-bit weights.
    """
    works = {work.stage: work for work in cost.stages(SMALL, main_job(), tokens=32)}
    assert len(dict.fromkeys(main_job())) == len(main_job()) == 65
    assert works["load and rotate"] == cost.load(SMALL, loads=51 + 7, rotated=42)
    assert works["capture"] == cost.capture(SMALL, 32).times(7)
    assert works["refine"] == cost.refine(SMALL, 32).times(7)
    assert works["evaluate, 16-bit weights"] == cost.float_window(SMALL, 32).times(43 * 2)
    assert works["evaluate, integer"] == cost.integer_window(SMALL, 32).times(22 * 2)
    one = {work.stage: work for work in cost.stages(SMALL, main_job()[:1], tokens=32)}
    assert one["load and rotate"] == cost.load(SMALL, loads=2, rotated=0)
    assert one["capture"] == cost.capture(SMALL, 32), "the main job looks inside whatever is scored"


def test_a_build_more_is_counted_in_every_stage():
    one, five = (seconds(SMALL, recipes=main_job(builds=builds)) for builds in (1, 5))
    assert all(3.99 < after / before < 5.01 for before, after in zip(one, five, strict=True)), (
        "NR is there once"
    )


def test_what_is_not_run_is_no_stage_and_takes_no_memory():
    """No weight of the main job is calibrated: GPTQ's Hessians are not what a machine lacks."""
    assert [work.stage for work in cost.stages(SMALL, main_job())] == [
        name for name in STAGES[:-1] if name != "GPTQ"
    ]
    assert "evaluate, integer" not in {work.stage for work in cost.stages(SMALL, main_job()[:1])}
    works = {work.stage: work for work in cost.stages(SMALL, calibrated_job(), tokens=32)}
    assert works["GPTQ"] == cost.gptq(SMALL, 32)
    shape, machine = SHAPES["llama-3-70b"], replace(GPU_80GB, memory=24e9)
    peaks = [
        cost.estimate(shape, machine, recipes)["memory_gb"].max()
        for recipes in (main_job(), calibrated_job())
    ]
    assert peaks[0] < 24 < peaks[1]


def test_disk_holds_captures_references_and_a_byte_a_weight():
    """Captures of 2 sites a layer, one a build, and the last hidden states of 2 windows a build, in float32;
    weights of 4 bits of NR, and of RO, RH and DFRot in each build.
    """
    for builds, models in ((1, 4), (5, 16)):
        floats = (2 * LAYERS + 2) * builds * 32 * 64
        kept = needs.disk(SMALL, main_job(builds=builds), 32)
        assert kept == 4 * floats + models * SMALL.linear_weights
    more = needs.disk(SMALL, main_job(builds=1, windows=7), 32) - needs.disk(SMALL, main_job(builds=1), 32)
    assert more == 4 * 5 * 32 * 64, "five references more"


def test_the_table_has_every_stage_and_a_total():
    table = cost.estimate(SMALL, HERE, calibrated_job())
    assert list(table.columns) == ["stage", "seconds", "memory_gb", "fits"]
    assert list(table["stage"]) == STAGES
    assert table["seconds"].iloc[-1] == pytest.approx(table["seconds"].iloc[:-1].sum())
    assert table["memory_gb"].iloc[-1] == table["memory_gb"].iloc[:-1].max()
    assert (table["seconds"] > 0).all()


@pytest.mark.parametrize(
    "bigger", [{"channels": 128, "head": 32}, {"layers": 3}, {"mlp": 192}, {"kv_heads": 4}], ids=str
)
def test_a_larger_model_costs_more_at_every_stage(bigger):
    base, more = seconds(SMALL), seconds(replace(SMALL, **bigger))
    rises = [after > before for before, after in zip(base, more, strict=True)]
    free = {"refine"} if {"mlp", "kv_heads"} & set(bigger) else set()  # it sees rows of C channels only
    assert {stage for stage, rise in zip(STAGES, rises, strict=True) if not rise} == free


def test_more_windows_cost_evaluations_only_and_more_tokens_all_but_loading():
    base = seconds(SMALL)
    assert [a > b for a, b in zip(seconds(SMALL, recipes=calibrated_job(windows=7)), base, strict=True)] == [
        False
    ] * 4 + [True] * 3
    assert [a > b for a, b in zip(seconds(SMALL, tokens=4096), base, strict=True)] == [False] + [True] * 6


def test_seconds_are_inverse_to_the_rates():
    fast = Machine(
        "fast",
        3 * HERE.float_rate,
        3 * HERE.double_rate,
        3 * HERE.int8_rate,
        3 * HERE.byte_rate,
        HERE.memory,
        "made up",
    )
    assert seconds(SMALL, fast) == pytest.approx([s / 3 for s in seconds(SMALL)])
    work = Work("all", 2e11, 1e11, 8e11, 3e10)
    assert work.seconds(HERE) == 2 + 2 + 2 + 3
    assert work.times(2).seconds(HERE) == (work + work).seconds(HERE) == 18


def test_what_fits_into_80_gb():
    fits = {name: cost.estimate(SHAPES[name], GPU_80GB, calibrated_job())["fits"].iloc[-1] for name in SHAPES}
    assert set(fits.values()) == {True}, "what does not fit as a whole is read layer by layer"
    small = replace(GPU_80GB, memory=24e9)  # a walk does not hold 70B there either, but its Hessians
    fits = {name: cost.estimate(SHAPES[name], small, calibrated_job())["fits"].iloc[-1] for name in SHAPES}
    assert fits == {name: name != "llama-3-70b" for name in SHAPES}


def test_this_machine_is_measured():
    machine = cost.measure_machine()
    assert 1e9 < machine.float_rate < 1e15
    assert machine.double_rate < 2 * machine.float_rate
    assert machine.int8_rate > 1e8
    assert 1e8 < machine.byte_rate < 1e13
    assert machine.memory > 1e9


def test_a_folder_is_read_without_its_weights(tmp_path):
    spec = save_tiny(tmp_path / "tiny")
    for file in Path(spec.source).glob("*.safetensors"):
        file.unlink()
    assert shapes.shape(spec) == SMALL


def test_a_gguf_file_is_read_too(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model())
    assert shapes.shape(ModelSpec(source=str(path))) == SMALL
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"tiny\.gguf is truncated"):
        shapes.shape(ModelSpec(source=str(path)))


def test_what_the_package_refuses_has_no_estimate(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"got 'llama-7b', which is none of them\. "
        r"To estimate without a model: smollm2-135m, qwen2.5-coder-0.5b, llama-2-7b, llama-3-70b",
    ):
        shapes.shape(ModelSpec(source="llama-7b"))
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be rotated"):
        shapes.shape(ModelSpec(source=str(tmp_path / "gpt2")))


def test_the_text_names_model_machines_and_how_far_to_trust_it():
    text = needs.describe("llama-3-70b", SHAPES["llama-3-70b"], [HERE, GPU_80GB], calibrated_job())
    for part in (
        "llama-3-70b: 70,553,706,496 parameters",
        "made up",
        "not measured",
        "(does not fit)",
        "within a factor of about 2",
        *STAGES,
    ):
        assert part in text


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.071, "1 s"), (4.46, "4.5 s"), (89, "89 s"), (720, "12 min"), (12240, "3.4 h"), (449280, "5.2 days")],
)
def test_durations_are_in_words(value, words):
    assert duration(value) == words


def test_growths_fit_finds_the_powers_it_was_made_with(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import growth

    points = [growth.Point("x", C, n, 1e-9 * C**1.9 * n**1.1) for C in (288, 576, 1152) for n in (1000, 4000)]
    law = growth.fit(points)
    assert (law.channels, law.rows, law(4096, 1e5)) == pytest.approx((1.9, 1.1, 1e-9 * 4096**1.9 * 1e5**1.1))
    assert growth.fit([growth.Point("x", C, None, C**3.0) for C in (2, 8)]).rows is None
    assert [growth.mlp_width(C) for C in (64, 288, 576, 1152, 2304)] == [192, 768, 1536, 3072, 6144]


def test_a_folders_shape_is_kept_so_that_a_second_dry_run_loads_no_transformers(tiny_spec: ModelSpec):
    first = shapes.shape(tiny_spec)
    code = "import sys; from dfrot_lab.model import shapes; from dfrot_lab.recipe.specs import ModelSpec\n"
    code += f"print(shapes.shape(ModelSpec(source={tiny_spec.source!r})), 'transformers' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [*str(first).split(), "False"]


def test_a_model_that_does_not_fit_is_counted_as_it_is_read():
    """Its memory hangs on one layer, not on how many there are."""
    shape, recipes = SHAPES["llama-2-7b"], main_job()
    small = replace(HERE, memory=16e9)
    peak = cost.estimate(shape, small, recipes)["memory_gb"].max()
    assert peak < 16 < cost.estimate(shape, replace(HERE, memory=80e9), recipes)["memory_gb"].max()
    deeper = cost.estimate(replace(shape, layers=80), small, recipes)["memory_gb"]
    assert deeper[:2].tolist() == cost.estimate(shape, small, recipes)["memory_gb"][:2].tolist()
    assert "Read layer by layer on" in needs.describe("7b", shape, [small], recipes)
    assert "Read layer by layer on" not in needs.describe("7b", SHAPES["smollm2-135m"], [small], recipes)


def test_what_a_machine_lacks_is_said_before_work():
    shape, recipes = SHAPES["llama-2-7b"], main_job()
    assert needs.shortage(SHAPES["smollm2-135m"], recipes, 2048, 1e12) is None
    said = needs.shortage(shape, recipes, 2048, 1e9)
    assert re.search(r"this would need about .*[0-9]+ GB of disk and has 1$", said)
