"""In the compressed-tensors format lies what was scored: the same codes and scales, loaded by plain transformers
or by the lab again; what the format cannot hold is refused or said, before any work.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import IDS, apart, ask, spec_of
from test_stream import TOKENS
from torch import Tensor
from transformers import AutoModelForCausalLM

import dfrot_lab
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export import compressed, folders, hf
from dfrot_lab.maths.hadamard import hadamard_matrix
from dfrot_lab.maths.quantizers import dequantize, quantize
from dfrot_lab.model import checkpoint, hooks, loading, packed, packed_files, surgery
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import ModelSpec, Recipe, RotationSpec, StaticSpec
from dfrot_lab.score import build, perplexity

GROUPS = QuantSpec(granularity="per_group", group_size=32)
STATIC = QuantSpec(bits=8, granularity="static")

BOTH = list(compressed.FORMATS)
MOST = {4: 7.5, 8: 127.5}
"""What the largest value of a token is divided by, by bits: half the number of steps."""


def at(base: Recipe, weights: int, activations: int) -> Recipe:
    quantizer = base.weights.quantizer.with_(bits=weights)
    grid = base.activations.with_(bits=activations)
    return base.with_(weights=base.weights.with_(quantizer=quantizer), activations=grid)


@pytest.fixture
def tiny(tmp_path, text_file) -> Recipe:
    return spec_of(tmp_path, text_file, "llama", dtype="float32")


@torch.inference_mode()
def logits(model) -> Tensor:
    return model(IDS).logits


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def fake_quantized(recipe: Recipe, store: Store, with_r4: bool = False) -> Tensor:
    """The logits of the lab's own model, whose activations are rounded as the format's library says: largest
    magnitude over half the number of steps, codes clamped after rounding."""
    recipe = compressed.adapted(recipe, with_r4)
    built, bits = build.build(recipe, store), recipe.activations.bits

    def rounded(_site: str, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / MOST[bits]
        return scale * (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    sites = hooks.sites_of(built.loaded, *hooks.LINEAR_INPUTS) if bits < 16 else []
    online = {"r4": built.transforms.r4, "blocks": recipe.blocks, "function": rounded, "sites": sites}
    with surgery.online(built.loaded, **online):
        return logits(built.loaded.model)


@pytest.mark.parametrize(("weights", "activations"), BOTH)
def test_plain_transformers_computes_what_was_scored(weights, activations, tiny, tmp_path, store):
    recipe = at(tiny, weights, activations)
    folder = compressed.export(recipe, tmp_path / "made", store)
    found = logits(plain(folder))
    assert apart(found, fake_quantized(recipe, store)) < 1e-6
    assert apart(found, logits(dfrot_lab.load_export(folder))) < 1e-5
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said["format"] == compressed.FORMATS[weights, activations] and "transform_config" not in said


@pytest.mark.parametrize("method", ["rtn", "gptq", "qep", "foem", "lwc"])
def test_a_scale_for_each_group_of_inputs(method, tiny, tmp_path, store):
    recipe = at(tiny, 4, 16)
    grid = recipe.weights.quantizer.with_(granularity="per_group", group_size=32)
    recipe = recipe.with_(weights=recipe.weights.with_(quantizer=grid, method=method))
    folder = compressed.export(recipe, tmp_path / "made", store)
    held = load_file(folder / "model.safetensors")
    assert held["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 3)
    assert apart(logits(plain(folder)), fake_quantized(recipe, store)) < 1e-6
    own = compressed.adapted(recipe)
    again = at(own, 16, 16).with_(model=ModelSpec(source=str(folder)), rotation=RotationSpec(kind="NR"))
    one, other = (perplexity.evaluate(each, store) for each in (own, again))
    assert other.losses == pytest.approx(one.losses, rel=1e-6)
    assert "a scale for 32 inputs" in (folder / "README.md").read_text()


def test_a_group_that_divides_no_linear_is_refused_before_any_work(tiny, tmp_path, store):
    grid = tiny.weights.quantizer.with_(granularity="per_group", group_size=48)
    recipe = tiny.with_(weights=tiny.weights.with_(quantizer=grid))
    with pytest.raises(
        ValueError, match=r"WeightSpec.quantizer.group_size must be a divisor of 64, 96; got 48"
    ):
        compressed.export(recipe, tmp_path / "made", store)
    with pytest.raises(ValueError, match=r"must be a divisor of 64, 96; got 48"):
        perplexity.evaluate(recipe, store)
    assert not store.list()


@pytest.mark.parametrize("case", ["qwen2", "phi3", "gemma", "mistral", "qwen3"])
def test_other_families(case, tmp_path, text_file, store):
    recipe = at(spec_of(tmp_path, text_file, case, dtype="float32"), 4, 16)
    folder = compressed.export(recipe, tmp_path / "made", store)
    assert apart(logits(plain(folder)), fake_quantized(recipe, store)) < 1e-6


@pytest.mark.parametrize(("weights", "activations"), [(4, 16), (4, 4), (8, 8)])
def test_r4_is_applied_by_our_loader_and_left_out_by_transformers(
    weights, activations, tiny, tmp_path, store
):
    recipe = at(tiny, weights, activations)
    folder = compressed.export(recipe, tmp_path / "made", store, with_r4=True)
    wanted = fake_quantized(recipe, store, with_r4=True)
    bound = 0.05 if activations == 4 else 1e-6  # their transform is a product: a code of 4 bits may turn
    assert apart(logits(dfrot_lab.load_export(folder)), wanted) < bound
    assert apart(logits(plain(folder)), wanted) > 0.1
    held = load_file(folder / "model.safetensors")
    matrix = held["model.layers.1.mlp.down_proj.R4_input.weight"]
    assert torch.equal(matrix, hadamard_matrix(32).float()), (
        "of 96 channels in blocks of 32, Sylvester's order"
    )
    first = (folder / "README.md").read_text().split("# ", 1)[1].splitlines()[2]
    assert first.startswith("**transformers alone computes this model wrongly**")


def test_the_codes_are_those_of_the_store(tiny, tmp_path, store):
    recipe = at(tiny, 4, 16)
    folder = compressed.export(recipe, tmp_path / "made", store)
    built = build.build(compressed.adapted(recipe), store)
    quantized = built.codes[1]["self_attn.q_proj"]
    held = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    low = held[f"{name}.weight_packed"].view(torch.uint8)
    codes = torch.stack([low & 15, low >> 4], -1).flatten(1).to(torch.int8) - 8
    assert torch.equal(codes, quantized.codes) and torch.equal(held[f"{name}.weight_scale"], quantized.scale)
    assert held[f"{name}.weight_shape"].tolist() == list(codes.shape)
    assert f"{name}.weight" not in held and "lm_head.weight" in held


@pytest.mark.parametrize(("weights", "activations"), [(4, 16), (8, 16), (4, 4), (8, 8)])
def test_as_model_of_the_lab_it_gives_the_same_row(weights, activations, tiny, tmp_path, store):
    recipe = at(tiny, weights, activations)
    folder = compressed.export(recipe, tmp_path / "made", store)
    own = compressed.adapted(recipe)
    again = at(own, 16, activations).with_(
        model=ModelSpec(source=str(folder)), rotation=RotationSpec(kind="NR"), activations=own.activations
    )
    one, other = (perplexity.evaluate(each, store) for each in (own, again))
    bound = 1e-6 if activations == 16 else 2e-2  # integer products there, floats here: a code may turn
    assert other.losses == pytest.approx(one.losses, rel=bound)


def test_the_rows_perplexity_is_that_of_plain_transformers(tiny, tmp_path, store):
    recipe = at(tiny, 4, 16)
    folder = compressed.export(recipe, tmp_path / "made", store)
    own = compressed.adapted(recipe)
    ids = build.windows_of(own, store)
    with torch.inference_mode():
        losses = [float(plain(folder)(window[None], labels=window[None]).loss) for window in ids]
    assert perplexity.evaluate(own, store).losses == pytest.approx(losses, rel=1e-5)


def test_a_model_read_layer_by_layer_is_written_the_same(tiny, tmp_path, store, monkeypatch):
    whole = compressed.export(at(tiny, 4, 4), tmp_path / "whole", store, with_r4=True)
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    monkeypatch.setattr(folders, "SHARD_BYTES", 1)
    parts = compressed.export(at(tiny, 4, 4), tmp_path / "parts", Store(tmp_path / "other"), with_r4=True)
    assert len(list(parts.glob("*.safetensors"))) == 5
    held = {}
    for path in parts.glob("*.safetensors"):
        held |= load_file(path)
    wanted = load_file(whole / "model.safetensors")
    assert held.keys() == wanted.keys() and all(torch.equal(held[name], wanted[name]) for name in held)


def test_a_prepared_bfloat16_model_has_scales_of_its_dtype(tmp_path, text_file, store):
    recipe = at(spec_of(tmp_path, text_file, "llama", dtype="bfloat16"), 4, 16)
    folder = compressed.export(recipe, tmp_path / "made", store)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys() if name.endswith("weight_scale")}  # noqa: SIM118
    assert kinds == {torch.bfloat16}
    assert apart(logits(plain(folder)).double(), fake_quantized(recipe, store).double()) < 0.05


# ---- what it cannot hold


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"bits": (16, 16)},
            "--bits must be one of 4-16-16, 8-16-16, 4-4-16, 4-8-16, 8-8-16 .*; got 16-16-16",
        ),
        ({"bits": (3, 16)}, "--bits must be one of .*; got 3-16-16"),
        ({"kv": 4}, "--bits must be one of .*; got 4-16-4"),
        ({"keep_out": "ro_vs_nr", "bits": (4, 4)}, "Recipe.keep_out must be None .*; got ro_vs_nr"),
        ({"clips": True, "bits": (4, 4)}, "Recipe.clips must be None for compressed-tensors"),
        (
            {"activations": GROUPS, "bits": (4, 4)},
            "Recipe.activations must be per_token for compressed-tensors.*; got per_group",
        ),
        (
            {"activations": STATIC, "static": StaticSpec(), "bits": (4, 8)},
            "Recipe.activations must be per_token for compressed-tensors.*; got static",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_any_work(change, said, tiny, tmp_path, store):
    recipe = at(tiny, *change.pop("bits", (4, 16)))
    if bits := change.pop("kv", None):
        recipe = recipe.with_(keys=recipe.keys.with_(bits=bits), values=recipe.values.with_(bits=bits))
    if change.pop("clips", None):
        from test_stream import looking

        recipe = looking(recipe, "clips")
    with pytest.raises(ValueError, match=said):
        compressed.export(recipe.with_(**change), tmp_path / "made", store)
    assert not (tmp_path / "made").exists() and not store.list()


def test_what_is_changed_is_said(tiny, caplog):
    found = compressed.adapted(at(tiny, 4, 4))
    assert found.activations == QuantSpec(bits=4, clip_ratio=14 / 15) and found.online == "none"
    assert "activations are sym4-c0.9" in caplog.text and "not asym4" in caplog.text
    assert "R4 is left out" in caplog.text
    caplog.clear()
    assert compressed.adapted(at(tiny, 4, 4), with_r4=True).mlp_block == 32
    assert "R4 is in blocks of 32" in caplog.text and "left out" not in caplog.text
    caplog.clear()
    assert compressed.adapted(found) == found and not caplog.text, "a recipe that fits is not changed"


def test_the_command(tiny, tmp_path, text_file, monkeypatch):
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    of = ["--model", str(tmp_path / "original"), "--corpus", str(text_file), "--window", str(TOKENS)]
    of += ["--weights", "rtn", "--to", "compressed-tensors", "--with-r4", "--out", str(tmp_path / "made")]
    found = ask(*of, "--bits", "4-4-16", "--group-size", "32", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["format"] == "compressed-tensors"
    said = Recipe.from_yaml(tmp_path / "made/dfrot_lab/recipe.yaml")
    assert said.mlp_block == 32 and said.activations.symmetric and said.weights.quantizer.group_size == 32
    refused = ask("--to", "hf", "--with-r4", "--out", str(tmp_path / "other"))
    assert refused.exit_code != 0 and "hf has no such choice" in refused.output


# ---- read again


def test_r4_is_not_read_as_plain_weights(tiny, tmp_path, store):
    folder = compressed.export(at(tiny, 4, 16), tmp_path / "made", store, with_r4=True)
    with pytest.raises(
        ValueError, match=r"has a transform 'R4' that acts while it runs: use dfrot_lab\.load_export"
    ):
        loading.load_model(ModelSpec(source=str(folder)), store)


@pytest.mark.parametrize("size", [None, 32])
def test_a_folder_of_the_formats_own_library_is_read_to_the_bit(size, tiny, tmp_path, store, monkeypatch):
    """Compressed by compressed-tensors itself, a scale a channel or a group; in lots of any size."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    source = hf.export(tiny, tmp_path / "hf", store)
    model = plain(source)
    config = compressed.config_of(compressed.adapted(at(tiny, 4, 16)), loading.roles_for(tiny.model, store))
    weights = config["config_groups"]["group_0"]["weights"]
    weights |= {"strategy": "group", "group_size": size} if size else {}
    config["quantization_status"] = "frozen"
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    spec = QuantSpec(bits=4, granularity="per_group", group_size=size) if size else QuantSpec(bits=4)
    wanted = {}
    for name, linear in model.named_modules():
        if hasattr(linear, "weight_scale"):
            found = quantize(linear.weight.detach(), spec)
            linear.weight_scale.data.copy_(found.scale.reshape(len(linear.weight), -1))
            wanted[f"{name}.weight"] = dequantize(found, linear.weight.shape)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    compressor.update_config(tmp_path / "theirs")
    loading.load_model(ModelSpec(source=str(source)), store).tokenizer.save_pretrained(tmp_path / "theirs")
    monkeypatch.setattr(packed_files, "SHARD", 20_000)
    loaded = loading.load_model(ModelSpec(source=str(tmp_path / "theirs")), store)
    held = dict(loaded.model.named_parameters())
    assert len(wanted) == 21 and all(torch.equal(held[name], x) for name, x in wanted.items())
    assert loaded.provenance.startswith("4-bit compressed-tensors weights of ")


