"""The massive explorer without a browser: it names the planted token, moves change data in place, token text
is safe, errors are sentences.
"""

import dataclasses
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYERS, MASSIVE
from explorers import MALICIOUS, Page, assert_safe, event, remade, shown_text

from dfrot_lab import explore
from dfrot_lab.explore.massive import numbers
from dfrot_lab.explore.page import packed
from dfrot_lab.model import door
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.specs import MASSIVE_RULES, CaptureSpec, CorpusSpec, ModelSpec

BIG = max(MASSIVE, key=lambda channel: abs(MASSIVE[channel]))


@pytest.fixture
def corpus(text_file) -> CorpusSpec:
    return CorpusSpec(name=str(text_file), split="calibration")


@pytest.fixture
def top(tiny_spec, corpus, store):
    return explore.massive(model=tiny_spec, corpus=corpus, store=store, tokens=128)


@pytest.fixture
def heat(top):
    top.controls["view"].value = "heat map"
    return top


def unpacked(array: np.ndarray) -> np.ndarray:
    """The array that `packed` made of float32."""
    return np.asarray(array, dtype=np.float32)


def look(top, text: str) -> None:
    top.controls["text"].value = text
    top.controls["look"].click()
    top.job.wait(60)


def state_of(top) -> tuple:
    """All that a reader sees but the status."""
    film = top.film
    sentences = (top.sentence.value, top.tokens.value, len(top.table()))
    return (
        unpacked(top.plot.data[0].z).tobytes(),
        film.frames,
        film.words,
        film.marked,
        film.token,
        *sentences,
    )


def test_it_opens_on_the_planted_token_in_the_middle_layer(top):
    assert "dfrot-massive" in top._dom_classes
    assert top.state.layer == top.controls["layer"].value == LAYERS // 2
    table, newlines = top.table(), [i for i, text in enumerate(top.seen.texts) if text == "\n"]
    assert 2 <= len(newlines) <= 16
    assert sorted(table.loc[table["massive"], "token"]) == newlines
    first = table.iloc[0]
    assert (first["text"], first["channel"]) == ("\n", BIG)
    said = Page(top.sentence.value).text
    reaches = f"reaches {abs(first['value']):,.0f} in channel {BIG} at layer 1: "
    assert said.startswith(f"Token {first['token']} \u2018\u21b5\u2019 {reaches}")
    assert f"Rule sun marks {len(newlines)} of 128 tokens." in said
    assert "<td" in top.tokens.value and shown_text("\n") in Page(top.tokens.value).text
    assert Page(top.channels.value).text.startswith(
        f"Largest channels at layer 1channelvalueratiotokentext{BIG}"
    )
    assert top.state.view == "words" and top.film.token == first["token"]
    assert top.film.marked[1] == newlines and [top.film.words[i] for i in newlines] == ["\u21b5"] * len(
        newlines
    )


def test_its_numbers_are_the_models_own(top, tiny_spec, corpus, store):
    recorded = capture(CaptureSpec(model=tiny_spec, corpus=corpus, tokens=128), store)
    site = recorded.sites.index("layers.1.input_norm")
    table = top.table().sort_values("token")
    assert np.allclose(table["value"].abs(), recorded.residual_max[site], rtol=1e-5)
    assert table["channel"].tolist() == recorded.residual_channel[site].tolist()
    assert np.allclose(
        table["ratio"], recorded.residual_max[site] / recorded.residual_median[site], rtol=1e-5
    )
    assert table["text"].tolist() == recorded.texts
    for rule in MASSIVE_RULES:
        assert torch.equal(
            numbers.marks(top.seen, 1, rule), massive.find(recorded, rule, ["layers.1.input_norm"])[0]
        ), rule


def test_a_capture_opens_on_its_own_tokens_and_model(tiny_spec, corpus, store):
    recorded = capture(CaptureSpec(model=tiny_spec, corpus=corpus, tokens=96), store)
    top = explore.massive(recorded, store=store)
    assert top.seen.texts == recorded.texts
    assert top.loaded.spec == door.resolved(tiny_spec) and top.corpus.name == corpus.name


