"""Generate: transformers' own words at 16 bits, the first token that departs, losses as a slow loop finds
them, cancel at any token.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from explorers import remade
from test_evaluate import save_lively

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.generate import widget as module
from dfrot_lab.explore.generate.numbers import continuation, first_difference, token_losses
from dfrot_lab.explore.generate.widget import EXACT, Generate
from dfrot_lab.model import loading
from dfrot_lab.rotate import dfrot
from dfrot_lab.score import build, perplexity
from dfrot_lab.show.theme import MASSIVE_COLOUR, safe, span, visible
from dfrot_lab.study.setting import Setting

PATIENCE = 120
PROMPT = "12 sheep and\n7 goats <b>"


@pytest.fixture
def setting(tmp_path: Path, text_file: Path) -> Setting:
    return Setting(
        model=save_lively(tmp_path / "lively"),
        corpus=str(text_file),
        windows=3,
        window=64,
        gptq_windows=2,
        builds=1,
        weights="rtn",
        steps=3,
    )


@pytest.fixture
def widget(setting: Setting, store: Store) -> Generate:
    made = Generate(setting, store)
    made.controls["prompt"].value, made.controls["tokens"].value = PROMPT, 8
    return made


def written(widget: Generate) -> Generate:
    widget.controls["write"].click()
    widget.job.wait(PATIENCE)
    assert not widget.job.running
    return widget


def test_full_precision_writes_what_transformers_writes(widget, setting):
    written(widget)
    loaded = loading.load_model(setting.model)
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    theirs = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0
    )[0, ids.shape[1] :]
    table = widget.table()
    assert table.loc[table["model"] == EXACT, "id"].tolist() == theirs.tolist()
    assert widget.status.text == "Done" and widget.bar.value == 1.0


def test_rotations_at_16_bits_write_the_same(widget):
    widget.controls["bits"].value, widget.controls["rotations"].value = "16-16-16", ("NR", "RO", "RH")
    table = written(widget).table()
    assert not table["departs"].any() and set(table["model"]) == {EXACT, "NR", "RO", "RH"}
    assert "as full precision" in widget.columns["RH"].value
    losses = widget.losses()
    for name in ("NR", "RO", "RH"):
        assert losses[name].to_numpy() == pytest.approx(losses[EXACT].to_numpy(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("bits", ["4-4-4", "16-4-16"])
def test_the_cache_changes_nothing_a_model_writes(setting, store, bits):
    """Greedy with transformers' cache, and by running the whole text again for every token: per-token
    quantization cannot tell them apart.
    """
    spec = setting.row(bits, setting.rotation("RH"))
    built = build.build(spec, store)
    ids = built.loaded.tokenizer(PROMPT, return_tensors="pt").input_ids[0]
    with build.quantized(built, spec), torch.inference_mode():
        fast, slow = continuation(built.loaded, ids, 8), ids
        for _ in range(8):
            slow = torch.cat(
                [slow, built.loaded.model(slow[None], use_cache=False).logits[0, -1].argmax()[None]]
            )
    assert fast == slow[len(ids) :].tolist()


def test_a_models_own_generation_settings_do_not_change_its_words(setting):
    """What many published models ask for: a penalty on repetition, a temperature, few candidates."""
    loaded = loading.load_model(setting.model)
    ids = loaded.tokenizer(PROMPT * 2, return_tensors="pt").input_ids[0]
    plain = continuation(loaded, ids, 12), continuation(loaded, ids, 12, temperature=1.0)
    own = {"do_sample": True, "repetition_penalty": 9.0, "temperature": 0.01, "top_p": 0.1, "top_k": 2}
    loaded.model.generation_config.update(**own)
    penalised = loaded.model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=12)
    assert penalised[0, len(ids) :].tolist() != plain[0], (
        "these settings change nothing: the test shows nothing"
    )
    assert (continuation(loaded, ids, 12), continuation(loaded, ids, 12, temperature=1.0)) == plain


def test_sampled_text_is_its_seeds(setting):
    """The same seed, the same text, whatever was drawn before; other draws of the process are as ever."""
    loaded = loading.load_model(setting.model)
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids[0]
    options = {"temperature": 1.5, "top_k": 20}
    before = torch.get_rng_state()
    texts = [continuation(loaded, ids, 12, seed=seed, **options) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert continuation(loaded, ids, 12, temperature=1.0, top_k=1) == continuation(loaded, ids, 12)


def test_a_sampled_text_is_drawn_from_the_models_own_probabilities(setting):
    """The first token of many seeds, against softmax(logits / temperature) of the likeliest five."""
    loaded = loading.load_model(setting.model)
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids[0]
    drawn = [continuation(loaded, ids, 1, temperature=0.7, top_k=5, seed=seed)[0] for seed in range(300)]
    with torch.no_grad():
        values, candidates = loaded.model(ids[None]).logits[0, -1].topk(5)
    wanted = (values / 0.7).softmax(0)
    found = torch.tensor([drawn.count(int(i)) / len(drawn) for i in candidates])
    assert set(drawn) <= set(candidates.tolist()) and len(set(drawn)) > 2
    assert float((found - wanted).abs().max()) < 0.1  # 3.4 standard errors of a share of one half


def test_the_widget_samples_with_its_controls(widget):
    widget.controls["rotations"].value = ("RH",)
    greedy = written(widget).table()["id"].tolist()
    widget.controls["temperature"].value = 1.5
    sampled = written(widget).table()["id"].tolist()
    assert written(widget).table()["id"].tolist() == sampled != greedy
    widget.controls["seed"].value = 1
    assert written(widget).table()["id"].tolist() != sampled
    widget.controls["top_k"].value = 1
    assert written(widget).table()["id"].tolist() == greedy


def test_losses_are_those_of_a_slow_loop(widget, setting, store):
    losses = written(widget).losses()
    ids = torch.tensor(widget.prompt_ids + widget.written[EXACT].ids)
    assert losses["text"].tolist() == [widget.text(i) for i in ids.tolist()][1:]
    for name in ("RO", "NR"):
        spec = widget.specs()[name]
        built = build.build(spec, store)
        with build.quantized(built, spec), torch.inference_mode():
            for place in range(1, len(ids)):
                logits = built.loaded.model(ids[None, :place], use_cache=False).logits[0, -1]
                assert losses[name][place - 1] == pytest.approx(
                    float(-logits.log_softmax(-1)[ids[place]]), rel=1e-3, abs=1e-4
                )


def test_the_mean_of_the_losses_is_the_windows_loss(setting, store):
    spec = setting.row("4-4-16", setting.rotation("RH"))
    built = build.build(spec, store)
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))
    with build.quantized(built, spec):
        assert sum(token_losses(built.loaded, ids)) / 39 == pytest.approx(
            perplexity.window_loss(built.loaded, ids), rel=1e-5
        )


def test_the_first_token_that_departs_is_marked(widget):
    table = written(widget).table()
    exact = table.loc[table["model"] == EXACT, "id"].tolist()
    departed = 0
    for name in ("NR", "RO", "RH"):
        own = table[table["model"] == name].reset_index()
        expected = next(
            (place for place, (a, b) in enumerate(zip(own["id"], exact, strict=True)) if a != b), None
        )
        assert own.index[own["departs"]].tolist() == ([] if expected is None else [expected])
        if expected is not None:
            departed += 1
            assert f"departs at token {expected + 1}" in widget.columns[name].value
            wrote = visible(widget.text(exact[expected]))
            title = f"token {expected + 1}, id {own['id'][expected]}; full precision wrote {wrote}"
            assert span(own["text"][expected], MASSIVE_COLOUR, title) in widget.columns[name].value
    assert departed, "no 4-bit model of these departs: the test shows nothing"


@pytest.mark.parametrize(
    ("ids", "reference", "place"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 5, 3], [1, 2, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([], [], None),
    ],
)
def test_first_difference(ids, reference, place):
    assert first_difference(ids, reference) == place


def test_dfrot_waits_for_its_refinement_and_gptq_for_its_weights(widget, setting, store):
    written(widget)
    assert "press Refine DFRot" in widget.columns["DFRot"].value and "DFRot" not in widget.written
    assert not widget.controls["refine"].disabled
    widget.controls["refine"].click()
    widget.job.wait(PATIENCE)
    assert dfrot.stored(setting.refine, store) is not None and widget.controls["refine"].disabled
    assert "DFRot" in written(widget).written
    widget.controls["weights"].value = "gptq"
    written(widget)
    assert set(widget.written) == {EXACT} and "GPTQ weights are not stored" in widget.columns["RH"].value
    perplexity.evaluate(setting.row("4-4-16", setting.rotation("RH"), weights="gptq"), store)
    assert set(written(widget).written) == {EXACT, "RH"}


def test_cancel_stops_at_a_token_and_the_widget_goes_on(widget):
    widget.controls["rotations"].value = ("RH",)
    show, shown = widget._show, []

    def cancel_at_third(result):
        show(result)
        shown.append(result.name)
        if len(shown) == 3:
            widget.controls["cancel"].click()

    widget._show = cancel_at_third
    written(widget)
    assert [(name, len(result.ids)) for name, result in widget.written.items()] == [(EXACT, 3)]
    assert "Stopped: what is written stays" in widget.status.text and not widget.controls["write"].disabled
    assert len(widget.losses()) == 0 and len(widget.table()) == 3
    widget._show = show
    assert {name: len(result.ids) for name, result in written(widget).written.items()} == {EXACT: 8, "RH": 8}


def test_models_are_built_once_while_the_settings_stay(widget, monkeypatch):
    built, real = [], build.build
    monkeypatch.setattr(
        build, "build", lambda spec, *more, **said: built.append(spec.bits) or real(spec, *more, **said)
    )
    monkeypatch.setattr(module, "ROOM", 0)
    widget.controls["rotations"].value = ("RO", "RH")
    written(widget)
    widget.controls["prompt"].value = "other words"
    written(widget)
    assert built == ["16-16-16", "4-4-16", "4-4-16"]
    widget.controls["bits"].value = "16-4-16"
    written(widget)
    assert built[3:] == ["16-4-16", "16-4-16"] and len(widget.kept) == 3
    monkeypatch.setattr(module, "ROOM", float("inf"))  # no memory to spare
    widget.controls["bits"].value = "4-4-4"
    written(widget)
    assert len(widget.kept) == 1


@pytest.mark.parametrize(
    ("prompt", "tokens", "sentence"),
    [("", 8, "prompt must have at least one token"), ("x" * 125, 8, "context of 128 tokens; got 125 and 8")],
)
def test_an_error_is_one_sentence(widget, prompt, tokens, sentence):
    widget.controls["prompt"].value, widget.controls["tokens"].value = prompt, tokens
    written(widget)
    assert (
        widget.status.state == "error"
        and sentence in widget.status.text
        and not widget.controls["write"].disabled
    )


def test_markup_in_prompt_and_tokens_is_inert(widget):
    widget.controls["prompt"].value = "<img src=x onerror=alert(1)>"
    written(widget)
    for column in widget.columns.values():
        assert "<img" not in column.value
    assert "&lt;img" in widget.columns[EXACT].value
    assert any("&gt;" in text for text in widget.plot.data[0].customdata[0])
    assert not any("<" in text for text in widget.plot.data[0].customdata[0])


def test_the_strip_shows_the_losses_and_so_does_the_static_figure(widget):
    widget.controls["rotations"].value = ("NR", "RO", "RH", "DFRot")  # the last is not refined: left out
    losses = written(widget).losses()
    strip = widget.plot.data[0]
    assert list(strip.y) == [EXACT, "NR", "RO", "RH"]
    assert (
        strip.z[2].tolist() == losses["RO"].tolist() and strip.zmax == losses[list(strip.y)].to_numpy().max()
    )
    assert widget.plot.layout.shapes[0].x0 == len(widget.prompt_ids) + 0.5
    image = widget.static().axes[0].collections[0]
    assert not plt.get_fignums(), "a notebook would show an open figure twice"
    assert image.get_array().shape == (4, len(losses))


def test_nothing_written_yet_says_so(widget):
    assert len(widget.table()) == 0 and len(widget.losses()) == 0
    with pytest.raises(ValueError, match="nothing is written yet"):
        widget.static()


def test_the_line_makes_the_same_view(widget):
    widget.state.rotations, widget.state.temperature = ("NR", "RH"), 0.5
    again = remade(widget)
    assert again.state.trait_values() == widget.state.trait_values() and again.specs() == widget.specs()


def test_a_token_that_is_picked_has_a_frame_in_the_strip_and_in_every_text(widget):
    widget.state.rotations = ("RH",)
    shown = {name for name, column in widget.columns.items() if column.layout.display is None}
    assert shown == {EXACT, "RH"}
    written(widget)
    place = len(widget.prompt_ids) + 2  # the second token that was written
    at = {"xs": [place], "ys": [EXACT], "point_indexes": [[0, place - 2]], "trace_indexes": [0]}
    clicked = {"event_type": "plotly_click", "points": at, "device_state": None, "selector": None}
    widget.plot._js2py_pointsCallback = clicked
    assert widget.state.token == widget.controls["token"].value == place
    _edge, frame = widget.plot.layout.shapes
    assert (frame.x0, frame.x1, frame.visible) == (place - 0.5, place + 0.5, True)
    for name in (EXACT, "RH"):
        second = widget.table().query("model == @name")["text"].iloc[1]
        framed = widget.columns[name].value.split("outline:2px solid", 1)[1]
        assert safe(second) in framed.split("</b>")[0] and framed.count("outline") == 0
    widget.state.token = 0
    assert not widget.plot.layout.shapes[1].visible and "outline" not in widget.columns["RH"].value
