"""Quantizers of the KV cache: each formula against a slow loop or a published value, what must not change, what
stays float, that attention gets what they hold, and what is refused before any work.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from again import FLIPPED, NOTICED, apart
from hypothesis import given, settings, strategies as st
from scipy import integrate, special
from test_evaluate import resolved, save_lively, spec_for
from torch import Tensor
from typer.testing import CliRunner

from dfrot_lab.caches import kivi, qjl, run, turboquant
from dfrot_lab.cli.app import app
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.model import checkpoint, hooks
from dfrot_lab.recipe import keys as content_keys, registry
from dfrot_lab.recipe.grids import KV_CACHE, PER_TOKEN, QuantSpec, cache_of
from dfrot_lab.recipe.registry import CACHES, Choice
from dfrot_lab.recipe.specs import Recipe, RotationSpec
from dfrot_lab.rotate.task import TaskSpec
from dfrot_lab.score import build, rows
from dfrot_lab.score.perplexity import evaluate
from dfrot_lab.study import beyond
from dfrot_lab.study.setting import Setting
from dfrot_lab.weights import run as weighing

RH = RotationSpec(kind="RH")
ROOT = Path(__file__).parents[1]
SMALL = {"kivi": {"group_size": 8, "residual": 16}}  # for windows of 64 tokens and heads of 16 channels
EVERY = [(name, held) for name, choice in CACHES.items() for held in choice.holds]
BITS = (2, 3, 4, 6, 8)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def of(name: str, bits: int, seed: int = 0) -> dict[str, QuantSpec]:
    return cache_of(name, bits, seed=seed, **SMALL.get(name, {}))


def read(x: Tensor, name: str, held: str, bits: int, seed: int = 0) -> Tensor:
    """What is read of x, held as keys or values by the quantizer called `name`."""
    return run.held(x, of(name, bits, seed)[held], held[0])


def error(x: Tensor, *how: object) -> float:
    return float((read(x, *how) - x).square().sum() / x.square().sum())


# ---- all of them


@pytest.mark.parametrize(("name", "held"), EVERY)
def test_less_is_lost_with_more_bits(name, held):
    x = draw(1, 2, 64, 16)
    errors = [error(x, name, held, bits) for bits in BITS]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.5 * errors[2] > 2 * errors[-1] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "held"), EVERY)
def test_shape_and_dtype_stay_the_input_too_and_again_is_the_same(name, held, dtype):
    x = draw(2, 3, 40, 16, dtype=dtype)
    before = x.clone()
    found = read(x, name, held, 4)
    assert found.shape == x.shape and found.dtype == dtype and torch.equal(x, before)
    assert torch.equal(found, read(x, name, held, 4)) and not torch.equal(found, x)
    exact = read(x.double(), name, held, 4)
    assert float((found.double() - exact).square().sum() / exact.square().sum()) < 0.03, "codes that flip"


@pytest.mark.parametrize(("name", "held"), EVERY)
def test_heads_and_batches_do_not_see_each_other(name, held):
    """A quantizer of its own for each, as strides of a transposed tensor have it too."""
    x = draw(2, 3, 40, 16)
    found, turned = read(x, name, held, 3), x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(read(turned, name, held, 3), found, rtol=1e-12, atol=1e-12)
    for batch in range(2):
        for head in range(3):
            alone = read(x[batch, head][None, None], name, held, 3)[0, 0]
            torch.testing.assert_close(found[batch, head], alone, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(EVERY), st.integers(2, 6), st.integers(0, 99), st.integers(-8, 8))
def test_what_is_scaled_is_read_scaled(which, bits, seed, power):
    """By powers of two, which move no rounding."""
    x, by = draw(1, 1, 40, 16, seed=seed), 2.0**power
    torch.testing.assert_close(read(by * x, *which, bits), by * read(x, *which, bits), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "held"), EVERY)
def test_zeros_stay_zeros_and_no_token_is_no_error(name, held):
    x = torch.zeros(1, 2, 40, 16)
    assert torch.equal(read(x, name, held, 2), x)
    for tokens in (0, 1, 7):
        assert read(draw(1, 2, tokens, 16), name, held, 2).shape == (1, 2, tokens, 16)


@pytest.mark.parametrize("name", CACHES)
def test_at_16_bits_nothing_is_rounded_and_a_recipe_is_the_one_without(name):
    x, cache = draw(1, 2, 40, 16), of(name, 16)
    assert all(run.held(x, cache[held], held[0]) is x for held in ("keys", "values"))
    assert cache["keys"].name == "none"
    assert Recipe(rotation=RH, window=8, **cache).canonical() == Recipe(rotation=RH, window=8).canonical()


def test_a_grid_for_each_token_is_what_it_was():
    x, spec = draw(1, 2, 40, 16), KV_CACHE.with_(bits=3)
    assert of(PER_TOKEN, 3) == {"keys": spec, "values": spec}
    assert all(torch.equal(run.held(x, spec, kind), fake_quantize(x, spec)) for kind in run.HELD)


def test_names_say_all_and_what_a_quantizer_does_not_hold_is_per_token():
    said = {name: [spec.name for spec in cache_of(name, 2, seed=5).values()] for name in CACHES}
    assert said == {
        "kivi": ["kivi2-g32-r128"] * 2,
        "qjl": ["qjl2-s5", "asym2-head"],
        "turboquant": ["turboquant2-s5"] * 2,
    }


# ---- KIVI


def kivi_of(group: list[float], bits: int) -> list[float]:
    """The paper's formula, number by number."""
    low, high = min(group), max(group)
    step = (high - low) / (2**bits - 1) or 1.0
    return [round((value - low) / step) * step + low for value in group]