def test_a_slider_move_changes_the_data_in_place(heat):
    top = heat
    plot, profile, before, trace = top.plot, top.profile, state_of(top), top.plot.data[0]
    top.controls["layer"].value = 0
    assert top.plot is plot and top.plot.data[0] is trace and top.profile is profile
    assert state_of(top)[0] != before[0]
    assert " at layer 0: " in Page(top.sentence.value).text
    assert list(profile.data[0].x) == [0, 0]
    top.state.layer = 1
    assert state_of(top) == before and top.controls["layer"].value == 1


def test_the_cells_are_the_largest_of_their_channels_and_name_the_true_one(heat):
    top = heat
    x = top.seen.streams[1]
    drawn = unpacked(top.plot.data[0].customdata)
    assert drawn.shape == (64, 128, 3) and top.plot.data[0].hovertemplate.count("customdata") == 3
    token = int(top.table()["token"].iloc[0])
    row = drawn[:, token]
    best = row[np.abs(row[:, 0]).argmax()]
    assert best[0] == pytest.approx(float(x[token, BIG]), rel=1e-4) and best[1] == BIG
    assert best[2] == pytest.approx(float(x[token, BIG].abs() / x.abs().median()), rel=1e-4)
    height = unpacked(top.plot.data[0].z)
    assert np.allclose(height, np.log10(np.maximum(np.abs(drawn[..., 0]), 0.01)), atol=1e-4)
    assert top.plot.data[0].x[token] == f"{token} \u2068\u21b5\u2069"


@pytest.mark.parametrize(("tokens", "channels"), [(256, 576), (2048, 576), (7, 10), (1, 1), (300, 1000)])
def test_pooling_keeps_every_token_its_largest_channel_and_few_cells(tokens, channels):
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0))
    value, channel = numbers.pooled(x)
    assert value.shape == channel.shape == (tokens, len(numbers.starts(tokens, channels)))
    assert value.numel() <= numbers.CELLS and value.shape[1] <= numbers.COLUMNS
    assert torch.equal(value, x.gather(1, channel))
    assert torch.equal(value.abs().amax(1), x.abs().amax(1))
    first = torch.tensor(numbers.starts(tokens, channels))
    assert bool((channel >= first).all())


def film_values(top) -> np.ndarray:
    """What the page makes of the film's bytes: |x| (layers, columns, tokens)."""
    codes = np.frombuffer(top.film.frames, np.uint16).reshape(top.film.shape[:3])
    low, high = top.film.ends
    return 10.0 ** (low + (high - low) * codes.astype(float) / 65535)


def test_the_film_holds_every_layer_as_the_heat_map_shows_it(heat):
    found, layers = film_values(heat), len(heat.seen.streams)
    assert found.shape == (layers, 64, 128) and heat.film.shape[3] == 1 and heat.film.max == layers - 1
    for layer in range(layers):
        heat.state.layer = layer
        drawn = np.abs(unpacked(heat.plot.data[0].customdata)[..., 0])
        assert np.allclose(found[layer], np.maximum(drawn, 0.01), rtol=3e-4)
        marked = heat.table().loc[heat.table()["massive"], "token"]
        assert heat.film.marked[layer] == sorted(marked)
    assert heat.film.ends == (-2, np.ceil(np.log10(heat.seen.profile["top 1"].max())))


def test_the_film_pools_as_the_heat_map_and_knows_the_channels_of_a_cell(top):
    x = torch.randn(256, 576, generator=torch.Generator().manual_seed(0))
    spiked = x.index_put((torch.tensor(7), torch.tensor(500)), torch.tensor(2500.0))
    rows = [{"layer": i, "top 1": float(y.abs().max()), "median": 0.6} for i, y in enumerate((x, spiked))]
    seen = numbers.Look(["a"] * 256, [x, spiked], pd.DataFrame(rows), 0.0, 256)
    top.film.show(seen, "sun", "words", 0)
    assert top.film.shape == (2, 192, 256, 3) and top.film.ends == (-2, 4)
    for found, y in zip(film_values(top), (x, spiked), strict=True):
        assert np.allclose(found, y.abs().view(256, 192, 3).amax(2).T.clamp(min=0.01), rtol=3e-4)
    assert top.film.marked == [[], [7]]


