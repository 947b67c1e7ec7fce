"""Activations with one scale a site, found before the model runs, and with a scale for each group of a token's channels."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import LAYERS
from hypothesis import given, settings, strategies as st
from test_cli import invoke
from test_clips import by_both, inputs
from test_evaluate import at, save_lively, spec_for
from test_families import folder_of as family_folder
from test_gptq import fresh
from test_stream import folder_of, recipe
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.quantizers import Fixed, centred, fake_quantize, scale_zero
from dfrot_lab.model import checkpoint, corpus, door, hooks, surgery
from dfrot_lab.observe import static
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.grids import SCHEMES, QuantSpec
from dfrot_lab.recipe.specs import CorpusSpec, Recipe, RotationSpec, StaticSpec, recipe_of
from dfrot_lab.score import build, perplexity, rows

WINDOW = 32
IDS = torch.arange(3 * 48).reshape(3, 48) * 7 % 90 + 32
GRIDS = [QuantSpec(bits=bits, scheme=scheme, granularity="static") for bits in (3, 8) for scheme in SCHEMES]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moving(grid: QuantSpec, **fields: object) -> QuantSpec:
    """The grid with one scale of its own for each tensor."""
    return grid.with_(granularity="per_tensor", **fields)


def with_static(spec: Recipe, windows: int = 3) -> Recipe:
    text = StaticSpec(corpus=spec.corpus.with_(split="calibration"), windows=windows, window=WINDOW)
    return spec.with_(activations=spec.activations.with_(granularity="static"), static=text)


def grouped(spec: Recipe, size: int = 32) -> Recipe:
    return spec.with_(activations=spec.activations.with_(granularity="per_group", group_size=size))


@pytest.fixture
def plain(tmp_path, text_file) -> Recipe:
    return recipe(folder_of(tmp_path / "m"), text_file, "4-4-4", weights="rtn")


@pytest.fixture
def lively(tmp_path, text_file) -> Recipe:
    return spec_for(save_lively(tmp_path / "lively"), text_file)


# ---- a fixed scale


def slow(value: float, grid: QuantSpec, fixed: Fixed) -> float:
    """One value at a time; Python's round is half to even, as torch's."""
    low, high = (
        (-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1) if grid.symmetric else (0, 2**grid.bits - 1)
    )
    code = min(max(round(value / fixed.scale) + int(fixed.zero), low), high)
    return fixed.scale * (code - fixed.zero)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("fixed", [Fixed(0.37, 0), Fixed(0.05, 3), Fixed(2.5, -40)])
def test_values_equal_a_slow_loop(grid, fixed):
    fixed = fixed._replace(zero=0) if grid.symmetric else fixed
    x = draw(2, 5, 24) * torch.linspace(0.1, 9, 5)[:, None]
    expected = [slow(value, grid, fixed) for value in x.flatten().tolist()]
    assert fake_quantize(x, grid, fixed).flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    out = torch.empty(10, 24)
    scale = centred(x.reshape(10, 24), grid, out, fixed)
    assert scale.flatten().tolist() == [fixed.scale] * 10
    assert (out * scale).flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_on_the_row_it_was_found_on_it_is_the_tensors_own(grid, dtype):
    """With no clip and with each clip, to the bit: static differs from dynamic in when a scale is found."""
    x = (draw(4, 24, seed=grid.bits) + 0.7).to(dtype)
    found = list(static.candidates(torch.stack([x.amin(), x.amax()]), grid))
    assert len(found) == len(static.RATIOS) and static.RATIOS[0] == 1
    for ratio, fixed in zip(static.RATIOS, found, strict=True):
        assert torch.equal(fake_quantize(x, grid, fixed), fake_quantize(x, moving(grid, clip_ratio=ratio)))


@given(
    seed=st.integers(0, 999), cut=st.integers(1, 7), grid=st.sampled_from(GRIDS), scale=st.floats(0.01, 10)
)
@settings(max_examples=40, deadline=None)
def test_a_token_is_rounded_as_it_is_alone_and_what_is_rounded_stays(seed, cut, grid, scale):
    x, fixed = draw(8, 16, seed=seed), Fixed(scale, 0 if grid.symmetric else 2)
    whole = fake_quantize(x, grid, fixed)
    assert torch.equal(whole[:cut], fake_quantize(x[:cut], grid, fixed))
    assert torch.equal(fake_quantize(whole, grid, fixed), whole)
    inside = (x / scale + fixed.zero).round() == whole / scale + fixed.zero
    assert float(((x - whole).abs() * inside).max()) <= scale / 2 * (1 + 1e-9)


def test_without_its_scale_it_rounds_nothing():
    with pytest.raises(
        ValueError, match=r"QuantSpec\.granularity must be another than static, whose scale is"
    ):
        fake_quantize(draw(2, 8), QuantSpec(granularity="static"))


# ---- the search


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [3, 4, 8])
@torch.no_grad()
def test_it_is_the_ratio_of_least_error_over_all_tokens_of_a_site(scheme, bits):
    """By the values themselves, ratio by ratio, R4 acting; a massive token in the text."""
    loaded, grid = fresh(rotated=True), QuantSpec(bits=bits, scheme=scheme, granularity="static")
    ids = IDS.clone()
    ids[:, 0] = 10  # a newline
    found = static.find(loaded, ids, grid, lambda **how: surgery.online(loaded, r4=True, **how))
    seen = [inputs(loaded, each[None], r4=True) for each in ids]
    assert set(found) == set(seen[0]) == set(hooks.sites_of(loaded, *hooks.LINEAR_INPUTS))
    chosen = set()
    for site, fixed in found.items():
        x = torch.cat([each[site] for each in seen])
        lost = []
        for ratio in static.RATIOS:
            scale, zero = scale_zero(x.reshape(1, -1), moving(grid, clip_ratio=ratio))
            own = fake_quantize(x, grid, Fixed(float(scale), float(zero)))
            lost.append(float((own - x).double().square().sum()))
        tried = list(static.candidates(torch.stack([x.amin(), x.amax()]), grid))
        assert lost[tried.index(fixed)] <= min(lost) * (1 + 2e-3), site
        chosen.add(static.RATIOS[tried.index(fixed)])
    assert bits == 8 or (len(chosen) > 1 and min(chosen) < 1)


@given(seed=st.integers(0, 999), power=st.integers(-20, 20), parts=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_windows_in_another_cut_and_values_twice_as_large_give_the_same(seed, power, parts):
    x, grid = (
        draw(30, 8, seed=seed, dtype=torch.float32),
        QuantSpec(scheme="asymmetric", granularity="static"),
    )
    larger = (x * 2.0**power).chunk(parts)
    low, high = map(float, x.aminmax())
    (_, one), (_, other) = (
        static.counted([x], low, high),
        static.counted(larger, *(end * 2.0**power for end in (low, high))),
    )
    assert float(one.sum()) == x.numel() and torch.equal(one, other)
    own = static.best([x], grid)
    assert static.best(larger, grid) == Fixed(own.scale * 2.0**power, own.zero)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_a_site_of_one_value_keeps_it(grid, value):
    x = torch.full((4, 8), value)
    found = static.best([x], grid)
    assert math.isfinite(found.scale) and found.scale > 0
    torch.testing.assert_close(fake_quantize(x, grid, found), x, rtol=0.02, atol=1e-6)


def test_one_massive_value_takes_the_grid_from_the_others_only_where_it_weighs_enough():
    """A value 100 times any other: at 3 bits it is clipped where the others together weigh more than it."""
    grid = QuantSpec(bits=3, granularity="static")
    few, many = draw(4, 8, dtype=torch.float32), draw(4000, 64, dtype=torch.float32)
    few[0, 0] = many[0, 0] = 100.0
    wide, narrow = (static.best(x.chunk(3), grid).scale for x in (few, many))
    assert wide > 20 and narrow < 10


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused_by_the_site_they_are_at(bad):
    x = draw(8, 8, dtype=torch.float32)
    x[5, 3] = bad
    with pytest.raises(ValueError, match=r"activations of layers\.3\.o_proj_in must be finite; got \["):
        static.best(x.chunk(2), QuantSpec(granularity="static"), "layers.3.o_proj_in")


# ---- a model with them


def test_the_built_model_has_them_and_they_are_kept(plain, store):
    spec = with_static(plain)
    built = build.build(spec, store)
    unquantized = build.build(at_16_weights(plain), store)
    text = spec.static
    ids = corpus.sampled_blocks(text.corpus, built.loaded.tokenizer, blocks=3, window=WINDOW, sample=None)
    online = {"r4": True}
    expected = static.find(
        unquantized.loaded,
        ids,
        spec.activations,
        lambda **how: surgery.online(unquantized.loaded, **online, **how),
    )
    assert built.transforms.static == expected and len(expected) == 4 * LAYERS
    [kept] = [artefact for artefact in store.list() if artefact.kind == static.KIND]
    assert kept.json("static") == {site: list(both) for site, both in expected.items()}
    assert build.build(spec, store).transforms.static == expected


def at_16_weights(spec: Recipe) -> Recipe:
    return spec.with_(weights=spec.weights.with_(quantizer=QuantSpec(bits=16, granularity="per_channel")))


@torch.no_grad()
def test_every_linear_reads_what_the_formula_says(plain, store):
    """Against the built model with its inputs rounded by hand, site by site."""
    spec = with_static(
        at_16_weights(plain).with_(keys=plain.keys.with_(bits=16), values=plain.values.with_(bits=16))
    )
    built = build.build(spec, store)
    ids = build.windows(spec, built.loaded)
    with build.quantized(built, spec):
        found = built.loaded.model(ids).logits

    def by_hand(site: str, x: Tensor) -> Tensor:
        fixed, bits = built.transforms.static[site], spec.activations.bits
        codes = (x / fixed.scale).round() + fixed.zero
        return fixed.scale * (codes.clamp(0, 2**bits - 1) - fixed.zero)

    sites = hooks.sites_of(built.loaded, *hooks.LINEAR_INPUTS)
    with surgery.online(built.loaded, r4=True, function=by_hand, sites=sites):
        expected = built.loaded.model(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - built.loaded.model(ids).logits).abs().max() > 1e-3, "rounding changed nothing"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@torch.no_grad()
def test_integer_products_are_those_of_rounded_values(family, tmp_path, text_file, store):
    made = folder_of(tmp_path / "m") if family == "llama" else family_folder(family, tmp_path / "m")
    plain = recipe(made, text_file, "4-4-4", weights="rtn")
    spec = with_static(plain)
    assert build.is_integer(spec) and not build.is_integer(grouped(plain))
    assert not build.is_integer(spec.with_(activations=spec.activations.with_(bits=8)))
    built = build.build(spec, store)
    ids = build.windows(spec, built.loaded)
    logits = by_both(built, spec, ids)
    own = {site: Fixed(1.1 * fixed.scale, fixed.zero) for site, fixed in built.transforms.static.items()}
    other = replace(built, transforms=replace(built.transforms, static=own))
    with build.quantized(other, spec):
        without = built.loaded.model(ids).logits
    apart = (logits[True] - logits[False]).abs().mean()
    assert apart < 0.05 * (logits[True] - without).abs().mean()


@pytest.mark.parametrize("make", [with_static, grouped])
def test_a_model_read_layer_by_layer_has_the_same_losses(make, plain, tmp_path, monkeypatch):
    spec = make(plain)
    expected = perplexity.evaluate(spec, Store(tmp_path / "kept"))
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    found = perplexity.evaluate(spec, Store(tmp_path / "streamed"))
    assert found.losses.tolist() == expected.losses.tolist()


def test_rows_with_and_without_are_not_built_nor_kept_as_one(plain, store):
    static_rows, groups = with_static(plain), grouped(plain)
    found = perplexity.evaluate_all([plain, static_rows, plain, groups, with_static(plain, 2)], store)
    losses = [tuple(each.losses) for each in found]
    assert losses[0] == losses[2] and len(set(losses)) == 4
    said = [rows.rows([each])[0] for each in found]
    assert [row["activations"] for row in said] == [
        "asym4",
        "asym4-static",
        "asym4",
        "asym4-g32",
        "asym4-static",
    ]
    assert "windows=3" in said[1]["parameters"] and "windows=2" in said[4]["parameters"]
    again = Recipe.from_yaml(static_rows.to_yaml())
    assert again == static_rows and again.key == static_rows.key != plain.key


def test_a_static_scale_loses_most_where_massive_tokens_are(lively, store):
    """One scale for all tokens of a site is worse than one for each, and a group's own is better."""
    spec = at(lively, "16-4-16")
    made = with_static(spec)
    each, own, groups = (
        perplexity.evaluate(one, store).divergence for one in (spec, made, grouped(spec, 16))
    )
    assert groups < each < own