@pytest.mark.parametrize("tokens", [24, 40, 43, 64])
@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_is_a_slow_loop_over_groups_and_float_at_the_end(tokens, bits):
    x = draw(2, 2, tokens, 16)
    keys, values = x.clone(), x.clone()
    full = (tokens - 16) // 8
    for batch, head in np.ndindex(2, 2):
        for channel, group in np.ndindex(16, full):
            place = (batch, head, slice(8 * group, 8 * group + 8), channel)
            keys[place] = torch.tensor(kivi_of(x[place].tolist(), bits), dtype=x.dtype)
        for token, group in np.ndindex(tokens - 16, 2):
            place = (batch, head, token, slice(8 * group, 8 * group + 8))
            values[place] = torch.tensor(kivi_of(x[place].tolist(), bits), dtype=x.dtype)
    torch.testing.assert_close(read(x, "kivi", "keys", bits), keys, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(read(x, "kivi", "values", bits), values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("held", ["keys", "values"])
def test_kivi_keeps_the_last_tokens_as_they_are_and_no_others(held):
    x = draw(1, 2, 64, 16)
    same = (read(x, "kivi", held, 2) == x).all(-1).all(1)[0]
    assert same[48:].all() and not same[:48].any()
    short = x[..., :23, :]  # 16 are float, and 7 keys fill no group
    assert torch.equal(read(short, "kivi", held, 2), short) == (held == "keys")


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["keys", "values"]), st.integers(0, 63), st.integers(0, 99))
def test_what_kivi_holds_of_a_token_hangs_on_no_later_group(held, at, seed):
    """Change one token: what is held of the tokens before its group, and of those after it, stays."""
    x, own = draw(1, 1, 64, 16, seed=seed), 8 if held == "keys" else 1
    other = x.clone()
    other[..., at, :] = 9 * draw(1, 1, 16, seed=seed + 1)
    same = (read(x, "kivi", held, 3) == read(other, "kivi", held, 3)).all(-1)[0, 0]
    changed = range(at // own * own, at // own * own + own) if at < 48 else [at]
    assert [n for n in range(64) if not same[n] and n not in changed] == [] and not same[at]


@pytest.mark.parametrize("held", ["keys", "values"])
def test_a_longer_window_leaves_what_kivi_has_rounded(held):
    x = draw(1, 1, 64, 16)
    shorter, longer = read(x[..., :40, :], "kivi", held, 2), read(x, "kivi", held, 2)
    assert torch.equal(shorter[..., :24, :], longer[..., :24, :])
    assert not torch.equal(shorter[..., 24:, :], longer[..., 24:40, :]), "float first, rounded later"


def test_an_outlier_channel_of_keys_and_its_offset_cost_kivi_nothing():
    """Its zero point is a float: a channel's constant passes; per token it takes the whole range."""
    x = draw(1, 2, 64, 16)
    there = x.clone()
    there[..., 3] += 64.0
    found, plain = read(there, "kivi", "keys", 4), read(x, "kivi", "keys", 4)
    torch.testing.assert_close(found[..., 3] - 64, plain[..., 3], rtol=0, atol=1e-12)
    assert torch.equal(found[..., 4:], plain[..., 4:])
    one = squared_error(there, KV_CACHE.with_(bits=4)).mean()
    assert (found - there).square().sum(-1).mean() < 0.01 * one
    values = read(there, "kivi", "values", 4)
    assert (values - there).square().sum(-1).mean() > 0.1 * one, "values are by token"


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["keys", "values"]), st.integers(2, 8), st.integers(0, 99))
def test_kivi_is_off_by_half_a_step_at_most_and_keeps_the_ends(held, bits, seed):
    x = draw(1, 1, 48, 16, seed=seed)
    found = read(x, "kivi", held, bits)[..., :32, :]
    if held == "keys":
        groups, read_as = (each.reshape(4, 8, 16) for each in (x[0, 0, :32], found[0, 0]))
        along = 1
    else:
        groups, read_as = (each.reshape(32, 2, 8) for each in (x[0, 0, :32], found[0, 0]))
        along = 2
    step = (groups.amax(along, keepdim=True) - groups.amin(along, keepdim=True)) / (2**bits - 1)
    assert ((groups - read_as).abs() <= step / 2 * (1 + 1e-9)).all()
    torch.testing.assert_close(read_as.amin(along), groups.amin(along), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(read_as.amax(along), groups.amax(along), rtol=1e-12, atol=1e-12)


# ---- QJL


def test_the_score_of_what_qjl_holds_is_its_estimator():
    q, k = draw(5, 16), draw(1, 1, 7, 16, seed=1)
    S = qjl.sketch(3 * 16, 16, 4)
    found = q @ read(k, "qjl", "keys", 3, seed=4)[0, 0].T
    for i, j in np.ndindex(5, 7):
        key = k[0, 0, j]
        signs = [math.copysign(1, float(row @ key)) for row in S]
        inner = sum(float(row @ q[i]) * sign for row, sign in zip(S, signs, strict=True))
        assert float(found[i, j]) == pytest.approx(
            math.sqrt(math.pi / 2) / 48 * float(key.norm()) * inner, rel=1e-12
        )


def test_qjl_is_unbiased_over_its_projections_and_as_far_off_as_said():
    """Mean over 400 seeds within 4 standard errors in every number; E |k^ - k|^2 within 2%."""
    k, d, bits, seeds = 3 * draw(1, 1, 5, 16), 16, 2, 400
    found = torch.stack([read(k, "qjl", "keys", bits, seed) for seed in range(seeds)])
    error_of_mean = found.std(0) / math.sqrt(seeds)
    assert ((found.mean(0) - k).abs() < 4 * error_of_mean).all()
    assert (error_of_mean < 0.1 * k.norm(dim=-1, keepdim=True)).all()
    squares = (found - k).square().sum(-1).mean(0) / k.square().sum(-1)
    expected = (math.pi * d / 2 - 1) / (bits * d)
    assert float(squares.mean()) == pytest.approx(expected, rel=0.02)


def test_qjl_holds_a_key_s_norm_and_directions_alone():
    """Opposite keys are read as opposite; of one direction they are read as one, by their norms."""
    k = draw(1, 1, 6, 16)
    found = read(k, "qjl", "keys", 2)
    torch.testing.assert_close(read(-k, "qjl", "keys", 2), -found, rtol=1e-12, atol=0)
    unit = k / k.norm(dim=-1, keepdim=True)
    own = read(unit, "qjl", "keys", 2) * k.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(own, found, rtol=1e-12, atol=0)


def test_a_sketch_has_a_row_a_bit_and_a_seed():
    assert qjl.sketch(48, 16, 0).shape == (48, 16)
    assert not torch.equal(qjl.sketch(48, 16, 0), qjl.sketch(48, 16, 1))
    assert float(qjl.sketch(4000, 16, 0).var()) == pytest.approx(1, abs=0.02)
    x = draw(1, 1, 4, 16)
    assert not torch.equal(read(x, "qjl", "keys", 2, 0), read(x, "qjl", "keys", 2, 1))


# ---- TurboQuant


def density(t: float, d: int) -> float:
    """Of one coordinate of a uniformly random unit vector of d (TurboQuant, Lemma 1)."""
    front = math.exp(special.gammaln(d / 2) - special.gammaln((d - 1) / 2)) / math.sqrt(math.pi)
    return front * (1 - t * t) ** ((d - 3) / 2)


def test_the_distortion_is_the_published_one():
    """Of 1 to 4 bits, to the places that Theorem 1 prints; and within its bound and Theorem 3's."""
    for d in (64, 128, 1536):
        found = [turboquant.distortion(turboquant.codebook(d, bits), d) for bits in (1, 2, 3, 4)]
        for bits, value in enumerate(found, 1):
            assert 4**-bits < value < math.sqrt(3) * math.pi / 2 * 4**-bits
    for value, published, places in zip(found, (0.36, 0.117, 0.03, 0.009), (2, 3, 2, 3), strict=True):
        assert math.floor(10**places * value) == round(10**places * published)


def test_in_many_dimensions_it_is_max_s_table_for_a_gaussian():
    """J. Max, Quantizing for minimum distortion (1960), Table I: N = 2, 4, 8, 16."""
    d = 1 << 16
    books = [turboquant.codebook(d, bits) for bits in (1, 2, 3, 4)]
    found = [turboquant.distortion(book, d) for book in books]
    assert found == pytest.approx([0.3634, 0.1175, 0.03454, 0.009497], rel=1e-3)
    assert books[1] * math.sqrt(d) == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], rel=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_of_3_dimensions_a_coordinate_is_uniform_and_the_codebook_even(bits):
    """Archimedes; the error of an even grid of step 2 / 2^b is step^2 / 12 a coordinate."""
    book = turboquant.codebook(3, bits)
    even = (2 * np.arange(2**bits) + 1) / 2**bits - 1
    assert book == pytest.approx(even, abs=1e-4)
    assert turboquant.distortion(book, 3) == pytest.approx(4.0**-bits, rel=1e-5)


