"""Evaluation: transformers' own loss, the windows of a sample, rotations that change nothing at 16 bits, equal
work keyed once, and resuming.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from again import FLIPPED, FLOAT32, NOTICED, apart, assert_near
from conftest import CONTEXT, FAMILIES, tiny_model

from dfrot_lab.disk import rotation_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.model import corpus, door, hooks, loading, surgery
from dfrot_lab.observe import massive
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import (
    ROW_RULES,
    CaptureSpec,
    CorpusSpec,
    ModelSpec,
    Recipe,
    RefineSpec,
    RotationSpec,
    WeightSpec,
    recipe_of,
)
from dfrot_lab.score import perplexity as module
from dfrot_lab.score.build import Built, build, build_key, keep_out, quantized, rounded, weights_stored
from dfrot_lab.score.perplexity import EvalResult, evaluate, evaluate_all, stored, window_loss
from dfrot_lab.weights.run import OnPart

NR, RO, RH = (RotationSpec(kind=kind) for kind in ("NR", "RO", "RH"))
RULE = "nr_error_9.5"


def save_lively(folder: Path, family: str = "llama", **options: object) -> ModelSpec:
    """A tiny model whose linears speak up: at their initial size the loss is log 256 whatever is done to
    them, and no test could fail.
    """
    loaded = tiny_model(family, **options)
    for name, parameter in loaded.model.named_parameters():
        if "proj.weight" in name or name == "lm_head.weight":
            parameter.mul_(6)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return ModelSpec(source=str(folder))


@pytest.fixture
def base(tmp_path: Path, text_file: Path) -> Recipe:
    """A tiny model at full precision on 3 windows of 64 tokens; calibration on the other half of the same
    text.
    """
    return spec_for(save_lively(tmp_path / "lively"), text_file)


def spec_for(model: ModelSpec, text: Path, bits: str = "16-16-16", **fields: object) -> Recipe:
    spec = recipe_of(
        bits, weights="rtn", model=model, corpus=CorpusSpec(name=str(text)), windows=3, window=64
    )
    calibration = CorpusSpec(name=str(text), split="calibration")
    return spec.with_(weights=spec.weights.with_(corpus=calibration, windows=2, window=64), **fields)


def at(base: Recipe, bits: str, **fields: object) -> Recipe:
    spec = spec_for(base.model, Path(base.corpus.name), bits)
    return spec.with_(**fields)


def resolved(spec: Recipe) -> Recipe:
    """What an evaluation is of: no `auto`, and nothing that has no effect."""
    return door.resolved(spec).canonical()


# ---- loss and perplexity
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 50, 128, 600])
@pytest.mark.parametrize("tied", [False, True])
def test_window_loss_is_transformers_own_loss(tmp_path, tokens, tied):
    """600 tokens are more than the logits are computed for at once."""
    loaded = loading.load_model(save_lively(tmp_path / "m", tied=tied))
    ids = torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(tokens))
    assert window_loss(loaded, ids) == pytest.approx(
        float(loaded.model(ids[None], labels=ids[None]).loss.detach()), rel=1e-5
    )


def test_evaluate_scores_the_first_windows_of_the_text(base, store, text_file):
    found = evaluate(base.with_(rotation=NR), store)
    loaded = loading.load_model(base.model)
    text = text_file.read_text()
    half = min((i + 1 for i, c in enumerate(text) if c == "\n"), key=lambda i: abs(i - len(text) / 2))
    ids = torch.tensor(loaded.tokenizer(text[half:]).input_ids[: 3 * 64]).view(3, 64)
    expected = [float(loaded.model(window[None], labels=window[None]).loss.detach()) for window in ids]
    assert found.losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / 3), rel=1e-5)
    assert found.seconds > 0 and found.provenance.startswith("folder ")


def test_evaluate_scores_the_windows_of_its_sample(base, store):
    """Of a text of whole windows each is scored once by as many samples of one window as it has."""
    first, *others = (evaluate(base.with_(sample=i, windows=1), store).losses for i in range(4))
    count = len(corpus.token_ids(base.corpus, loading.load_model(base.model).tokenizer)) // 64
    plain = evaluate(base.with_(windows=count), store).losses
    at_places = [plain[corpus.places(count, 1, i)].tolist() for i in range(4)]
    assert [first.tolist(), *(loss.tolist() for loss in others)] == [
        pytest.approx(expected, rel=FLIPPED) for expected in at_places
    ]
    assert len({*np.round(np.concatenate([first, *others]), 9)}) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_changes_nothing_at_16_bits(tmp_path, text_file, store, family):
    spec = spec_for(save_lively(tmp_path / family, family, tied=family == "qwen2"), text_file)
    plain = evaluate(spec.with_(rotation=NR), store).losses
    for rotation in (RO, RH, RotationSpec(kind="RH", seed=9)):
        np.testing.assert_allclose(evaluate(spec.with_(rotation=rotation), store).losses, plain, rtol=1e-5)


def test_weights_are_stored_once_built_and_at_16_bits_there_are_none_to_store(base, store):
    spec = at(base, "4-16-16")
    assert weights_stored(base, store) and not weights_stored(spec, store)
    build(spec, store)
    assert weights_stored(spec, store)


@pytest.mark.parametrize("bits", ["16-4-16", "16-16-4", "4-16-16", "4-4-4"])
def test_each_kind_of_bits_changes_the_loss(base, store, bits):
    plain, rough = evaluate(base, store), evaluate(at(base, bits), store)
    assert not np.allclose(rough.losses, plain.losses, rtol=1e-4), (
        "a rotation test on this model at 1e-5 would prove nothing"
    )
    fine = evaluate(at(base, bits.replace("4", "8")), store)
    assert np.abs(fine.losses - plain.losses).mean() < 0.5 * np.abs(rough.losses - plain.losses).mean()


def test_gptq_weights_are_evaluated_too(base, store):
    rtn = at(base, "4-16-16")
    gptq = rtn.with_(weights=rtn.weights.with_(method="gptq"))
    assert apart(evaluate(gptq, store).losses, evaluate(rtn, store).losses) > NOTICED
    assert sorted(a.manifest["inputs"]["weights"]["method"] for a in store.list() if a.kind == "weights") == [
        "gptq",
        "rtn",
    ]


def test_a_rotation_from_a_file_and_a_refined_one_are_accepted(base, store, tmp_path):
    path = tmp_path / "R1.safetensors"
    rotation_files.save(rotations.make(RO, 64), path, RO)
    spec = at(base, "16-4-16", rotation=RO)
    from_file = evaluate(spec.with_(rotation=RotationSpec(kind="file", path=str(path))), store)
    assert_near(from_file.losses, evaluate(spec, store).losses, FLIPPED)
    recorded = CaptureSpec(model=base.model, corpus=base.weights.corpus, tokens=64)
    refined = evaluate(spec.with_(rotation=RefineSpec(capture=recorded, init=RO, steps=3)), store)
    assert apart(refined.losses, from_file.losses) > NOTICED


def test_another_matrix_in_the_same_file_is_another_evaluation(base, store, tmp_path):
    path = tmp_path / "R1.safetensors"
    spec = at(base, "16-4-16", rotation=RotationSpec(kind="file", path=str(path)))
    losses = []
    for seed in (0, 1):
        rotation_files.save(rotations.make(RotationSpec(kind="RO", seed=seed), 64), path, None)
        losses.append(evaluate(spec, store).losses)
    assert apart(*losses) > NOTICED


@pytest.mark.parametrize("wrong", ["size", "missing"])
def test_a_rotation_that_does_not_fit_is_refused(base, store, tmp_path, wrong):
    path = tmp_path / "R1.safetensors"
    if wrong == "size":
        rotation_files.save(rotations.make(RO, 32), path, None)
    error, message = {
        "size": (ValueError, r"rotation\.shape must be \(64, 64\); got \(32, 32\)"),
        "missing": (FileNotFoundError, r"R1\.safetensors"),
    }[wrong]
    with pytest.raises(error, match=message):
        evaluate(base.with_(rotation=RotationSpec(kind="file", path=str(path))), store)


# ---- equal work, one key
# ------------------------------------------------------------------------------------------

SIXTEEN = WeightSpec(method="rtn", quantizer=QuantSpec(bits=16, granularity="per_channel"))
W4 = QuantSpec(bits=4, granularity="per_channel")
GROUPS = {"granularity": "per_group"}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (
            {"weights": SIXTEEN},
            {"weights": SIXTEEN.with_(method="gptq", windows=99, damping=0.5, clip_search=False)},
        ),
        (
            {"weights": WeightSpec(method="rtn")},
            {"weights": WeightSpec(method="rtn", windows=3, damping=0.5, corpus=CorpusSpec())},
        ),
        ({"activations": QuantSpec(bits=16)}, {"activations": QuantSpec(bits=16), "keep_out": RULE}),
        (
            {"activations": QuantSpec(bits=16)},
            {"activations": QuantSpec(bits=16), "keep_out": "worst", "keep_out_tokens": 4},
        ),
        (
            {"activations": QuantSpec(bits=16)},
            {"activations": QuantSpec(bits=16, scheme="asymmetric", clip_ratio=0.9)},
        ),
        (
            {"keys": QuantSpec(bits=16, **GROUPS), "values": QuantSpec(bits=16, **GROUPS)},
            {"values": QuantSpec(bits=16, scheme="asymmetric", clip_ratio=0.9, group_size=32, **GROUPS)},
        ),
        ({"rotation": NR}, {"rotation": RotationSpec(kind="NR", seed=5)}),
        ({"rotation": NR}, {"rotation": RotationSpec(kind="NR", block=8)}),
        (
            {"rotation": RefineSpec(), "model": ModelSpec(source="a")},
            {
                "rotation": RefineSpec(capture=CaptureSpec(model=ModelSpec(source="a"))),
                "model": ModelSpec(source="a"),
            },
        ),
    ],
    ids=[
        "weights at 16",
        "rtn's calibration",
        "keep-out at 16",
        "counted",
        "activations at 16",
        "kv at 16",
        "NR's seed",
        "NR's block",
        "another model's capture",
    ],
)
def test_what_has_no_effect_is_not_in_the_key(a, b):
    assert Recipe(**a).canonical() == Recipe(**b).canonical()


@pytest.mark.parametrize(
    "change",
    [
        {"weights": WeightSpec(windows=8)},
        {"weights": WeightSpec(method="rtn")},
        {"weights": WeightSpec(clip_search=False)},
        {"activations": QuantSpec(bits=4)},
        {"keep_out": RULE},
        {"keep_out": "worst", "keep_out_tokens": 4},
        {"rotation": NR, "set_massive": "zero"},
        {"rotation": RO},
        {"keys": QuantSpec(bits=4, **GROUPS)},
        {"values": QuantSpec(bits=4, **GROUPS)},
        {"windows": 5},
    ],
    ids=str,
)
def test_what_has_an_effect_is_in_the_key(change):
    assert Recipe(**change).canonical() != Recipe().canonical()


def test_canonical_changes_nothing_twice():
    for spec in (Recipe(), recipe_of("16-16-16", keep_out=RULE), recipe_of("4-4-16", weights="rtn")):
        assert spec.canonical().canonical() == spec.canonical()


def test_another_calibration_text_at_the_same_path_is_another_evaluation(base, store, tmp_path):
    """GPTQ's weights depend on it, so the perplexity does too."""
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("sheep in the morning\n" * 50)
    weights = WeightSpec(
        quantizer=W4, corpus=CorpusSpec(name=str(calibration), split="calibration"), windows=2, window=64
    )
    spec = base.with_(weights=weights)
    before = evaluate(spec, store).losses
    calibration.write_text("0123456789 ABC xyz\n" * 50)
    assert apart(evaluate(spec, store).losses, before) > NOTICED