def test_the_film_moves_the_layer_and_stays_within_the_model(top):
    top.film.value = 0
    assert top.state.layer == 0 and " at layer 0: " in Page(top.sentence.value).text
    top.state.layer = 99
    assert top.film.value == top.state.layer == len(top.seen.streams) - 1


def test_a_token_that_is_picked_anywhere_is_seen_everywhere(heat):
    sizes = heat.table().set_index("token")
    at = {"xs": [heat.plot.data[0].x[5]], "ys": [3], "point_indexes": [[3, 5]], "trace_indexes": [0]}
    clicked = {"event_type": "plotly_click", "points": at, "device_state": None, "selector": None}
    for pick in (
        lambda: heat.film._handle_custom_msg({"token": 5}, []),
        lambda: setattr(heat.plot, "_js2py_pointsCallback", clicked),
        lambda: setattr(heat.controls["token"], "value", 5),
    ):
        heat.state.token = -1
        assert heat.film.token == sizes.index[0]
        pick()
        assert heat.state.token == heat.film.token == 5
        (frame,) = heat.plot.layout.shapes
        assert (frame.x0, frame.x1) == (4.5, 5.5)
        largest = [float(x[5].abs().max()) for x in heat.seen.streams]
        assert list(heat.profile.data[5].y) == pytest.approx(largest)
        assert f"Token 5 \u2018{shown_text(sizes['text'][5])}\u2019 reaches" in Page(heat.sentence.value).text
    heat.film._handle_custom_msg({"token": 5}, [])
    assert heat.state.token == -1 and heat.film.token == sizes.index[0]
    heat.state.token = 9999
    assert heat.film.token == sizes.index[0]


@pytest.mark.parametrize("rule", MASSIVE_RULES)
def test_every_rule_says_its_threshold_and_marks_the_planted_tokens(heat, rule):
    top = heat
    top.controls["rule"].value = rule
    assert rule in top.words.value and any(c.isdigit() for c in Page(top.words.value).text)
    table = top.table()
    assert set(table.loc[table["massive"], "text"]) == {"\n"}
    diamonds = list(top.plot.data[1].x)
    assert len(diamonds) == int(table["massive"].sum())


def test_a_typed_text_takes_its_place(top):
    look(top, "a\nb")
    assert (top.status.state, top.table()["text"].tolist()[0]) == ("ready", "\n")
    assert top.seen.texts == ["a", "\n", "b"]
    look(top, "sheep")
    assert Page(top.sentence.value).text.startswith("No token is massive here by rule sun.")


def test_a_long_text_is_cut_and_says_so(top):
    top.controls["tokens"].value = 64
    look(top, "ab" * 50)
    assert len(top.table()) == 64 and "the first 64 of 100 tokens" in top.status.text


def test_a_block_of_the_corpus_takes_its_place(top, tiny_spec, corpus, store):
    top.controls["block"].value = 2
    top.controls["open"].click()
    top.job.wait(60)
    assert (
        top.seen.texts
        == capture(CaptureSpec(model=tiny_spec, corpus=corpus, tokens=128, skip=2), store).texts
    )


@pytest.mark.parametrize(
    ("block", "text", "sentence"),
    [(None, "", "at least one token"), (10_000, None, "windows must be at most")],
)
def test_an_error_is_one_sentence_and_leaves_the_view(top, block, text, sentence):
    before = state_of(top)
    if text is not None:
        look(top, text)
    else:
        top.controls["block"].value = block
        top.controls["open"].click()
        top.job.wait(60)
    assert (
        top.status.state == "error"
        and sentence in top.status.text
        and "Traceback" not in top.status.line.value
    )
    assert state_of(top) == before
    assert not top.controls["look"].disabled and top.controls["cancel"].disabled