@pytest.mark.parametrize("d", [2, 5, 16, 64])
def test_two_centroids_are_the_mean_absolute_coordinate(d):
    mean = math.exp(special.gammaln(d / 2) - special.gammaln((d + 1) / 2)) / math.sqrt(math.pi)
    book = turboquant.codebook(d, 1)
    assert book == pytest.approx([-mean, mean], rel=1e-9)
    assert turboquant.distortion(book, d) == pytest.approx(1 - d * mean**2, rel=1e-9)


@pytest.mark.parametrize(("d", "bits"), [(4, 3), (16, 2), (64, 4)])
def test_each_centroid_is_the_mean_of_what_is_nearest_to_it(d, bits):
    """By numerical integration of the density, the distortion too."""
    book = turboquant.codebook(d, bits)
    edges = [-1.0, *((book[1:] + book[:-1]) / 2), 1.0]
    total = 0.0
    for centroid, low, high in zip(book, edges[:-1], edges[1:], strict=True):
        mass = integrate.quad(lambda t: density(t, d), low, high)[0]
        mean = integrate.quad(lambda t: t * density(t, d), low, high)[0] / mass
        assert centroid == pytest.approx(mean, abs=1e-5)
        total += integrate.quad(lambda t, c=centroid: (t - c) ** 2 * density(t, d), low, high)[0]
    assert turboquant.distortion(book, d) == pytest.approx(d * total, rel=1e-6)
    assert book == pytest.approx(-book[::-1], abs=1e-6) and (np.diff(book) > 0).all()