# ---- the store
# ------------------------------------------------------------------------------------------


def test_stored_is_none_then_the_result(base, store):
    assert stored(base, store) is None
    found = evaluate(base, store)
    again = stored(base, store)
    assert again is not None
    assert again.losses.tolist() == found.losses.tolist()
    assert (again.spec, again.seconds, again.provenance) == (found.spec, found.seconds, found.provenance)
    assert stored(base.with_(windows=2), store) is None


def test_a_stored_evaluation_builds_nothing(base, store, monkeypatch):
    first = evaluate(base, store)

    def never(*_: object) -> Built:
        raise AssertionError("the model was built although the result is stored")

    monkeypatch.setattr(module, "build", never)
    assert evaluate(base, store).losses.tolist() == first.losses.tolist()
    with pytest.raises(AssertionError, match="although the result is stored"):
        evaluate(base.with_(windows=2), store)


def test_a_stopped_evaluation_goes_on_at_its_window(base, store, tmp_path, monkeypatch):
    spec = at(base, "16-4-16")
    scored: list[int] = []
    score = module.window_measures

    def score_two_then_stop(built, ids, *of):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(int(ids[0]))
        return score(built, ids, *of)

    monkeypatch.setattr(module, "window_measures", score_two_then_stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(spec, store)
    monkeypatch.undo()
    assert stored(spec, store) is None
    again: list[int] = []
    monkeypatch.setattr(
        module, "window_measures", lambda built, ids, *of: again.append(int(ids[0])) or score(built, ids, *of)
    )
    resumed = evaluate(spec, store)
    monkeypatch.undo()
    assert (len(scored), len(again)) == (2, 1)
    assert_near(resumed.losses, evaluate(spec, Store(tmp_path / "one go")).losses, FLIPPED)
    [artefact] = [a for a in store.list() if a.kind == "evaluation"]
    assert sorted(artefact.names) == ["losses", "means", "recipe", "tokens"]


def test_seconds_of_a_stopped_evaluation_count_all_its_windows(base, store, monkeypatch):
    score, clock = module.window_measures, {"now": 0.0, "left": 2}

    def ten_seconds(built, ids, *of):
        if not clock["left"]:
            raise KeyboardInterrupt
        clock["left"] -= 1
        clock["now"] += 10
        return score(built, ids, *of)

    monkeypatch.setattr(module, "window_measures", ten_seconds)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock["now"])
    with pytest.raises(KeyboardInterrupt):
        evaluate(base, store)
    clock["left"] = 9
    assert evaluate(base, store).seconds == pytest.approx(30)