GROUP = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}}
TOLD = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": GROUP}}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "nvfp4-pack-quantized"},
        {"kv_cache_scheme": {"num_bits": 8}},
        {"config_groups": {"a": {"weights": GROUP["weights"] | {"dynamic": True}}}},
        {"config_groups": {"a": {"weights": GROUP["weights"] | {"actorder": "group"}}}},
        {"config_groups": {"a": GROUP, "b": GROUP}},
        {"config_groups": {}},
        {"config_groups": [GROUP]},
        {"config_groups": {"a": {"weights": None}}},
        {"config_groups": {"a": {"weights": GROUP["weights"] | {"symmetric": False}}}},
        {"config_groups": {"a": {"weights": GROUP["weights"] | {"type": "float"}}}},
        {"config_groups": {"a": {"weights": GROUP["weights"] | {"num_bits": 40}}}},
        {"config_groups": {"a": {"weights": GROUP["weights"] | {"num_bits": True}}}},
    ],
)
def test_other_forms_are_refused_in_one_line(change):
    assert packed.bits_of("m", TOLD) == 4
    rule = "^m is already quantized, by compressed-tensors, and what is read of it is one group of linears .*: use"
    with pytest.raises(ValueError, match=rule):
        packed.bits_of("m", TOLD | change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a.weight_packed": torch.zeros(3, 5, dtype=torch.int32)}, "a.weight_shape must be what"),
        ({"a.weight_shape": torch.tensor([3, 1 << 60])}, "a.weight_shape must be what"),
        ({"a.weight_shape": torch.tensor([3, 16, 2])}, "a.weight_shape must be what"),
        ({"a.weight_packed": None}, "a.weight must be int8, with a scale; got none"),
        ({"a.weight_packed": None, "a.weight": torch.zeros(3, 16)}, "a.weight must be int8"),
        (
            {"a.weight_packed": None, "a.weight": torch.full((3, 16), 8, dtype=torch.int8)},
            "of 4 bits; got 8 to 8",
        ),
        ({"a.weight_scale": torch.ones(3, 1, dtype=torch.int32)}, "a.weight_scale must be floats"),
        ({"a.weight_scale": None}, "a.weight_scale must be floats, beside codes; got none"),
        ({"a.weight_scale": torch.ones(3, 3)}, "a.weight_scale's shape must be"),
        ({"a.weight_scale": torch.ones(2, 1)}, "a.weight_scale's shape must be"),
        ({"a.weight_scale": torch.ones(3)}, "a.weight_scale's shape must be"),
        ({"a.weight_scale": torch.ones(3, 2)}, "a.weight_scale's shape must be .3, 1., as its config says"),
        ({"a.weight_shape": torch.tensor(3)}, "a.weight_shape must be what"),
        ({"a.weight": torch.zeros(3, 16)}, "a.weight must be packed, or there as it is; got both"),
        (
            {"a.weight_packed": None, "a.weight": torch.zeros(0, 0, dtype=torch.int8)},
            "a.weight_scale's shape must be",
        ),
    ],
)
def test_codes_that_do_not_fit_are_refused(change, said):
    whole = {"a.weight_packed": torch.zeros(3, 2, dtype=torch.int32), "a.weight_shape": torch.tensor([3, 16])}
    whole |= {"a.weight_scale": torch.ones(3, 1)}
    assert torch.equal(packed.weights(whole, 4)["a.weight"], torch.full((3, 16), -8.0))
    with pytest.raises(ValueError, match=said):
        packed.weights({name: x for name, x in (whole | change).items() if x is not None}, 4)