@pytest.mark.parametrize("held", ["keys", "values"])
def test_turboquant_is_a_slow_loop_of_turn_round_turn_back(held):
    x, R, book = draw(1, 2, 5, 16), turboquant.rotation(16, 3), turboquant.codebook(16, 3)
    expected = torch.zeros_like(x)
    for batch, head, token in np.ndindex(1, 2, 5):
        row = x[batch, head, token]
        turned = [float(row @ R[:, j] / row.norm()) for j in range(16)]
        nearest = [min(book, key=lambda c, t=t: abs(c - t)) for t in turned]
        expected[batch, head, token] = row.norm() * (R @ torch.tensor(nearest, dtype=torch.float64))
    torch.testing.assert_close(read(x, "turboquant", held, 3, seed=3), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(expected, read(x, "turboquant", held, 3, seed=4))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["spike", "constant", "gaussian"])
def test_whatever_the_vector_turboquant_loses_its_distortion(kind, bits):
    """Over 200 rotations, within 3%: a spike, on which a grid for each token is exact, as well as any."""
    d = 64
    x = {"spike": torch.eye(d)[0], "constant": torch.ones(d), "gaussian": draw(d)}[kind].double()
    found = [error(x[None, None, None], "turboquant", "keys", bits, seed) for seed in range(200)]
    expected = turboquant.distortion(turboquant.codebook(d, bits), d)
    assert float(np.mean(found)) == pytest.approx(expected, rel=0.03)