def test_evaluate_all_builds_once_for_neighbours_that_share_a_model(base, store, tmp_path, monkeypatch):
    built: list[str] = []
    real = module.build

    def counted(spec: Recipe, store: Store, *listener: OnPart) -> Built:
        built.append(f"{spec.rotation.name} {spec.bits}")
        return real(spec, store, *listener)

    monkeypatch.setattr(module, "build", counted)
    specs = [
        at(base, bits, rotation=rotation)
        for rotation in (RO, RH)
        for bits in ("16-4-16", "16-4-4", "16-16-16")
    ]
    specs[1] = specs[1].with_(keep_out=RULE)
    seen: list[EvalResult] = []
    found = evaluate_all(specs, store, seen.append)
    assert built == ["RO 16-4-16", "RH 16-4-16"]
    assert seen == found and [r.spec for r in found] == [resolved(spec) for spec in specs]
    for spec, result in zip(specs, found, strict=True):
        assert_near(evaluate(spec, Store(tmp_path / "alone")).losses, result.losses, FLIPPED)
    built.clear()
    evaluate_all(specs, store)
    assert built == []


def test_build_keys_differ_where_models_do(base, text_file, tmp_path):
    w4 = at(base, "4-4-16")
    keys = [
        build_key(s)
        for s in (base, w4, base.with_(rotation=RO), w4.with_(weights=w4.weights.with_(clip_search=False)))
    ]
    keys.append(build_key(spec_for(save_lively(tmp_path / "other", seed=1), text_file)))
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
    assert build_key(base) == build_key(at(base, "16-4-4", keep_out=RULE, windows=2))