def test_weights_calibrated_on_rounded_inputs_see_them(plain, store):
    seen = plain.with_(weights=plain.weights.with_(method="gptq", rounded=True))
    spec = with_static(seen)
    prints = door.prints
    named = {keys.content_key(keys.weights(door.resolved(one).canonical(), prints)) for one in
             (seen, spec, with_static(seen, 2), grouped(seen))}  # fmt: skip
    assert len(named) == 4
    one, other = (build.build(each, store).codes[0] for each in (spec, seen))
    assert any(not torch.equal(one[name].codes, other[name].codes) for name in one)
    unseen = (plain, with_static(plain))
    assert (
        len({keys.content_key(keys.weights(door.resolved(one).canonical(), prints)) for one in unseen}) == 1
    )
    assert len({build.build_key(one) for one in unseen}) == 2


def test_an_expert_that_no_calibration_token_reaches_rounds_each_token_by_itself(
    tmp_path, text_file, store, caplog, monkeypatch
):
    spec = with_static(recipe(family_folder("mixtral", tmp_path / "m"), text_file, "16-4-16"), windows=1)
    short = spec.with_(static=spec.static.with_(window=2))
    built = build.build(short, store)
    missing = {*hooks.sites_of(built.loaded, *hooks.LINEAR_INPUTS)} - {*built.transforms.static}
    assert missing and all(".experts." in site for site in missing)
    [said] = [record.getMessage() for record in caplog.records if "no token reached" in record.getMessage()]
    assert str(len(missing)) in said and min(missing) in said
    function = build.rounded(short, built.transforms, None)
    x = draw(5, 64, dtype=torch.float32)
    expected = fake_quantize(x, short.activations.with_(granularity="per_token"))
    assert torch.equal(function(min(missing), x), expected)
    assert all(math.isfinite(loss) for loss in perplexity.evaluate(short, store).losses)