# ---- in a model


@pytest.fixture
def base(tmp_path, text_file) -> Recipe:
    return spec_for(save_lively(tmp_path / "lively"), text_file, "16-16-3", rotation=RH)


@pytest.mark.parametrize("online", [None, "R4"])
@pytest.mark.parametrize("name", [PER_TOKEN, *CACHES])
def test_attention_gets_what_is_held_of_turned_keys_and_of_values(name, online, base, store):
    """Against q, k, v seen without rounding: the first layer's, which nothing rounded comes before."""
    recipe = resolved(base.with_(**of(name, 3), online=online))
    built, ids = build.build(recipe, store), torch.arange(64)[None] * 7 % 250
    seen: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}

    def see(site: str, x: Tensor) -> None:
        if site.startswith("layers.0."):
            seen[site[-1]].append(x.clone())

    sites = hooks.sites_of(built.loaded, "q", "k", "v")
    with torch.inference_mode():
        with build.quantized(built, recipe), hooks.at_sites(built.loaded, see, sites):
            built.loaded.model(ids)
        exact = recipe.with_(keys=KV_CACHE.with_(bits=15), values=KV_CACHE.with_(bits=15))
        with build.quantized(built, exact), hooks.at_sites(built.loaded, see, sites):
            built.loaded.model(ids)
    for held in ("keys", "values"):
        rounded, plain = seen[held[0]]
        assert apart(rounded, plain) > 0.01
        assert error_of(rounded, read(plain, name, held, 3)) < 0.01 * error_of(rounded, plain)
    assert apart(*seen["q"]) < 1e-5


def error_of(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum())


@pytest.mark.parametrize("name", CACHES)
def test_an_evaluation_goes_through_them_streamed_or_not_and_r3_matters(
    name, base, store, tmp_path, monkeypatch
):
    recipe = base.with_(**of(name, 2))
    found = evaluate(recipe, store).losses
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    assert apart(evaluate(recipe, Store(tmp_path / "streamed")).losses, found) < FLIPPED
    others = [base.with_(keys=KV_CACHE, values=KV_CACHE), base.with_(**of(PER_TOKEN, 2))]
    others += [recipe.with_(online="R4"), recipe.with_(keys=KV_CACHE.with_(bits=2))]
    for other in others:
        assert apart(evaluate(other, store).losses, found) > NOTICED