# ---- keep-out
# ------------------------------------------------------------------------------------------


def test_a_clip_at_every_site_is_the_clip_of_the_activations(base, store):
    """And a clip at one site is none elsewhere."""
    recipe = at(base, "4-4-16", rotation=RH)
    built, ids = build(recipe, store), torch.arange(96).reshape(2, 48) * 5 % 250
    sites = hooks.sites_of(built.loaded, *hooks.LINEAR_INPUTS)

    def logits(clips: dict[str, float], recipe: Recipe, fake: bool = True) -> torch.Tensor:
        clipped = dataclasses.replace(built, transforms=dataclasses.replace(built.transforms, clips=clips))
        with quantized(clipped, recipe, fake=fake), torch.inference_mode():
            return built.loaded.model(ids).logits

    wanted = logits({}, recipe.with_(activations=recipe.activations.with_(clip_ratio=0.7)))
    for fake in (True, False):
        assert_near(logits(dict.fromkeys(sites, 0.7), recipe, fake), wanted)
    own = dataclasses.replace(built.transforms, clips={sites[1]: 0.7})
    one = rounded(recipe, own, None)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for site in sites:
        grid = recipe.activations.with_(clip_ratio=0.7 if site == sites[1] else 1.0)
        assert torch.equal(one(site, x), fake_quantize(x, grid))
    assert apart(logits({}, recipe), wanted) > NOTICED


