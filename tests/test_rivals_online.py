"""Rivals that act while the model runs, before every linear: the seam (`model.turns`), DuQuant, FlatQuant. A turn against
the dense matrix, each formula against a slow loop, logits that stay, weights and roundings that see what was turned.
"""

import numpy as np
import pytest
import torch
from conftest import CHANNELS, INNER, LAYERS, tiny_model
from test_evaluate import save_lively, spec_for
from test_families import apart, folder_of, load, logits_of
from test_rivals_closed import IDS, built_each_way, draw, rotated_by
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.model import checkpoint, hooks, loading, stream, surgery, turns
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.grids import ACTIVATIONS, SYM4, QuantSpec
from dfrot_lab.recipe.specs import CaptureSpec, ModelSpec, Recipe, RotationSpec
from dfrot_lab.rotate import duquant_blocks, flatquant, inputs, transforms
from dfrot_lab.rotate.duquant_blocks import DuQuantBlocksSpec
from dfrot_lab.rotate.flatquant import FlatQuantSpec
from dfrot_lab.rotate.transforms import Context
from dfrot_lab.score import build
from dfrot_lab.study import leaderboard
from dfrot_lab.weights import calibrate

ROWS = leaderboard.ONLINE
CALM = torch.linspace(0.5, 2, 24).double()