def test_a_row_says_how_keys_and_values_are_held(base, store):
    [row, *_] = rows.rows([evaluate(base.with_(**of("qjl", 3, seed=2)), store)])
    assert (row["keys"], row["values"]) == ("qjl3-s2", "asym3-head")
    assert (row["bits"], row["kv_bits"]) == ("16-16-3", 3)


def test_a_recipe_comes_back_from_yaml_and_is_keyed_by_the_code_while_it_has_no_version(monkeypatch):
    recipe = Recipe(rotation=RH, **cache_of("kivi", 3))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()).key == recipe.key

    def key() -> object:
        return content_keys.identity(recipe.keys, lambda _: "digest")

    before = key()
    assert "code" not in before
    monkeypatch.setattr(kivi, "VERSION", 2)
    assert key() != before and key()["code"] == 2
    monkeypatch.delattr(kivi, "VERSION")
    assert len(key()["code"]) == 64


def test_recipes_kept_before_there_were_caches_have_the_keys_they_had():
    """Beside committed tables: hashed when the specs knew none of these fields."""
    count = 0
    for path in (ROOT / "data" / "results").glob("*.recipes.yaml"):
        for key, said in yaml.safe_load(path.read_text()).items():
            assert Recipe.of(said).key == key
            count += "method" not in said["keys"]
    assert count > 20


# ---- an experiment, a command, a toy


def test_the_experiment_asks_for_each_cache_at_each_bits_with_r3_and_without(tmp_path, text_file):
    setting = Setting(corpus=str(text_file), window=256, builds=2, seed=3)
    own = setting.with_(build=1)
    asked = list(beyond.kv_caches(own, None))
    assert asked[0].spec.bits == "16-16-16"
    found = {(row.labels["cache"], row.spec.bits, row.spec.online): row for row in asked[1:]}
    assert len(asked) == 1 + len(found) == 1 + 4 * 3 * 2
    assert {name for name, *_ in found} == {PER_TOKEN, *CACHES}
    for (name, bits, online), row in found.items():
        assert (row.labels["option"] == "R3") == (online is None) == row.spec.canonical().acts("R3")
        assert row.spec.keys == cache_of(name, int(bits[-1]), seed=4)["keys"]
        assert set(row.against) == {
            "full precision", *(["per token"] if name != PER_TOKEN else []),
            *(["without R3"] if online is None else []),
        }  # fmt: skip
        if name != PER_TOKEN:
            assert row.against["per token"] == found[PER_TOKEN, bits, online].spec
        if online is None:
            assert row.against["without R3"] == found[name, bits, "R4"].spec
    quick = {row.spec.bits for row in beyond.kv_caches(own.with_(quick=True), None)}
    assert quick == {"16-16-16", "16-16-4", "16-16-2"}


def invoked(*command: str) -> str:
    return CliRunner().invoke(app, [*command]).output


def test_the_command_line_takes_a_cache_with_its_bits_and_seed():
    said = Recipe.from_yaml(invoked("recipe", "RH", "16-16-2", "--kv", "turboquant", "--seed", "7"))
    assert (said.keys, said.values) == tuple(cache_of("turboquant", 2, seed=7).values())
    assert Recipe.from_yaml(invoked("recipe", "RH", "16-16-2")).keys == KV_CACHE.with_(bits=2)
    for command in ("evaluate", "recipe"):
        assert "--kv" in invoked(command, "--help")
    assert "per-token, kivi, qjl, turboquant" in " ".join(invoked("--help").split())


@pytest.fixture
def toy(monkeypatch):
    """One line."""
    monkeypatch.setitem(registry.CACHES, "signs", Choice("toys.cache", holds=("keys",)))


