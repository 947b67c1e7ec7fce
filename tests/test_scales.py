"""Channel scales: those of least error, folded on both sides, so that the function stays and what is rounded is x s."""

from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch
from conftest import CHANNELS, HEAD_SIZE, INNER, KV_HEADS, tiny_model
from hypothesis import given, settings, strategies as st
from test_families import folder_of as family_folder, load
from test_stream import folder_of, looking, recipe
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.export import hf
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import checkpoint, hooks, scales, surgery
from dfrot_lab.model.hooks import LINEAR_INPUTS
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.parts import feeds
from dfrot_lab.recipe.grids import ACTIVATIONS, QuantSpec
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, Recipe, RotationSpec
from dfrot_lab.score import build, perplexity, rows

IDS = torch.arange(2 * 48).reshape(2, 48) * 7 % 90 + 32
SYM = QuantSpec(bits=4)


@pytest.fixture
def scaled(tmp_path, text_file) -> Recipe:
    return with_scales(recipe(folder_of(tmp_path / "m"), text_file, "4-4-4", weights="rtn"))


with_scales = partial(looking, field="scales")


def turned(family: str = "llama") -> LoadedModel:
    """With R1 alone, and channels that are far from alike."""
    loaded = tiny_model(family)
    generator = torch.Generator().manual_seed(3)
    for layer in loaded.layers:
        for name in loaded.roles.linears(layer):
            weight = layer.get_submodule(name).weight
            weight.mul_(torch.rand(weight.shape[1], generator=generator) * 4 + 0.1)
    surgery.prepare(loaded)
    surgery.rotate_residual(loaded, rotations.make(RotationSpec(kind="RH"), loaded.channels))
    return loaded