def some_turn(channels: int = 24, seed: int = 0) -> list[Tensor]:
    """A step of each kind, none of them orthogonal but the order."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
    scale = torch.linspace(0.5, 2, channels).double()
    return [scale, 3 * torch.eye(8).double() + draw(8, 8, seed=seed), order, draw(4, 4, seed=seed + 1)]


@pytest.fixture
def lively(tmp_path) -> ModelSpec:
    return save_lively(tmp_path / "lively")


# ---- the seam


def test_a_turn_is_the_product_of_its_steps():
    turn = some_turn()
    scale, first, order, second = turn
    P = torch.zeros(24, 24).double()
    P[order, torch.arange(24)] = 1
    A = scale.diag() @ torch.block_diag(first, first, first) @ P @ torch.block_diag(*[second] * 6)
    x = draw(3, 5, 24, seed=4)
    torch.testing.assert_close(turns.apply(turn, x), x @ A)
    torch.testing.assert_close(turns.dense(turn, 24), A)
    assert turns.apply(turn, x.float()).dtype == torch.float32
    assert turns.apply(turn, x[:0]).shape == (0, 5, 24)


def test_what_is_taken_back_is_the_inverse_transposed():
    turn = some_turn()
    A, back = turns.dense(turn, 24), turns.dense(turns.taken_back(turn), 24)
    torch.testing.assert_close(back, torch.linalg.inv(A).T)
    x, weight = draw(7, 24, seed=2), draw(5, 24, seed=3)
    turned = turns.apply(turn, x) @ turns.apply(turns.taken_back(turn), weight).T
    torch.testing.assert_close(turned, x @ weight.T)


@pytest.mark.parametrize(("p", "q"), [(3, 4), (4, 3), (1, 5), (6, 1)])
def test_a_kronecker_product_is_numpy_s(p, q):
    A, B = draw(p, p), draw(q, q, seed=1)
    turn = turns.kronecker(A, B)
    np.testing.assert_allclose(turns.dense(turn, p * q).numpy(), np.kron(A.numpy(), B.numpy()), atol=1e-12)


CASES = ("llama with biases", "qwen2_moe", "phi3", "opt", "gemma2", "gpt_neox, no biases in attention")


@pytest.mark.parametrize("case", CASES)
def test_turns_at_every_site_leave_the_logits_in_float64(case, tmp_path, monkeypatch):
    """Experts at one site, their router untouched; kept or read layer by layer; not orthogonal."""
    folder = folder_of(case, tmp_path / "m")
    expected = logits_of(load(folder), IDS)
    for memory in ("", "0"):
        monkeypatch.setenv(checkpoint.MEMORY, memory)
        loaded = load(folder)
        surgery.prepare(loaded)
        sites = hooks.sites_of(loaded, *hooks.LINEAR_INPUTS)
        widths = {
            site: own[0].weight.shape[1] for n in range(3) for site, own in turns.readers(loaded, n).items()
        }
        assert set(widths) == set(sites)
        turns.act(loaded, {site: some_turn(width, seed=n) for n, (site, width) in enumerate(widths.items())})
        seen: dict[str, Tensor] = {}
        with hooks.at_sites(loaded, lambda site, x, seen=seen: seen.update({site: x}), sites):
            assert apart(logits_of(loaded, IDS), expected) < 1e-5  # most norms work in float32
        assert set(seen) >= {site for site in sites if "experts" not in site}


def test_other_functions_see_what_was_turned():
    loaded, ids, found = tiny_model(dtype=torch.float64), IDS, []
    surgery.prepare(loaded)
    sites = [f"layers.1.{kind}" for kind in hooks.LINEAR_INPUTS]
    turn = {site: some_turn(INNER if "down" in site else CHANNELS) for site in sites}
    for own in ({}, turn):
        seen: dict[str, Tensor] = {}
        turns.act(loaded, own)
        with surgery.online(loaded, function=lambda site, x, seen=seen: seen.update({site: x}), sites=sites):
            stream.through(loaded, [ids])
        found.append(seen)
    for site in sites:
        torch.testing.assert_close(
            found[1][site], turns.apply(turn[site], found[0][site]), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(("step", "said"), [
    (torch.eye(5), r"a step of the turn of layers\.0\.input_norm must be \(n,\), or \(b, b\) with b a divisor"),
    (torch.ones(5), r"with b a divisor of n; got \(5,\), torch.float32, for 64 channels"),
    (torch.full((64,), torch.nan), r"a turn of layers\.0\.input_norm must be finite"),
    (torch.zeros(64, dtype=torch.int64), r"an order of layers\.0\.input_norm must be each channel once"),
])  # fmt: skip
def test_a_turn_that_does_not_fit_is_refused(step, said):
    with pytest.raises(ValueError, match=said):
        turns.act(tiny_model(), {"layers.0.input_norm": [step]})


def test_a_site_that_is_not_there_is_refused():
    with pytest.raises(KeyError, match=r"no site 'layers\.9\.q' to turn"):
        turns.act(tiny_model(), {"layers.9.q": []})


@pytest.mark.parametrize("row", ROWS)
def test_a_method_says_what_its_turns_multiply_and_the_leaderboard_what_part_that_is(
    row, lively, text_file, store
):
    """The tiny model has q 64, k and v 32, o 64 rows of 64; gate and up 96 of 64, down 64 of 96."""
    recipe = rotated_by(row, lively, text_file)
    module, taken = registry.load(registry.METHODS, recipe.rotation.method), 0
    for site, turn in module.fit(recipe, Context(recipe, store)).turns.items():
        width = INNER if "down" in site else CHANNELS
        steps = [width * (1 if step.ndim == 1 else len(step)) for step in turn if step.is_floating_point()]
        assert sum(steps) == module.products(recipe.rotation, width)
        taken += sum(steps)
    linears = LAYERS * ((64 + 32 + 32 + 64 + 2 * INNER) * CHANNELS + CHANNELS * INNER)
    assert leaderboard.online_share(recipe) == pytest.approx(100 * taken / linears)
    assert leaderboard.online_share(recipe.with_(rotation=RotationSpec())) == 0


# ---- all of them


@pytest.mark.parametrize("case", ["mixtral", "starcoder2"])
@pytest.mark.parametrize("row", ROWS)
def test_the_logits_stay_and_a_streamed_model_gets_the_same(row, case, tmp_path, text_file, monkeypatch):
    made = []
    for built, expected in built_each_way(row, case, tmp_path, text_file, monkeypatch):
        made.append(own := built.transforms)
        assert own.R1 is None and own.R2 is None and not own.r4 and own.turns
        assert apart(logits_of(built.loaded, IDS), expected) < 1e-5
    missed = set(hooks.sites_of(built.loaded, *hooks.LINEAR_INPUTS)) ^ set(made[0].turns)
    assert set(made[0].turns) == set(made[1].turns) and all("experts" in site for site in missed)
    for site, turn in made[0].turns.items():
        for ours, theirs in zip(turn, made[1].turns[site], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", ROWS)
def test_again_nothing_is_found_anew_and_a_killed_run_goes_on(row, lively, text_file, store, monkeypatch):
    recipe = rotated_by(row, lively, text_file)
    module, calls = registry.load(registry.METHODS, recipe.rotation.method), []
    of_layer = inputs._of_layer

    def counted(*of):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return of_layer(*of)

    monkeypatch.setattr(inputs, "_of_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        module.fit(recipe, Context(recipe, store))
    found = module.fit(recipe, Context(recipe, store))
    assert len(calls) == 1 + LAYERS, "the first layer was kept"
    again = module.fit(recipe, Context(recipe, store))
    assert len(calls) == 1 + LAYERS and again.seconds == found.seconds > 0
    for site, turn in found.turns.items():
        assert all(torch.equal(a, b) for a, b in zip(turn, again.turns[site], strict=True))


@pytest.mark.parametrize("row", ROWS)
def test_weights_are_calibrated_on_what_was_turned_and_rounded_as_they_are_then(
    row, lively, text_file, store, monkeypatch
):
    recipe = rotated_by(row, lively, text_file)
    recipe = recipe.with_(
        weights=recipe.weights.with_(method="gptq", quantizer=recipe.weights.quantizer.with_(bits=4))
    )
    loaded, made = build.rotated(build.door.resolved(recipe).canonical(), store)
    seen: list[Tensor] = []
    quantize = calibrate.quantize
    monkeypatch.setattr(
        calibrate, "quantize",
        lambda layer, names, of, spec: seen.append((names, of.hessian)) or quantize(layer, names, of, spec),
    )  # fmt: skip
    build.build(recipe, store)
    names, hessian = seen[0]
    assert "self_attn.q_proj" in names
    rows: list[Tensor] = []
    ids = build.corpus.sampled_blocks(
        recipe.weights.corpus, loaded.tokenizer, blocks=2, window=64, sample=None
    )
    plain = loading.load_model(lively)
    surgery.prepare(plain)
    with hooks.at_sites(plain, lambda _, x: rows.append(x.reshape(-1, CHANNELS)), ["layers.0.input_norm"]):
        stream.through(plain, [ids])
    x = turns.apply(made.turns["layers.0.input_norm"], rows[0].double())
    found, own = hessian.double(), x.T @ x
    torch.testing.assert_close(found / found.norm(), own / own.norm(), rtol=1e-3, atol=1e-5)
    weight = turns.apply(
        turns.taken_back(made.turns["layers.0.input_norm"]), plain.layers[0].self_attn.q_proj.weight.double()
    )
    torch.testing.assert_close(
        loaded.layers[0].self_attn.q_proj.weight.double(), weight, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("row", ROWS)
def test_rounding_comes_after_the_turn(row, lively, text_file, store):
    recipe = rotated_by(row, lively, text_file).with_(activations=ACTIVATIONS)
    built, seen = build.build(recipe, store), dict[str, Tensor]()
    with (
        build.quantized(built, recipe),
        hooks.at_sites(built.loaded, lambda site, x: seen.update({site: x}), ["layers.0.input_norm"]),
    ):
        stream.through(built.loaded, [IDS])
    rounded = seen["layers.0.input_norm"].reshape(-1, CHANNELS)
    assert max(len(row.unique()) for row in rounded) <= 16
    back = torch.linalg.inv(turns.dense(built.transforms.turns["layers.0.input_norm"], CHANNELS)).to(rounded)
    assert max(len((row @ back).unique()) for row in rounded) > 32, (
        "the same rows before the turn are on no grid"
    )
    assert not build.is_integer(
        recipe.with_(weights=recipe.weights.with_(quantizer=recipe.weights.quantizer.with_(bits=4)))
    )


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("field", "value"), [("scales", CaptureSpec()), ("keep_out", "nr_error_8.5")])
def test_what_judges_rows_or_scales_them_is_refused_beside(row, field, value):
    with pytest.raises(
        ValueError, match=rf"Recipe\.{field} must be None with a rotation that acts before every linear"
    ):
        Recipe(rotation=registry.spec_of(row), **{field: value})


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", registry.EXPORTS)
def test_no_export_holds_it(row, kind, lively, text_file, store, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "found", lambda *_, **__: pytest.fail("refused before any work"))
    said = "a matrix R1 to export; got" if kind == "r1" else "one that weights can hold to export"
    with pytest.raises(ValueError, match=said):
        registry.load(registry.EXPORTS, kind).export(
            rotated_by(row, lively, text_file), tmp_path / "out.safetensors", store
        )
    assert not (tmp_path / "out.safetensors").exists()


# ---- DuQuant


def test_errors_name_the_field_the_rule_and_the_value():
    for field, value, said in (("block", 0, "a whole number >= 1"), ("alpha", 1.5, r"in \[0, 1\]")):
        with pytest.raises(ValueError, match=rf"DuQuantBlocksSpec\.{field} must be {said}; got {value}"):
            DuQuantBlocksSpec(**{field: value})


@pytest.mark.parametrize(("channels", "block"), [(24, 4), (24, 24), (6, 1), (40, 8)])
def test_zigzag_deals_as_a_slow_loop_does(channels, block):
    largest = draw(channels).abs()
    blocks: list[list[int]] = [[] for _ in range(channels // block)]
    left, place, way = sorted(range(channels), key=lambda i: -float(largest[i])), 0, 1
    while left:
        blocks[place].append(left.pop(0))
        if not 0 <= place + way < len(blocks):
            way = -way  # the block at the end has the next one, too
        else:
            place += way
    # a block at an end has two in a row, the last of one deal and the first of the next
    assert duquant_blocks.zigzag(largest, block).tolist() == [i for own in blocks for i in own]


def test_zigzag_makes_the_blocks_means_alike():
    largest = draw(96).abs().exp()
    means = largest.view(-1, 12).mean(1)
    dealt = largest[duquant_blocks.zigzag(largest, 12)].view(-1, 12).mean(1)
    assert dealt.var() < means.var() / 5 and float(dealt.sum()) == pytest.approx(float(means.sum()))


def spiked(tokens: int = 200, channels: int = 48) -> Tensor:
    """Rows with a channel that is large in all of them and a token with a massive value, in one block."""
    rows = draw(tokens, channels).float()
    rows[:, 5] += 12
    rows[17, 3] = 90
    return rows


def test_duquant_is_two_rotations_of_blocks_about_an_order_and_its_range_falls():
    rows, spec = spiked(), DuQuantBlocksSpec(block=13, updates=40)
    first, order, second = turn = duquant_blocks.spread(rows, spec)
    assert first.shape == second.shape == (12, 12), "the largest divisor of 48 that is at most 13"
    for R in (first, second):
        assert rotations.orthogonality_error(R) < 1e-12
    after_first = turns.apply([first], rows)
    assert order.tolist() == duquant_blocks.zigzag(after_first.abs().amax(0), 12).tolist()
    spans = [float(x.max() - x.min()) for x in (rows, after_first, turns.apply(turn, rows))]
    assert spans[0] > 2 * spans[1] > 2.6 * spans[2], "each rotation lowers what it is led by"
    errors = [squared_error(x, ACTIVATIONS) for x in (rows, turns.apply(turn, rows))]
    assert errors[1][17] < 0.5 * errors[0][17] and errors[1].mean() < 0.5 * errors[0].mean()


def test_steps_see_the_blocks_of_largest_norm_of_all_rows(monkeypatch):
    monkeypatch.setattr(duquant_blocks, "ROWS", 10)
    rows = spiked()
    found = duquant_blocks.farthest(rows, 12)
    parts = sorted((part for row in rows for part in row.split(12)), key=lambda part: -float(part.norm()))
    torch.testing.assert_close(found, torch.stack(parts[:10]))


def test_smoothing_comes_first_and_is_smoothquant_s(lively, text_file, store):
    recipe = rotated_by("DuQuant", lively, text_file)
    found = transforms.fit(recipe, Context(recipe, store))
    context = Context(recipe, store)
    x = context.rows(recipe.rotation.capture).rows("layers.1.post_attention_norm").abs().amax(0)
    mlp = context.model.layers[1].mlp
    w = torch.maximum(mlp.gate_proj.weight.abs().amax(0), mlp.up_proj.weight.abs().amax(0))
    scale, *rest = found.turns["layers.1.post_attention_norm"]
    torch.testing.assert_close(scale, (w**0.4 / x**0.6).double(), rtol=1e-5, atol=0)
    assert len(rest) == 3 and not found.r3


# ---- FlatQuant


def test_sizes_are_the_nearest_factors():
    found = [flatquant.sizes(n) for n in (576, 1536, 96, 7, 1)]
    assert found == [(24, 24), (32, 48), (8, 12), (1, 7), (1, 1)]


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric", "free"])
def test_a_rounding_s_gradient_is_that_of_codes_held_still_and_a_scale_that_moves(scheme):
    x, above, grid = draw(6, 20) + 0.3, draw(6, 20, seed=1), ACTIVATIONS.with_(scheme=scheme)
    gradients = []
    for way in ("ours", "written out"):
        leaf = x.clone().requires_grad_()
        if way == "ours":
            y = flatquant.rounded(leaf, grid)
        else:
            low, high = leaf.amin(1, keepdim=True), leaf.amax(1, keepdim=True)
            if scheme == "symmetric":
                scale = torch.maximum(-low, high) / 7
            else:
                zero = torch.zeros_like(low)
                low, high = (low, high) if scheme == "free" else (low.minimum(zero), high.maximum(zero))
                scale = (high - low) / 15
            codes = (fake_quantize(x, grid) / scale).detach()
            units = leaf / scale
            y = scale * (units + (codes - units).detach())
        torch.testing.assert_close(y.detach(), fake_quantize(x, grid))
        (y * above).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    assert not torch.allclose(gradients[0], above, atol=1e-3), "the scale has a part in it"


def test_a_row_of_zeros_has_a_gradient_and_16_bits_round_nothing():
    x = torch.zeros(2, 8, requires_grad=True)
    flatquant.rounded(x, ACTIVATIONS).sum().backward()
    assert x.grad.isfinite().all()
    assert flatquant.rounded(x, ACTIVATIONS.with_(bits=16)) is x


def learned_affine() -> flatquant.Affine:
    """An affine whose every parameter is away from its start."""
    affine = flatquant.Affine(torch.linspace(0.5, 2, 24).double(), seed=1)
    with torch.no_grad():
        for n, parameter in enumerate(affine.parameters()):
            parameter.add_(0.2 * draw(*parameter.shape, seed=n))
    return affine


def test_an_affine_is_scales_and_a_kronecker_product_of_svds_with_an_exact_inverse():
    affine = learned_affine()
    A = turns.dense([step.detach() for step in affine.steps()], 24)
    back = turns.dense([step.detach() for step in affine.steps(-1)], 24)
    torch.testing.assert_close(back, torch.linalg.inv(A).T)
    factors = []
    for n, start in enumerate(affine.starts):
        U, V = start @ flatquant.cayley(affine.skew_u[n]), flatquant.cayley(affine.skew_v[n])
        assert max(rotations.orthogonality_error(one) for one in (U, V)) < 1e-12
        factors.append((U @ affine.d[n].exp().diag() @ V.T).detach())
    scales = affine.logs.exp().detach().diag()
    np.testing.assert_allclose(A.numpy(), (scales @ torch.from_numpy(np.kron(*factors))).numpy(), atol=1e-12)


def test_the_loss_is_what_rounded_linears_miss():
    affine, spec = learned_affine(), FlatQuantSpec()
    rows, weight = draw(10, 24), draw(7, 24, seed=1)
    A = turns.dense([step.detach() for step in affine.steps()], 24)
    x, w = fake_quantize(rows @ A, ACTIVATIONS), fake_quantize(weight @ torch.linalg.inv(A).T, spec.weights)
    missed = (x @ w.T - rows @ weight.T).square().sum() / (rows @ weight.T).square().sum()
    assert float(flatquant.loss(rows, weight, affine, spec).detach()) == pytest.approx(
        float(missed), rel=1e-9
    )


def outlying() -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a large channel and a massive value, weights, and scales that make neither smaller."""
    return spiked(200, 48), draw(32, 48, seed=1).float(), torch.ones(48).double()