def test_a_toy_is_offered_evaluated_and_shown(toy, base, store):
    assert "turboquant, signs" in " ".join(invoked("--help").split())
    recipe = base.with_(**cache_of("signs", 3))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    found = evaluate(recipe, store)
    assert [rows.rows([found])[0][name] for name in ("keys", "values")] == ["signs3", "asym3-head"]
    assert apart(found.losses, evaluate(base, store).losses) > NOTICED
    with pytest.raises(ValueError, match=r"Recipe\.values must be of method None, kivi, turboquant; got"):
        base.with_(values=recipe.keys)


# ---- what is refused


QJL, KIVI, TURBO = (cache_of(name, 2)["keys"] for name in ("qjl", "kivi", "turboquant"))


@pytest.mark.parametrize(("made", "said"), [
    (lambda: Recipe(values=QJL), r"Recipe\.values must be of method None, kivi, turboquant; got QuantSpec\(.*"),
    (lambda: Recipe(keys=KIVI, window=159),
     r"Recipe\.window must be >= residual \+ group_size = 160, or no token of keys is rounded; got 159"),
    (lambda: Recipe(values=KIVI, window=159), r"Recipe\.window must be >= .*no token of values is rounded"),
    (lambda: Recipe(keys=QuantSpec(bits=2)), r"Recipe\.keys must be per_group"),
    (lambda: Recipe(activations=QJL), r"Recipe\.activations must be per_token"),
    (lambda: TaskSpec(cache=QJL), r"TaskSpec\.cache must be a grid, of method None; got"),
    (lambda: fake_quantize(torch.ones(2, 4), QJL), r"QuantSpec\.method must be None where tensors .*; got 'qjl'"),
    (lambda: cache_of("kvquant", 2), "a KV quantizer must be one of per-token, kivi, qjl, turboquant; got 'kvq"),
    (lambda: run.held(torch.ones(1, 1, 200, 48), cache_of("kivi", 2)["values"], "v"),
     r"QuantSpec\.group_size must be a divisor of the head size 48, with kivi; got 32"),
    (lambda: run.held(torch.ones(1, 1, 4, 16), TURBO.with_(bits=9), "k"),
     r"QuantSpec\.bits must be <= 8 with method turboquant; got 9"),
    (lambda: run.held(torch.ones(1, 1, 4, 1), TURBO, "k"), r"turboquant\.channels must be a head size >= 2"),
])  # fmt: skip
def test_errors_name_the_field_the_rule_and_the_value(made, said):
    with pytest.raises(ValueError, match=said):
        made()


def test_a_window_that_just_suffices_is_taken():
    assert Recipe(keys=KIVI, values=KIVI, window=160).window == 160


@pytest.mark.parametrize(("name", "said"), [
    ("kivi", r"QuantSpec\.group_size must be a divisor of the head size 16, with kivi; got 32"),
    ("turboquant", r"QuantSpec\.bits must be <= 8 with method turboquant; got 12"),
])  # fmt: skip
def test_what_a_head_cannot_be_held_in_is_refused_before_its_weights(name, said, base, store, monkeypatch):
    monkeypatch.setattr(
        weighing, "quantize_weights", lambda *_, **__: pytest.fail("weights before the cache")
    )
    fields = {"kivi": {"residual": 0}}.get(name, {})
    cache = cache_of(name, 12 if name == "turboquant" else 3, **fields)
    with pytest.raises(ValueError, match=said):
        evaluate(base.with_(**cache), store)


@pytest.mark.parametrize(("options", "said"), [
    (["--kv", "kvquant", "--bits", "16-16-2"],
     "--kv must be one of per-token, kivi, qjl, turboquant; got kvquant"),
    (["--kv", "kivi"], "--kv must be per-token with a KV cache of 16 bits, which nothing rounds; got kivi"),
    (["--kv", "kivi", "--bits", "16-16-2", "--window", "64"], "Recipe.window must be >= residual + group_size"),
])  # fmt: skip
def test_the_command_line_says_what_is_wrong(options, said):
    done = CliRunner().invoke(app, ["evaluate", *options])
    assert done.exit_code == 1 and said in done.output, done.output