def inputs(loaded: LoadedModel) -> dict[str, Tensor]:
    """What every linear reads (tokens, channels), by site, and the logits."""
    found: dict[str, Tensor] = {}
    with hooks.at_sites(
        loaded,
        lambda site, x: found.update({site: x.flatten(0, -2).clone()}),
        hooks.sites_of(loaded, *LINEAR_INPUTS),
    ):
        found["logits"] = loaded.model(IDS).logits
    return found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@given(seed=st.integers(0, 1000), channels=st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_no_scales_lose_less_than_the_balanced_ones(seed, channels):
    """By a minimiser of scipy that knows nothing of the formula."""
    drawn = np.random.default_rng(seed).uniform(0.1, 3, (2, channels))
    e2, w2 = drawn

    def lost(logs: np.ndarray) -> float:
        s2 = np.exp(2 * logs)
        return float(np.log((e2 * s2).sum() * (w2 / s2).sum()))

    s = scales.balanced(torch.from_numpy(e2), torch.from_numpy(w2)).numpy()
    best = scipy.optimize.minimize(lost, np.zeros(channels), tol=1e-12).fun
    assert lost(np.log(s)) == pytest.approx(best, abs=1e-8)
    assert best == pytest.approx(2 * np.log(np.sqrt(e2 * w2).sum()), abs=1e-8)
    assert np.log(s).mean() == pytest.approx(0, abs=1e-12)


def test_channels_without_energy_get_no_wild_scale():
    s = scales.balanced(torch.tensor([0.0, 1, 1, 1]), torch.tensor([1.0, 0, 1, 1]))
    assert s.isfinite().all() and s.max() / s.min() < 2 * scales.LEAST**-0.5


@torch.no_grad()
def test_a_site_gets_the_power_of_least_error():
    """A planted site whose rows share an offset: the full scale would spread it, and a part of it is best."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, CHANNELS, generator=generator) * torch.linspace(0.5, 2, CHANNELS)
    w2, of = torch.linspace(2, 0.3, CHANNELS).double() ** 2, torch.arange(CHANNELS)
    chosen = set()
    for offset, grid in ((0.0, SYM), (2.0, ACTIVATIONS), (4.0, ACTIVATIONS), (60.0, ACTIVATIONS)):
        x = rows + offset
        centred = x if grid.symmetric else x - x.mean(1, keepdim=True)
        energy = x.double().square().sum(1)
        full = scales.balanced((centred.double().square() / energy[:, None]).mean(0), w2)
        lost = {}
        for power in scales.POWERS:
            s = full**power
            error = (fake_quantize(x * s.float(), grid) - x * s.float()).double().square().sum(1)
            lost[power] = float((error / energy).mean() * (w2 / s**2).mean())
        least = min(lost, key=lost.__getitem__)
        found = scales.best(x, w2, of, grid)
        chosen.add(least)
        expected = torch.ones(CHANNELS).double() if found is None else found
        torch.testing.assert_close(expected, full**least, rtol=1e-6, atol=0)
    assert 1 in chosen and 0 in chosen and len(chosen) > 2


def test_alike_channels_get_none():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 16, generator=generator).sign()  # every channel of the same energy
    assert scales.best(rows, torch.ones(16).double(), torch.arange(16), SYM) is None


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_what_is_read_is_x_s_and_the_logits_stay(family):
    loaded = turned(family)
    before = inputs(loaded)
    found = scales.find(loaded, IDS, SYM)
    assert set(found) <= set(before) and len({site.rpartition(".")[2] for site in found}) == 4
    scales.fold(loaded, found)
    after = inputs(loaded)
    assert apart(after["logits"], before["logits"]) < 1e-6
    shared = scales.pairs(loaded, 0)["layers.0.o_proj_in"].of
    for site, x in before.items():
        if site != "logits":
            s = found.get(site, torch.ones(1, dtype=torch.float64))
            own = s[shared] if site.endswith("o_proj_in") and len(s) > 1 else s
            assert apart(after[site], x * own.to(x)) < 1e-5, site
    assert len(found["layers.0.o_proj_in"]) == KV_HEADS * HEAD_SIZE < len(shared)
    assert len(found["layers.0.down_proj_in"]) == INNER


@torch.no_grad()
def test_a_second_look_finds_nothing_to_scale_before_r4():
    """Scales are a fixed point: what is balanced stays."""
    loaded = turned()
    scales.fold(loaded, scales.find(loaded, IDS, SYM))
    again = {site: s for site, s in scales.find(loaded, IDS, SYM).items() if site.endswith("down_proj_in")}
    assert all(float(s.max() / s.min()) < 1.3 for s in again.values())


@torch.no_grad()
def test_without_r4_nothing_is_scaled_before_it():
    assert not [site for site in scales.find(turned(), IDS, SYM, r4=False) if site.endswith("down_proj_in")]


@pytest.mark.parametrize(("case", "kinds"), [
    ("opt", {"input_norm", "post_attention_norm", "o_proj_in"}),
    ("gemma2", {"o_proj_in", "down_proj_in"}),
    ("olmo", {"o_proj_in", "down_proj_in"}),
    ("phi3", set(LINEAR_INPUTS)),
])  # fmt: skip
@torch.no_grad()
def test_a_family_has_scales_where_something_can_hold_them(case, kinds, tmp_path):
    """No gate: nothing before down is linear. R1 online or a norm without gain: nothing holds a norm's."""
    loaded = load(family_folder(case, tmp_path / "m"))
    surgery.prepare(loaded)
    found = {site for number in range(len(loaded.layers)) for site in scales._readers(loaded, number)}
    assert {site.rpartition(".")[2] for site in found} == kinds


def test_the_built_model_has_them_and_they_are_kept(scaled, store):
    built = build.build(scaled, store)
    assert built.transforms.scales
    [kept] = [artefact for artefact in store.list() if artefact.kind == scales.KIND]
    again = build.build(scaled, store).transforms.scales
    assert set(kept.tensors("scales")) == set(again)
    assert all(torch.equal(s, again[site]) for site, s in built.transforms.scales.items())


def test_a_model_read_layer_by_layer_has_the_same_losses(scaled, tmp_path, monkeypatch):
    expected = perplexity.evaluate(scaled, Store(tmp_path / "kept"))
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    found = perplexity.evaluate(scaled, Store(tmp_path / "streamed"))
    assert found.losses.tolist() == pytest.approx(expected.losses.tolist(), rel=1e-6)


def test_rows_with_and_without_are_not_built_nor_kept_as_one(scaled, store):
    plain = scaled.with_(scales=None)
    found = perplexity.evaluate_all([plain, scaled, plain], store)
    assert found[0].losses.tolist() == found[2].losses.tolist() != found[1].losses.tolist()
    assert "scales=(" in rows.rows([found[1]])[0]["parameters"]
    assert Recipe.from_yaml(scaled.to_yaml()).key == scaled.key != plain.key


def test_clips_are_found_on_the_scaled_model(scaled, store):
    both = scaled.with_(clips=scaled.scales)
    assert build.build_key(both) not in (build.build_key(scaled), build.build_key(both.with_(scales=None)))
    found, without = (build.build(spec, store).transforms.clips for spec in (both, both.with_(scales=None)))
    assert found != without


def test_where_nothing_is_rounded_there_are_none(scaled):
    unrounded = scaled.with_(activations=ACTIVATIONS.with_(bits=16))
    assert unrounded.canonical() == unrounded.with_(scales=None).canonical()


def test_an_export_before_or_after_changes_no_row(scaled, tmp_path):
    """It has no R4, and still the scales that the recipe's own R4 asks for."""
    plain, exported = Store(tmp_path / "a"), Store(tmp_path / "b")
    hf.export(scaled, tmp_path / "folder", exported)
    expected = perplexity.evaluate(scaled, plain)
    assert perplexity.evaluate(scaled, exported).losses.tolist() == expected.losses.tolist()
    assert "channels got scales" in (tmp_path / "folder" / "README.md").read_text()
    again = scaled.with_(model=ModelSpec(source=str(tmp_path / "folder")))
    whole = [
        spec.with_(
            rotation=RotationSpec(kind="NR"),
            scales=None,
            activations=spec.activations.with_(bits=16),
            keys=spec.keys.with_(bits=16),
            values=spec.values.with_(bits=16),
            weights=spec.weights.with_(quantizer=spec.weights.quantizer.with_(bits=16)),
        )
        for spec in (scaled, again)
    ]
    found = [perplexity.evaluate(spec, plain).losses for spec in whole]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_router_does_not_weigh_for_it_sees_no_rounding(tmp_path):
    loaded = load(family_folder("mixtral", tmp_path / "m"))
    surgery.prepare(loaded)
    reads, _ = scales._readers(loaded, 0)["layers.0.post_attention_norm"]
    every = feeds(loaded, 0)["layers.0.post_attention_norm"][1]
    assert len(reads) == len(every) - 1 and all(one is not every[0] for one in reads)


def test_no_rows_kept_out_by_rules_that_scaled_rows_would_mislead(scaled):
    with pytest.raises(ValueError, match=r"Recipe\.scales must be None with keep_out"):
        scaled.with_(keep_out="ro_vs_nr")


def test_no_rotation_no_scales(scaled):
    with pytest.raises(ValueError, match=r"Recipe\.scales must be None without a rotation"):
        scaled.with_(rotation=RotationSpec(kind="NR"))


def test_a_text_too_short_is_refused_before_any_work(scaled, store):
    long = scaled.scales.with_(corpus=CorpusSpec(name=scaled.corpus.name), tokens=100_000_000)
    with pytest.raises(ValueError, match=r"(window|windows|tokens) must be at most"):
        build.require_texts(scaled.with_(scales=long), store)
    assert not [artefact for artefact in store.list() if artefact.kind == scales.KIND]