def lost(turn: list[Tensor], rows: Tensor, weight: Tensor) -> float:
    """What linears miss by a turn, through the seam."""
    x, w = turns.apply(turn, rows), turns.apply(turns.taken_back(turn), weight)
    found = fake_quantize(x, ACTIVATIONS) @ fake_quantize(w, FlatQuantSpec().weights).T
    return float((found - rows @ weight.T).square().sum())


def test_learning_lowers_what_linears_miss_below_its_start_and_a_hadamard_s():
    rows, weight, s = outlying()
    start = [step.detach() for step in flatquant.Affine(s, 0).steps()]
    found = flatquant.learned(rows, weight, s, FlatQuantSpec(updates=60))
    assert lost(found, rows, weight) < 0.8 * lost(start, rows, weight)
    hadamard = rotations.make(RotationSpec(), 48)
    assert lost(found, rows, weight) < 0.9 * lost([hadamard], rows, weight) < lost([], rows, weight)


def test_of_its_looks_the_best_is_kept_the_start_among_them(monkeypatch):
    rows, weight, s = outlying()
    monkeypatch.setattr(flatquant, "RATE", 1.0)  # every step goes astray
    found = flatquant.learned(rows, weight, s, FlatQuantSpec(updates=5))
    for step, own in zip(found, flatquant.Affine(s, 0).steps(), strict=True):
        torch.testing.assert_close(step, own.detach())