# ---- groups


@given(seed=st.integers(0, 999), scheme=st.sampled_from(list(SCHEMES)), bits=st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_a_group_of_all_channels_is_the_token_and_a_smaller_one_a_token_of_its_own(seed, scheme, bits):
    x, grid = draw(2, 3, 32, seed=seed), QuantSpec(bits=bits, scheme=scheme)
    whole, small = (grid.with_(granularity="per_group", group_size=size) for size in (32, 8))
    assert torch.equal(fake_quantize(x, whole), fake_quantize(x, grid))
    assert torch.equal(fake_quantize(x, small), fake_quantize(x.reshape(-1, 8), grid).reshape(x.shape))


@torch.no_grad()
def test_groups_act_at_every_site(plain, store):
    spec = grouped(plain, 16)
    built = build.build(spec, store)
    function = build.rounded(spec, built.transforms, None)
    for site, x in inputs(built.loaded, IDS[:1], r4=True).items():
        expected = fake_quantize(x.reshape(-1, 16), plain.activations).reshape(x.shape)
        assert torch.equal(function(site, x), expected) and not torch.equal(expected, x)


# ---- what is kept, and what is refused


def test_a_damaged_artefact_is_found_again_and_another_models_is_never_taken(
    plain, tmp_path, text_file, store
):
    spec = with_static(plain)
    first = build.build(spec, store).transforms.static
    [kept] = [artefact for artefact in store.list() if artefact.kind == static.KIND]
    file = kept.path / "static.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values).replace("0.", "1."))
    assert build.build(spec, store).transforms.static == first
    other = recipe(family_folder("qwen2", tmp_path / "other"), text_file, "4-4-4", weights="rtn")
    assert build.build(with_static(other), store).transforms.static != first
    found = {artefact.key for artefact in store.list() if artefact.kind == static.KIND}
    assert len(found) == 2 and kept.key in found


def test_scales_hang_on_the_rotation_the_grid_and_the_text(plain):
    spec = with_static(plain)
    changed = [
        spec,
        spec.with_(rotation=RotationSpec(seed=1)),
        spec.with_(activations=spec.activations.with_(scheme="symmetric")),
        spec.with_(activations=spec.activations.with_(bits=8)),
        spec.with_(static=spec.static.with_(windows=4)),
        spec.with_(static=spec.static.with_(sample=1)),
        spec.with_(jitter=1),
        spec.with_(online="R3"),
        spec.with_(mlp_block=16),
    ]
    found = [keys.content_key(keys.static(door.resolved(one).canonical(), door.prints)) for one in changed]
    assert len(set(found)) == len(found)
    same = [spec.with_(windows=1), spec.with_(keys=spec.keys.with_(bits=8)), at_16_weights(spec)]
    assert {keys.content_key(keys.static(door.resolved(one).canonical(), door.prints)) for one in same} == {
        found[0]
    }


def test_where_nothing_is_rounded_there_are_none(plain):
    plain = recipe_of("16-16-16", model=plain.model)
    for made in (with_static(plain), grouped(plain)):
        assert made.canonical() == plain.canonical()


def test_a_size_that_does_not_divide_every_width_is_refused_before_any_work(plain, store):
    for size in (48, 64):
        with pytest.raises(
            ValueError, match=f"Recipe.activations.group_size must be a divisor of 64, 96; got {size}"
        ):
            perplexity.evaluate(grouped(plain, size), store)
    assert not store.list()


def test_a_text_too_short_is_refused_before_any_work(plain, store):
    spec = with_static(plain, windows=10**6)
    with pytest.raises(ValueError, match=r"(window|windows|tokens) must be at most"):
        build.require_texts(spec, store)
    long = spec.with_(static=spec.static.with_(windows=1, window=4096))
    with pytest.raises(ValueError, match="window"):
        build.require_texts(long, store)
    assert not [artefact for artefact in store.list() if artefact.kind == static.KIND]


@pytest.mark.parametrize(
    ("acts", "found"),
    [("token", ("per_token", None)), ("static", ("static", None)), ("64", ("per_group", 64))],
)
def test_the_command_line_says_them(acts, found):
    spec = Recipe.from_yaml(invoke("recipe", "RH", "16-4-16", "--acts", acts, "--window", "512").output)
    assert (spec.activations.granularity, spec.activations.group_size) == found
    text = StaticSpec(corpus=CorpusSpec(name="auto", split="calibration"), window=512)
    assert spec.static == (text if acts == "static" else None)


@pytest.mark.parametrize("acts", ["0", "-64", "channel", "6.4", "", "٣"])
def test_what_is_no_way_to_share_a_scale_is_refused(acts):
    said = invoke("recipe", "RH", "16-4-16", f"--acts={acts}", code=1)
    assert said.stderr.startswith("Error: --acts must be token, static, mxfp4, nvfp4, or so many channels")