def test_int8_kernels_have_no_groups(tiny, store, tmp_path):
    recipe = at(tiny, 8, 8)
    weights = recipe.weights.with_(quantizer=GROUPS.with_(bits=8))
    with pytest.raises(ValueError, match=r"--group-size must be None with 8-8-16, .*; got 32"):
        compressed.export(recipe.with_(weights=weights), tmp_path / "made", store)
    with pytest.raises(ValueError, match=r"load_export.folder must be a folder with config.json"):
        dfrot_lab.load_export(tmp_path / "nowhere")


def test_scales_are_of_as_many_inputs_as_the_config_says():
    codes = torch.arange(-8, 8).repeat(3, 1).to(torch.int8)
    whole = {"a.weight": codes, "a.weight_scale": torch.tensor([[1.0, 2], [3, 4], [5, 6]])}
    wanted = codes * whole["a.weight_scale"].repeat_interleave(8, 1)
    assert torch.equal(packed.weights(whole, 4, 8)["a.weight"], wanted)
    for size in (4, 5, 16, None):
        with pytest.raises(
            ValueError, match=r"a.weight_scale's shape must be .* as its config says; got \(3, 2\)"
        ):
            packed.weights(whole, 4, size)
    assert packed.group_of(TOLD) is None
    by_eight = GROUP["weights"] | {"strategy": "group", "group_size": 8}
    assert packed.group_of(TOLD | {"config_groups": {"a": {"weights": by_eight}}}) == 8