def test_flatquant_starts_from_smoothquant_s_scales_and_keeps_r3(lively, text_file, store, monkeypatch):
    recipe, seen = rotated_by("FlatQuant", lively, text_file), []
    monkeypatch.setattr(
        flatquant, "learned", lambda rows, weight, s, spec: seen.append((rows, weight, s)) or [s]
    )
    made = transforms.fit(recipe, Context(recipe, store))
    assert made.r3 and not made.r4 and len(seen) == 4 * LAYERS
    for rows, weight, s in seen:
        wanted = rows.abs().amax(0).double() ** 0.3 / weight.abs().amax(0).double() ** 0.7
        torch.testing.assert_close(s, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("fields", "said"), [
    ({"updates": 0}, r"FlatQuantSpec\.updates must be a whole number >= 1; got 0"),
    ({"weights": SYM4}, r"FlatQuantSpec\.weights must be per_channel; got"),
    ({"activations": QuantSpec(granularity="per_channel")}, r"FlatQuantSpec\.activations must be per_token; got"),
])  # fmt: skip
def test_flatquant_s_errors_name_the_field(fields, said):
    with pytest.raises(ValueError, match=said):
        FlatQuantSpec(**fields)


def test_the_row_and_its_recipe_round_trip(tmp_path, text_file, lively):
    for row in ROWS:
        recipe = spec_for(lively, text_file).with_(rotation=registry.spec_of(row, seed=3))
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe and recipe.rotation.name == row
        assert recipe.rotation.acts_online and not registry.spec_of("RH").acts_online