@pytest.mark.parametrize("rule", [RULE, "ro_vs_nr"])
@pytest.mark.parametrize("rotation", [None, RO, RH], ids=["NR", "RO", "RH"])
def test_keep_out_judges_the_row_as_it_was_before_the_rotation(rule, rotation):
    x = 1.6 * torch.randn(1, 60, 64, generator=torch.Generator().manual_seed(0))
    x[:, ::9] *= 0.02
    x[:, ::9, 5] = 8
    R = None if rotation is None else rotations.make(rotation, 64).float()
    turned = x if R is None else x @ R
    mask = massive.rows_rule(x, rule, QuantSpec(scheme="asymmetric"))
    assert bool(mask[0, ::9].all()) and 0 < int(mask.sum()) < 60
    assert torch.equal(keep_out(Recipe(keep_out=rule), R)(turned), mask)


def own_error(row: list[float], spec: QuantSpec) -> float:
    """The sum of squares that a 4-bit quantizer leaves of a row, from its formula."""
    top, low, high = 2**spec.bits - 1, min(0.0, *row) * spec.clip_ratio, max(0.0, *row) * spec.clip_ratio
    if spec.scheme == "symmetric":
        step, start, end = max(map(abs, row)) * spec.clip_ratio / (top // 2), -(top // 2) - 1, top // 2
    else:
        step = (high - low) / top
        start, end = round(low / step), top + round(low / step)
    return sum((value - step * min(max(round(value / step), start), end)) ** 2 for value in row)


@pytest.mark.parametrize(
    "act",
    [QuantSpec(scheme="asymmetric"), QuantSpec(scheme="asymmetric", clip_ratio=0.7), QuantSpec()],
    ids=lambda act: act.name,
)
@pytest.mark.parametrize("rule", [*ROW_RULES, "worst"])
def test_keep_out_judges_with_the_quantizer_of_the_activations(rule, act):
    """As `QuaRot.FP16()`, whose threshold is of the error under whatever quantizer is configured."""
    x = torch.randn(80, 64, generator=torch.Generator().manual_seed(0)).double()
    x += torch.linspace(-2, 2, 80)[:, None]  # rows on one side of 0 have half the asymmetric step
    reference = rotations.make(RotationSpec(kind="RO", seed=0), 64).float().double()
    turned = x @ reference
    errors = [own_error(row, act) for row in x.tolist()]
    if rule == "ro_vs_nr":
        wanted = [own_error(row, act) >= error for row, error in zip(turned.tolist(), errors, strict=True)]
    elif rule == "worst":
        wanted = [error >= sorted(errors)[-9] for error in errors]
    else:
        middle = sum(sorted(errors)[39:41]) / 2  # half of the rows are below it: the threshold, once scaled
        x, wanted = x * float(rule[-3:]) / 8 / middle**0.5, [error < middle for error in errors]
    counted = 9 if rule == "worst" else None
    found = keep_out(Recipe(keep_out=rule, keep_out_tokens=counted, activations=act), None)(x)
    assert 0 < sum(wanted) < 80
    assert found.tolist() == wanted


@pytest.mark.parametrize("rotation", [RO, RH], ids=["RO", "RH"])
def test_keep_out_brings_the_hidden_states_of_massive_tokens_nearer(base, store, rotation):
    """At the norms alone: what is kept out is exact, and every other row is quantized as without it."""
    spec = at(
        base, "16-3-16", rotation=rotation
    )  # where ordinary rows are above the threshold at 64 channels
    built = build(resolved(spec), store)
    ids = torch.tensor(built.loaded.tokenizer("one sheep\ntwo goats\nthree hills\n" * 2).input_ids)[None]
    newline = ids[0] == built.loaded.tokenizer("\n").input_ids[0]
    norm = built.loaded.layers[0].get_submodule("input_layernorm")
    seen = {}
    for name, chosen in {
        "exact": at(base, "16-16-16", rotation=rotation),
        "all": spec,
        "kept": spec.with_(keep_out=RULE),
    }.items():
        with quantized(built, chosen), torch.inference_mode():
            handle = norm.register_forward_hook(
                lambda _m, _a, output, name=name: seen.update({name: output[0].clone()})
            )
            loading.body(built.loaded)(ids)
            handle.remove()
    assert_near(seen["kept"][newline], seen["exact"][newline])
    assert apart(seen["all"][newline], seen["exact"][newline]) > 0.01
    assert_near(seen["kept"][~newline], seen["all"][~newline])


def measures(x: torch.Tensor, R: torch.Tensor | None, spec: Recipe) -> dict[str, list[float]]:
    """Of each row as the norm puts it out, rotated if R is given: the largest |value| before rotation, and
    the squared error, one at a time.
    """
    found: dict[str, list[float]] = {"most_massive": [], "worst": []}
    for row in x.reshape(-1, x.shape[-1]):
        before = row if R is None else row @ R.T
        found["most_massive"].append(max(abs(value) for value in before.tolist()))
        rounded = fake_quantize(row[None], spec.activations)[0]
        found["worst"].append(sum((a - b) ** 2 for a, b in zip(row.tolist(), rounded.tolist(), strict=True)))
    return found


@pytest.mark.parametrize("rotation", [None, RO, RH], ids=["NR", "RO", "RH"])
@pytest.mark.parametrize("which", ["most_massive", "worst"])
@pytest.mark.parametrize("k", [1, 7, 59, 60, 200])
def test_counted_keep_out_takes_the_k_largest(which, k, rotation):
    """Values drawn with a scale of their own in each row, so that the two measures disagree; more than there
    are keeps all.
    """
    x = torch.randn(1, 60, 64, generator=torch.Generator().manual_seed(0))
    x *= torch.rand(60, generator=torch.Generator().manual_seed(1))[:, None] * 3
    x[:, 4, 9] = 40
    R = None if rotation is None else rotations.make(rotation, 64).float()
    turned = x if R is None else x @ R
    spec = Recipe(keep_out=which, keep_out_tokens=k)
    mask = keep_out(spec, R)(turned)
    assert mask.shape == (1, 60) and mask.dtype == torch.bool and int(mask.sum()) == min(k, 60)
    found = measures(turned, R, spec)
    chosen = mask[0].nonzero().flatten().tolist()
    assert set(chosen) == set(sorted(range(60), key=lambda i: -found[which][i])[:k])
    other = "worst" if which == "most_massive" else "most_massive"
    assert k != 7 or set(chosen) != set(sorted(range(60), key=lambda i: -found[other][i])[:k]), (
        "the two measures agree: nothing was told apart"
    )


def test_most_massive_and_worst_of_a_spike():
    """A row that is one large value has the largest value and, without rotation, almost no error: first by
    one measure and last by the other.
    """
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    x[11] *= 1e-3
    x[11, 5] = 8
    spike = torch.arange(20) == 11
    assert torch.equal(keep_out(Recipe(keep_out="most_massive", keep_out_tokens=1), None)(x), spike)
    assert torch.equal(keep_out(Recipe(keep_out="worst", keep_out_tokens=19), None)(x), ~spike)


@pytest.mark.parametrize("k", [1, 5, 60, 99])
def test_random_keep_out_has_the_same_places_at_every_call_and_site(k):
    """Whatever the values are and was drawn before: a token is kept out in all layers or in none."""
    chosen = keep_out(Recipe(keep_out="random", keep_out_tokens=k), None)
    first = chosen(torch.zeros(1, 60, 64))
    torch.manual_seed(123)
    assert int(first.sum()) == min(k, 60)
    assert torch.equal(chosen(torch.randn(1, 60, 64)), first)
    again = keep_out(Recipe(keep_out="random", keep_out_tokens=k), rotations.make(RO, 64).float())
    assert torch.equal(again(torch.randn(60, 64)), first[0])
    expected = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:k]
    assert sorted(expected.tolist()) == first[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("which", ["most_massive", "worst", "random"])
@pytest.mark.parametrize("bits", ["16-4-16", "4-4-4"])
def test_keeping_all_tokens_out_leaves_norm_outputs_unquantized(base, store, which, bits):
    """As an evaluation in which only the o and down inputs are quantized; in integer arithmetic the same to
    float rounding.
    """
    spec = resolved(at(base, bits, rotation=RH))
    built = build(spec, store)
    ids = torch.arange(64) * 3 % 250

    kinds = ("o_proj_in", "down_proj_in", *(("k", "v") if spec.keys.bits < 16 else ()))
    sites, act = hooks.sites_of(built.loaded, *kinds), rounded(spec, built.transforms, None)
    with surgery.online(built.loaded, r3=spec.keys.bits < 16, r4=True, function=act, sites=sites):
        expected = window_loss(built.loaded, ids)
    kept = spec.with_(keep_out=which, keep_out_tokens=64)
    with quantized(built, kept, fake=True):
        assert window_loss(built.loaded, ids) == pytest.approx(expected, rel=FLIPPED)
    with quantized(built, kept):
        assert window_loss(built.loaded, ids) == pytest.approx(expected, rel=FLIPPED)
    with quantized(built, spec):
        assert window_loss(built.loaded, ids) != pytest.approx(expected, rel=FLIPPED)


@pytest.mark.parametrize("which", ["most_massive", "worst", "random"])
def test_keeping_more_tokens_out_changes_more_and_one_more_than_all_is_all(base, store, which):
    spec = at(base, "16-4-16", rotation=RO)
    losses = [evaluate(spec.with_(keep_out=which, keep_out_tokens=k), store).losses for k in (1, 16, 64, 65)]
    losses.append(evaluate(spec, store).losses)
    assert min(apart(losses[a], losses[b]) for a, b in [(0, 1), (1, 2), (0, 4), (1, 4), (2, 4)]) > NOTICED
    assert_near(losses[2], losses[3], FLIPPED)


def test_the_model_is_as_before_once_the_context_ends(base, store):
    built = build(resolved(at(base, "16-4-4", keep_out=RULE)), store)
    ids = torch.arange(40)
    with surgery.online(built.loaded, r4=True):
        before = window_loss(built.loaded, ids)
    with quantized(built, at(base, "16-4-4", keep_out=RULE)):
        assert window_loss(built.loaded, ids) != pytest.approx(before, rel=NOTICED)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in built.loaded.model.modules())
    with surgery.online(built.loaded, r4=True):
        assert window_loss(built.loaded, ids) == pytest.approx(before, rel=FLOAT32)