def test_cancel_stops_before_the_next_layer_and_leaves_the_view(top, monkeypatch):
    before, reached, go = state_of(top), threading.Event(), threading.Event()
    ids = numbers.typed_ids

    def slow(*arguments):
        reached.set()
        assert go.wait(20)
        return ids(*arguments)

    monkeypatch.setattr(numbers, "typed_ids", slow)
    top.controls["text"].value = "something else"
    top.controls["look"].click()
    assert reached.wait(20) and top.job.running and top.controls["look"].disabled
    top.look("something else")
    assert "cancel the one that runs, or wait" in top.status.text
    top.controls["cancel"].click()
    go.set()
    top.job.wait(20)
    assert "cancelled" in top.status.text and state_of(top) == before and not top.controls["look"].disabled


def test_a_text_that_overflows_the_model_is_refused(top):
    loaded = top.loaded
    loaded.model.get_submodule(loaded.roles.embedding).weight.data.fill_(torch.nan)
    before = state_of(top)
    look(top, "x")
    assert top.status.state == "error" and "finite; got NaN or Inf before layer 0" in top.status.text
    assert state_of(top) == before


def test_token_text_never_becomes_markup(top):
    texts = [MALICIOUS[i % len(MALICIOUS)] for i in range(len(top.seen.texts))]
    top.state.view = "heat map"
    top._show(dataclasses.replace(top.seen, texts=texts))
    assert_safe(top)
    assert top.film.words == [shown_text(text) for text in texts]  # text to the page, and never markup
    assert top.plot.data[0].x[0] == "0 \u2068&lt;img\u2423src=x\u2423onerror=alert(1)&gt;\u2069"
    assert (
        top.plot.data[0].x[3] == "3 \u2068&#x27;&#34;&amp;quot;\u2069"
    )  # plotly decodes numbers and amp, lt, gt, but not quot


def test_the_profile_is_the_layers_own_and_a_click_on_it_goes_there(top):
    for layer, x in enumerate(top.seen.streams):
        magnitude = x.abs().flatten()
        drawn = [trace.y[layer] for trace in top.profile.data[1:5]]
        assert drawn == pytest.approx([*magnitude.topk(3).values.tolist(), float(magnitude.median())])
    assert top.profile.layout.yaxis.type == "log"
    event(top.profile, "plotly_click", [0], trace=1)
    assert top.state.layer == 0


def test_table_and_static_agree_with_the_view(heat):
    top = heat
    top.state.layer = 0
    figure = top.static()
    heat, profile = figure.axes[:2]
    assert "before layer 0" in heat.get_title()
    assert np.allclose(heat.images[0].get_array(), unpacked(top.plot.data[0].z), atol=1e-4)
    marked = top.table().loc[top.table()["massive"]].sort_values("token")
    assert np.array_equal(heat.collections[0].get_offsets(), marked[["token", "channel"]])
    assert [line.get_label() for line in profile.lines[:4]] == ["top 1", "top 2", "top 3", "median"]


def test_every_control_has_a_description_and_the_plots_keep_their_height(top):
    for control in top.controls.values():
        assert control.description
    assert {plot.layout.height for plot in (top.plot, top.profile)} == {420}


def test_a_wrong_model_is_refused_with_the_reason(store):
    with pytest.raises(ValueError, match=r"ModelSpec\.source must be"):
        explore.massive(model=ModelSpec(source="no such folder"), store=store)


def test_packed_arrays_are_short_decimals():
    array = np.array([[24816.123, -0.0123456789], [0.0, 1 / 3]], dtype=np.float32)
    assert packed(array).tolist() == [[24816.0, -0.012346], [0.0, 0.33333]]


def test_the_line_makes_the_same_view(top):
    assert top.take.line.endswith("tokens=128)")
    look(top, "a\nb\nsheep")
    for name, value in {"layer": 0, "token": 4, "rule": "ratio_8", "view": "heat map"}.items():
        setattr(top.state, name, value)
    again = remade(top)
    again.job.wait(60)
    assert again.state.trait_values() == top.state.trait_values() and state_of(again) == state_of(top)
    assert again.take.line == top.take.line == top.line() and "shown='a\\nb\\nsheep'" in top.line()


def test_a_token_is_picked_for_one_text_and_the_next_begins_at_its_largest(top):
    top.state.token = 5
    look(top, "a\nb")
    assert top.state.token == -1 and top.film.token == 1