def test_tensors_of_a_linear_may_lie_in_different_files(tiny, tmp_path, store):
    folder = compressed.export(at(tiny, 4, 16), tmp_path / "made", store)
    wanted = loading.load_model(ModelSpec(source=str(folder)), store).model
    held = load_file(folder / "model.safetensors")
    scales = {name: x for name, x in held.items() if name.endswith("scale")}
    rest = {name: x for name, x in held.items() if name not in scales}
    (folder / "model.safetensors").unlink()
    for name, part in (("a", scales), ("b", rest)):
        save_file(part, folder / f"{name}.safetensors", {"format": "pt"})
    places = dict.fromkeys(scales, "a.safetensors") | dict.fromkeys(rest, "b.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index)
    loaded = loading.load_model(ModelSpec(source=str(folder)), Store(tmp_path / "other")).model
    for (name, one), other in zip(wanted.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other), name
    save_file(rest | scales, folder / "b.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"weight_scale in .*b.safetensors must be there once; got also in .*a.safet"
    ):
        loading.load_model(ModelSpec(source=str(folder)), Store(tmp_path / "other"))


def test_a_copy_elsewhere_tells_no_place(tiny, tmp_path, store):
    import shutil

    folder = compressed.export(at(tiny, 4, 16), tmp_path / "secret" / "m", store)
    loading.load_model(ModelSpec(source=str(folder)), store)
    copy = shutil.copytree(folder, tmp_path / "m")
    again = at(tiny, 16, 16).with_(model=ModelSpec(source=str(copy)), rotation=RotationSpec(kind="NR"))
    card = (hf.export(again, tmp_path / "again", store) / "README.md").read_text()
    assert "4-bit compressed-tensors weights of m." in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("weight_zero_point", "must be one of weight_packed, .*; got a tensor that is not read"),
        ("input_scale", "must be one of weight_packed, .*; got a tensor that is not read"),
        ("weight_scale", "weight_scale must be floats, beside codes; got none"),
    ],
)
def test_what_is_not_read_is_named(name, said, tiny, tmp_path, store):
    folder = compressed.export(at(tiny, 4, 16), tmp_path / "made", store)
    held = load_file(folder / "model.safetensors")
    full = f"model.layers.0.self_attn.q_proj.{name}"
    held = {n: x for n, x in held.items() if n != full} if full in held else held | {full: torch.ones(1)}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=said):
        loading.load_model(ModelSpec(source=str(folder)), store)


def test_a_damaged_folder_is_one_line_and_nothing_is_kept(tiny, tmp_path, store):
    folder = compressed.export(at(tiny, 4, 16), tmp_path / "made", store)
    held = load_file(folder / "model.safetensors")
    held["model.layers.0.self_attn.q_proj.weight_shape"] = torch.tensor([64, 65])
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"self_attn.q_proj.weight_shape must be what") as error:
        loading.load_model(ModelSpec(source=str(folder)), store)
    assert "\n" not in str(error.value)
    assert not [artefact for artefact in store.list() if artefact.kind == packed_files.KIND]