def test_nr_has_no_rotation_at_all(base, store):
    """NR at 16-4-16 is the plain model with fused norms and quantized inputs: no R4 either."""
    spec = resolved(at(base, "16-4-16", rotation=NR))
    built = build(spec, store)
    plain = loading.load_model(base.model)
    surgery.prepare(plain)
    assert built.R is None
    ids = torch.arange(40)

    def act(_site: str, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x, spec.activations)

    sites = hooks.sites_of(plain, *hooks.LINEAR_INPUTS)
    with surgery.online(plain, function=act, sites=sites), quantized(built, spec):
        assert window_loss(built.loaded, ids) == pytest.approx(window_loss(plain, ids), rel=FLIPPED)


# ---- bad input
# ------------------------------------------------------------------------------------------


def test_more_windows_than_the_text(base, store):
    with pytest.raises(
        ValueError,
        match=r"windows must be at most \d+: .*text\.txt \(evaluation\) has .* "
        r"whole windows of 64.*; got 999",
    ):
        evaluate(base.with_(windows=999), store)
    assert stored(base.with_(windows=999), store) is None


def test_a_window_longer_than_the_context(base, store):
    with pytest.raises(
        ValueError, match=rf"window must be at most the model's context of {CONTEXT} tokens; got 200"
    ):
        evaluate(base.with_(window=200), store)


