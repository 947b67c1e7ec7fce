"""The residual stream, seen and overwritten: what enters a layer is what transformers reports, only massive
values change, and hooks go.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from again import FLIPPED, FLOAT32, NOTICED, apart, assert_near
from conftest import CHANNELS, FAMILIES, LAYERS, MASSIVE, tiny_model
from test_evaluate import save_lively
from torch import Tensor

from dfrot_lab.model import corpus, door, loading
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.public import public
from dfrot_lab.observe import residual
from dfrot_lab.observe.residual import before_layers, massive_mask, massive_set, mean_massive
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, ModelSpec, RotationSpec, recipe_of
from dfrot_lab.score import build, perplexity

TEXT = "a sheep went over the hill;\nand a goat came back\n" * 20


def windows_of(loaded: LoadedModel, windows: int = 1, tokens: int = 60) -> Tensor:
    return torch.tensor(loaded.tokenizer(TEXT).input_ids[: windows * tokens]).view(windows, tokens)


def hooks(loaded: LoadedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())


def entering(loaded: LoadedModel, ids: Tensor) -> list[Tensor]:
    """What transformers says enters each layer, (windows, tokens, channels) each."""
    return list(loaded.model(ids, output_hidden_states=True).hidden_states[:LAYERS])


def slow_mask(x: Tensor) -> Tensor:
    """Value by value, from the rule's words."""
    values = x.reshape(-1).tolist()
    middle = sorted(abs(v) for v in values)[(len(values) - 1) // 2]
    return torch.tensor([abs(v) > 100 and abs(v) >= 1000 * middle for v in values]).view(x.shape)


# ---- which values are massive


@pytest.mark.parametrize("shape", [(7, 8), (3, 7, 8), (1, 1, 40)], ids=str)
def test_the_mask_is_that_of_a_loop_over_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    flat = x.view(-1)
    flat[:4] = torch.tensor([100.0, 100.5, -3000.0, 99.0])
    assert torch.equal(massive_mask(x), slow_mask(x)) and int(slow_mask(x).sum()) == 2


def test_both_thresholds_are_where_they_are_said_to_be():
    x = torch.full((1, 5, 64), 0.5)
    x[0, 0, :4] = torch.tensor([499.0, 500.0, -500.0, 600.0])
    assert massive_mask(x)[0, 0, :4].tolist() == [False, True, True, True] and int(massive_mask(x).sum()) == 3
    x = torch.full((1, 5, 64), 0.01)
    x[0, 0, :4] = torch.tensor([99.0, 100.0, 100.1, -100.1])
    assert (
        massive_mask(x)[0, 0, :4].tolist() == [False, False, True, True] and int(massive_mask(x).sum()) == 2
    )


def test_newlines_are_massive_in_the_largest_planted_channel_alone():
    """-250 is not 1000 times the median, about 0.35; 400 is."""
    loaded = tiny_model()
    ids = windows_of(loaded)
    [row, *_] = entering(loaded, ids)
    newline = ids[0] == loaded.tokenizer("\n").input_ids[0]
    expected = torch.zeros(1, 60, CHANNELS, dtype=torch.bool)
    expected[0, newline, max(MASSIVE, key=lambda c: abs(MASSIVE[c]))] = True
    assert newline.any() and torch.equal(massive_mask(row), expected)


# ---- overwriting


@pytest.mark.parametrize("to", ["zero", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_is_massive_the_logits_are_the_same(family, to):
    loaded = tiny_model(family, plant=False)
    ids = windows_of(loaded, 2)
    plain = loaded.model(ids).logits
    with massive_set(loaded, to, ids):
        assert_near(loaded.model(ids).logits, plain)


@pytest.mark.parametrize("to", ["zero", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_massive_values_that_enter_a_layer_are_set(family, to):
    """Seen by plain hooks: one registered before the block, which runs first, and one inside it, which sees
    what the layer gets.
    """
    loaded = tiny_model(family)
    ids = windows_of(loaded)
    value = (
        torch.zeros(LAYERS, CHANNELS) if to == "zero" else mean_massive(loaded, windows_of(loaded, 3)).float()
    )
    before: list[Tensor] = []
    after: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _m, args: before.append(args[0].clone()))
        for layer in loaded.layers
    ]
    with massive_set(loaded, to, windows_of(loaded, 3)), torch.inference_mode():
        before.clear()  # of mean_massive's own forward passes
        handles += [
            layer.register_forward_pre_hook(lambda _m, args: after.append(args[0].clone()))
            for layer in loaded.layers
        ]
        loaded.model(ids)
    for handle in handles:
        handle.remove()
    assert len(before) == len(after) == LAYERS
    assert massive_mask(before[0]).any()
    for layer, (was, became) in enumerate(zip(before, after, strict=True)):
        mask = slow_mask(was)
        assert torch.equal(became[~mask], was[~mask])
        assert_near(became[mask], value[layer].expand_as(was)[mask])


def test_zero_is_the_model_on_embeddings_without_the_massive_value():
    """After layer 0 nothing is massive any more: these models' massive values come from the embedding."""
    loaded = tiny_model()
    ids = windows_of(loaded, 2)
    embedded = loaded.model.get_input_embeddings()(ids)
    with massive_set(loaded, "zero", ids):
        found = loaded.model(ids).logits
    expected = loaded.model(inputs_embeds=embedded.masked_fill(slow_mask(embedded), 0)).logits
    assert_near(found, expected)
    assert apart(found, loaded.model(ids).logits) > 1e-3


def test_the_mean_is_that_of_a_loop_over_windows():
    """Windows with different numbers of massive values: a mean of the windows' means would differ. Each
    window has its own median.
    """
    loaded = tiny_model()
    ids = windows_of(loaded, 3)
    ids[1, :20] = loaded.tokenizer("\n").input_ids[0]
    embedding = loaded.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[loaded.tokenizer("g").input_ids[0], 3] += 700  # a second massive token, of another size
    values: dict[tuple[int, int], list[float]] = {}
    for window in ids:
        for layer, x in enumerate(entering(loaded, window[None])):
            for token, channel in slow_mask(x)[0].nonzero().tolist():
                values.setdefault((layer, channel), []).append(float(x[0, token, channel]))
    found = mean_massive(loaded, ids)
    assert found.shape == (LAYERS, CHANNELS) and found.dtype == torch.float64
    expected = torch.zeros(LAYERS, CHANNELS, dtype=torch.float64)
    for place, seen in values.items():
        expected[place] = sum(seen) / len(seen)
    assert values and len({round(v) for v in values[0, 3]}) > 1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_mean_is_of_the_model_as_it_is_and_leaves_it_so():
    loaded = tiny_model()
    ids = windows_of(loaded, 2)
    plain = loaded.model(ids).logits
    mean_massive(loaded, ids)
    assert hooks(loaded) == 0
    assert_near(loaded.model(ids).logits, plain)


# ---- hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_before_layers_sees_each_layers_input_once_in_order(family):
    loaded = tiny_model(family)
    ids = windows_of(loaded, 2)
    expected, seen = entering(loaded, ids), []
    with before_layers(loaded, lambda layer, x: seen.append((layer, x.clone()))):
        found = loaded.model(ids).logits
    assert [layer for layer, _ in seen] == list(range(LAYERS))
    for (_, x), other in zip(seen, expected, strict=True):
        assert_near(x, other)
    assert_near(found, loaded.model(ids).logits)


def test_one_layers_input_may_be_replaced_and_the_other_left():
    loaded = tiny_model()
    ids = windows_of(loaded)
    with before_layers(loaded, lambda layer, x: x * 0 if layer == 0 else None):
        found = loaded.model(ids).logits
    zeros = torch.zeros(1, 60, CHANNELS)
    assert_near(found, loaded.model(inputs_embeds=zeros).logits)


@pytest.mark.parametrize("to", ["zero", "mean"])
def test_hooks_are_gone_after_the_block_and_after_an_error(to):
    loaded = tiny_model()
    ids = windows_of(loaded)
    plain = loaded.model(ids).logits
    with massive_set(loaded, to, ids):
        assert hooks(loaded) == LAYERS
    assert hooks(loaded) == 0
    with pytest.raises(KeyboardInterrupt), massive_set(loaded, to, ids):
        loaded.model(ids)
        raise KeyboardInterrupt
    assert hooks(loaded) == 0
    assert_near(loaded.model(ids).logits, plain)


def test_hooks_are_gone_when_what_they_call_fails():
    loaded = tiny_model()
    ids = windows_of(loaded)

    def fail(layer: int, _x: Tensor) -> None:
        if layer == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), before_layers(loaded, fail):
        loaded.model(ids)
    with pytest.raises(IndexError), massive_set(loaded, "mean", torch.full((1, 5), 9999)):
        raise AssertionError("there is no token 9999")
    assert hooks(loaded) == 0


# ---- as a row of an evaluation


@pytest.mark.parametrize("bits", ["16-16-16", "16-4-16"])
@pytest.mark.parametrize("to", ["zero", "mean"])
def test_an_evaluation_overwrites_in_every_window(tiny_spec, text_file, store, to, bits):
    """Means are over as many windows of the calibration half of the same text as are scored, of the model
    before it is quantized.
    """
    text = CorpusSpec(name=str(text_file))
    plain = recipe_of(
        bits, model=tiny_spec, corpus=text, rotation=RotationSpec(kind="NR"), windows=3, window=64
    )
    spec = plain.with_(set_massive=to)
    built = build.build(plain, store)
    calibration, scored = (
        corpus.token_blocks(text.with_(split=split), built.loaded.tokenizer, blocks=3, window=64)
        for split in ("calibration", "evaluation")
    )
    with massive_set(built.loaded, to, calibration), build.quantized(built, plain):
        expected = [perplexity.window_loss(built.loaded, window) for window in scored]
    found = perplexity.evaluate(spec, store).losses
    assert found.tolist() == pytest.approx(expected, rel=FLIPPED)
    if to == "zero":  # a mean of equal values is the value, up to rounding
        assert apart(found, perplexity.evaluate(plain, store).losses) > NOTICED


def test_mean_massive_values_are_the_calibration_half_s_where_the_halves_differ(tmp_path, text_file, store):
    """A second massive token, a digit that is more frequent in one half than in the other."""
    model, channel = save_lively(tmp_path / "two"), next(iter(MASSIVE))
    loaded = loading.load_model(model)
    [digit] = loaded.tokenizer("2").input_ids
    loaded.model.get_parameter("model.embed_tokens.weight")[digit, channel] += 900
    loaded.model.save_pretrained(tmp_path / "two")
    text, nr = CorpusSpec(name=str(text_file)), RotationSpec(kind="NR")
    plain = recipe_of("16-16-16", model=model, corpus=text, rotation=nr, windows=3, window=64)
    calibration, scored = (
        corpus.token_blocks(text.with_(split=split), loaded.tokenizer, blocks=3, window=64)
        for split in ("calibration", "evaluation")
    )
    losses = {}
    for name, ids in (("calibration", calibration), ("scored", scored)):
        with massive_set(loaded, "mean", ids):
            losses[name] = np.array([perplexity.window_loss(loaded, window) for window in scored])
    found = perplexity.evaluate(plain.with_(set_massive="mean"), store).losses
    assert apart(found, losses["calibration"]) < FLOAT32 < NOTICED < apart(found, losses["scored"])


def test_means_from_another_calibration_text_are_another_evaluation(tiny_spec, text_file):
    def key(to: str | None) -> dict[str, object]:
        row = recipe_of(
            "16-16-16",
            model=tiny_spec,
            corpus=CorpusSpec(name=str(text_file)),
            rotation=RotationSpec(kind="NR"),
            set_massive=to,
        )
        return keys.evaluation(door.resolved(row).canonical(), door.prints)

    before = {to: key(to) for to in (None, "mean")}
    text = text_file.read_text()
    text_file.write_text(
        text[:3000].replace("sheep", "geese") + text[3000:]
    )  # the first half alone, of the same length
    assert key("mean") != before["mean"]
    assert key(None) == before[None]


# ---- profiles


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_are_transformers_hidden_states(family):
    loaded = tiny_model(family)
    [ids] = windows_of(loaded)
    found = residual.streams(loaded, ids)
    assert len(found) == LAYERS and hooks(loaded) == 0
    for x, other in zip(found, entering(loaded, ids[None]), strict=True):
        assert_near(x, other[0])


def spec_of(model: ModelSpec, text: Path, **fields: int) -> CaptureSpec:
    return CaptureSpec(
        model=model, corpus=CorpusSpec(name=str(text), split="calibration"), **{"tokens": 100, **fields}
    )


def magnitudes_of(spec: CaptureSpec, text: Path, start: int = 0) -> list[np.ndarray]:
    """By transformers and numpy alone; one token a byte."""
    loaded = loading.load_model(spec.model)
    ids = torch.tensor([loaded.tokenizer(text.read_text()).input_ids[start : start + 100]])
    return [np.abs(x[0].detach().numpy()) for x in entering(loaded, ids)]


def test_the_profile_is_the_three_largest_and_the_median_of_each_layer(tiny_spec, text_file, store):
    table = residual.residual_profile(spec_of(tiny_spec, text_file), store)
    assert list(table.columns) == ["model", "corpus", "layer", "metric", "value"]
    assert set(table["model"]) == {public(tiny_spec).source}
    assert set(table["corpus"]) == {public(CorpusSpec(name=str(text_file))).name}
    lines = []
    for layer, x in enumerate(magnitudes_of(spec_of(tiny_spec, text_file), text_file)):
        ordered = np.sort(x, axis=None)
        lines += [(layer, f"top {n}", float(ordered[-n])) for n in (1, 2, 3)] + [
            (layer, "median", float(ordered[(x.size - 1) // 2]))
        ]
    assert list(table[["layer", "metric"]].itertuples(index=False, name=None)) == [line[:2] for line in lines]
    assert table["value"].tolist() == pytest.approx([line[2] for line in lines], rel=FLOAT32)
    assert table["value"].max() > 300 > 1 > table.loc[table["metric"] == "median", "value"].max()


def test_the_profile_of_a_later_window_is_of_that_window(tiny_spec, text_file, store):
    spec = spec_of(tiny_spec, text_file, skip=2)
    table = residual.residual_profile(spec, store)
    expected = [np.sort(x, axis=None)[-1] for x in magnitudes_of(spec, text_file, 200)]
    assert table.loc[table["metric"] == "top 1", "value"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("layer", "tokens"), [(0, 32), (1, 5), (1, 100), (0, 999)])
def test_magnitudes_have_a_line_for_each_token_and_channel(tiny_spec, text_file, store, layer, tokens):
    spec = spec_of(tiny_spec, text_file)
    table = residual.magnitudes(spec, layer, tokens, store)
    count = min(tokens, 100)
    assert sorted(table.columns) == ["channel", "magnitude", "text", "token"]
    assert len(table) == count * CHANNELS
    wide = table.pivot_table(index="token", columns="channel", values="magnitude").to_numpy()
    assert_near(wide, magnitudes_of(spec, text_file)[layer][:count].astype(wide.dtype))
    assert "".join(table.drop_duplicates("token")["text"]) == text_file.read_text()[:count]
    assert (table.groupby("token")["text"].nunique() == 1).all()


def test_magnitudes_show_where_the_massive_token_is(tiny_spec, text_file, store):
    table = residual.magnitudes(spec_of(tiny_spec, text_file), 0, 100, store)
    largest = table.loc[table["magnitude"].idxmax()]
    assert largest["text"] == "\n" and largest["channel"] == 3


def test_profiles_refuse_a_layer_that_is_not_there_and_a_window_beyond_the_context(
    tiny_spec, text_file, store
):
    with pytest.raises(IndexError):
        residual.magnitudes(spec_of(tiny_spec, text_file), LAYERS, store=store)
    with pytest.raises(ValueError, match="context of 128 tokens; got 500"):
        residual.residual_profile(spec_of(tiny_spec, text_file, tokens=500), store)