@pytest.mark.parametrize("fields", [{"windows": 999}, {"window": 200}], ids=["windows", "window"])
def test_a_spec_that_cannot_be_scored_is_refused_before_weights_are_quantized(base, store, fields):
    """On the default model that would be minutes of GPTQ for nothing."""
    spec = at(base, "4-4-16", **fields)
    with pytest.raises(ValueError, match="must be"):
        evaluate(spec, store)
    assert [a.kind for a in store.list()] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windows": 0}, r"Recipe\.windows must be a whole number >= 1; got 0"),
        ({"window": 1}, r"Recipe\.window must be a whole number >= 2; got 1"),
        ({"window": "64"}, r"Recipe\.window must be a whole number >= 2; got '64'"),
        ({"model": "smollm2-135m"}, r"Recipe\.model must be a ModelSpec; got 'smollm2-135m'"),
        ({"kv": QuantSpec()}, r"Recipe has no field 'kv'; it has model, .*keys, values, "),
        (
            {"keep_out": "sun"},
            r"Recipe\.keep_out must be one of None, nr_error_8\.5, nr_error_9\.5, ro_vs_nr, .*; got 'sun'",
        ),
    ],
)
def test_specs_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize("bits", ["4-4", "a-4-16", "4_4_16", "1-4-16", "4-17-16"])
def test_bits_must_be_three_numbers_in_2_to_16(bits):
    with pytest.raises(
        ValueError,
        match=r"bits must be (WEIGHTS-ACTIVATIONS-KV such as 4-4-16|a whole number in 2\.\.16); got",
    ):
        recipe_of(bits)


def test_results_are_frozen(base, store):
    with pytest.raises(dataclasses.FrozenInstanceError):
        evaluate(base, store).seconds = 0.0
