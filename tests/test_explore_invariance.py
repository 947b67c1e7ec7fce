"""The invariance bench: each of the 512 sets of steps is right or wrong as its reasons say, refusals are
shown, weights come back.
"""

import itertools

import pytest
import torch
from conftest import save_tiny, tiny_model
from explorers import remade

from dfrot_lab.explore.invariance import numbers
from dfrot_lab.explore.invariance.numbers import (
    NEW_TOKENS,
    STEPS,
    TOLERANCE,
    WHY,
    Bench,
    Outcome,
    Steps,
    faults,
)  # fmt: skip
from dfrot_lab.explore.invariance.widget import Invariance, text_html, verdict_html
from dfrot_lab.model import surgery
from dfrot_lab.recipe.specs import ModelSpec, RotationSpec
from dfrot_lab.show import theme
from dfrot_lab.show.block import WIRES

PROMPT = "hello\nthere, sheep\nand goats"
SEEN = 50 * TOLERANCE
"""The least of the wrong sets is well above the tolerance, or a reason would depend on luck."""


def every_set() -> list[Steps]:
    return [
        Steps(**dict(zip(STEPS, flags, strict=True)))
        for flags in itertools.product([False, True], repeat=len(STEPS))
    ]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_set_of_steps_moves_the_logits_exactly_where_there_is_a_reason(tied, monkeypatch):
    monkeypatch.setattr(numbers, "continuation", lambda *_: [])  # the logits alone: 512 texts take minutes
    bench = Bench(tiny_model(tied=tied))
    outcomes = [bench.measure(steps, PROMPT) for steps in every_set()]
    right = [o for o in outcomes if not o.faults]
    wrong = [o for o in outcomes if o.faults]
    assert len(right) + len(wrong) == 512 and len(right) == (48 if tied else 80)
    assert max(o.error for o in right) <= TOLERANCE
    assert min(o.error for o in wrong) > SEEN
    assert {name for o in wrong for name in o.faults} == set(WHY) - (set() if tied else {"tied"})
    assert all(o.wires for o in wrong) and not any(o.wires for o in right)
    assert all(not o.broken for o in right) and all(o.broken for o in wrong)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_too(family):
    bench = Bench(tiny_model(family, tied=True))
    everything = Steps(
        untie=True,
        fuse=True,
        r1=True,
        r2=True,
        r3=True,
        r4_fused=True,
        r4_online=True,
        rotation=RotationSpec(kind="RO", seed=3),
    )
    assert not bench.measure(everything, PROMPT).broken
    assert bench.measure(Steps(r4_online=True), PROMPT).broken


def test_the_packages_refusal_is_shown_and_the_step_done_all_the_same():
    bench = Bench(tiny_model(tied=True))
    fused = bench.measure(Steps(fuse=True), PROMPT)
    assert (
        "embeddings must be untied (surgery.untie) first" in fused.refusals[0]
        and WHY["tied"] in fused.verdict
    )
    turned = bench.measure(Steps(untie=True, r1=True), PROMPT)
    assert "norm gains must be fused (surgery.fuse_norms) before R1" in turned.refusals[
        0
    ] and turned.faults == ("gain",)
    assert turned.refusals[0] in turned.verdict
    assert not bench.measure(Steps(untie=True, fuse=True, r1=True), PROMPT).refusals


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_weights_come_back_to_the_bit(tied):
    loaded = tiny_model(tied=tied)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    bench = Bench(loaded)
    for steps in (
        Steps(untie=True, centre=True, fuse=True, drop=True, r1=True, r2=True, r4_fused=True),
        Steps(r2=True),
        Steps(fuse=True, r1=True),
    ):
        bench.apply(steps)
        assert any(
            not torch.equal(p, before[name]) for name, p in loaded.model.named_parameters() if name in before
        )
    bench.apply(Steps())
    after = dict(loaded.model.named_parameters())
    assert after.keys() == before.keys() and surgery.is_tied(loaded) == tied
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_the_shortcut_past_r1_gives_the_same_weights():
    """R2 and R4 switched on and off on top of one R1, against a bench that starts over."""
    bench = Bench(tiny_model(tied=True))
    base = {"untie": True, "fuse": True, "r1": True}
    for extra in ({"r2": True}, {"r4_fused": True}, {}, {"r2": True, "r4_fused": True}):
        bench.apply(Steps(**base, **extra))
        fresh = Bench(tiny_model(tied=True))
        fresh.apply(Steps(**base, **extra))
        wanted = fresh.loaded.model.state_dict()
        assert all(
            torch.equal(tensor, wanted[name]) for name, tensor in bench.loaded.model.state_dict().items()
        )


def test_the_text_is_the_models_own_and_greedy():
    loaded = tiny_model()
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    wanted = []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            token = int(loaded.model(ids).logits[0, -1].argmax())
            wanted.append(loaded.tokenizer.decode([token]))
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert Bench(loaded).measure(Steps(), PROMPT).tokens == tuple(wanted)


def felt(steps: Steps) -> dict[str, torch.Tensor]:
    """What passes in the first layer once `steps` were taken, by the wire that it hangs on, and the logits."""
    loaded, seen = tiny_model(tied=True), {}
    Bench(loaded).apply(steps)
    layer = loaded.layers[0]
    made_by = {
        "stream": loaded.model.model.embed_tokens,
        "read": layer.self_attn.q_proj,
        "down": layer.mlp.down_proj,
    }
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, name=name: seen.setdefault(name, out))
        for name, part in made_by.items()
    ]
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad(), surgery.online(loaded, r3=steps.r3, r4=steps.r4_online):
        seen["head"] = loaded.model(ids).logits
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("fault", "before", "steps"),
    [
        ("tied", {}, {"untie": False}),
        ("gain", {"r1": True}, {"r1": True, "fuse": False}),
        ("drop", {}, {"fuse": False, "drop": True}),
        ("centre", {}, {"centre": True}),
        ("r4_fused", {}, {"r4_online": False}),
        ("r4_online", {}, {"r4_fused": False}),
    ],
)
def test_a_fault_is_first_felt_on_the_wire_that_turns_red(fault, before, steps):
    right = {"untie": True, "fuse": True, "r2": True, "r3": True, "r4_fused": True, "r4_online": True}
    kept, moved = felt(Steps(**right | before)), felt(Steps(**right | steps))
    names = [name for name in WIRES if not torch.allclose(kept[name], moved[name], atol=1e-4)]
    assert names[0] == numbers.WHERE[fault][0] and names[-1] == "head"
    assert faults(Steps(**right | steps), tied=True) == [fault]


def test_names_and_reasons():
    assert Steps().name == "untouched"
    assert Steps(untie=True, r1=True, rotation=RotationSpec(kind="RO")).name == "untie + R1 (RO)"
    assert faults(Steps(fuse=True), tied=True) == ["tied"] and not faults(Steps(fuse=True), tied=False)
    nan = Outcome(Steps(), float("nan"), (), (), ())
    assert nan.broken, "logits that are not numbers are not within a tolerance"


def test_token_text_is_escaped_and_the_sign_needs_no_colour():
    bad = Outcome(Steps(), 1.0, ("<img src=x onerror=alert(1)>", "\n"), (), ("because <b>",))
    good = Outcome(Steps(), 0.0, ("a", "\n"), (), ())
    shown = text_html(bad, good) + verdict_html(bad)
    assert "<img" not in shown and "because <b>" not in shown and "\u21b5" in shown
    assert "\u2718 Broken" in verdict_html(bad) and "\u2714 Unchanged" in verdict_html(good)


# ---- the widget


def opened(**options) -> Invariance:
    view = Invariance(loaded=tiny_model(tied=True, **options))
    view.wait(60)
    return view


def test_the_layers_picture_has_what_is_on_and_red_where_it_breaks():
    view = opened()
    view.set(untie=True, fuse=True, r1=True, r4_fused=True)
    view.wait(60)
    assert view.block.value.count('class="R1"') == 9 and 'class="R2"' not in view.block.value
    (down,) = [path for path in view.block.value.split("<path ") if 'class="wire down"' in path]
    assert theme.MASSIVE_COLOUR in down and view.block.value.count(theme.MASSIVE_COLOUR) == 1
    view.set(r4_online=True)
    view.wait(60)
    assert theme.MASSIVE_COLOUR not in view.block.value


def test_a_switch_is_answered_in_plot_table_and_text():
    view = opened()
    assert "dfrot-invariance" in view._dom_classes and all(
        view.controls[name].description for name in view.controls
    )
    view.controls["untie"].value = True
    view.controls["r1"].value = True
    outcome = view.wait(60)
    assert outcome.steps == Steps(untie=True, r1=True) and outcome.broken
    assert view.status.text == "untie + R1 (RH): broken" and WHY["gain"].split(":")[0] in view.verdict.value
    assert (
        view.plot.data[0].x[-1] == pytest.approx(outcome.error)
        and view.plot.data[0].marker.color[-1] == "#CC2936"
    )
    view.controls["correct"].click()
    assert not view.wait(60).broken
    view.controls["clear"].click()
    assert view.wait(60).error == 0
    table = view.table()
    assert table["steps"].iloc[0] == "untouched" and table["why"].str.contains("do not commute").any()
    assert view.static().axes[0].get_xscale() == "log"


def test_the_figure_is_changed_in_place_and_shows_the_last_trials():
    view = opened()
    plot = view.plot
    for seed in range(10):
        view.set(untie=True, fuse=True, r1=True, seed=seed)
        view.wait(60)
    assert view.plot is plot and len(plot.data) == 1 and len(plot.data[0].x) == 8
    assert len(view.table()) == 11


def test_an_empty_prompt_is_one_clear_sentence_and_the_bench_goes_on():
    view = opened()
    view.controls["prompt"].value = ""
    view.job.wait(60)
    assert (
        view.status.state == "error" and "prompt must have at least one token; got none" in view.status.text
    )
    view.controls["prompt"].value = "again"
    assert view.wait(60).error == 0 and view.status.state == "ready"


def test_a_prompt_beyond_the_models_context_is_refused_before_the_model_reads_it():
    view = opened()
    view.controls["prompt"].value = "x" * 100_000
    view.job.wait(60)
    context = view.bench.loaded.context
    assert f"context of {context} tokens; got 100" in view.status.text and view.status.state == "error"
    assert len(view.outcomes) == 1


def test_a_model_that_cannot_be_loaded_is_said(tmp_path, store):
    view = Invariance(ModelSpec(source=str(tmp_path / "nowhere")), store=store)
    view.job.wait(60)
    assert view.status.state == "error" and "ModelSpec.source must be" in view.status.text
    with pytest.raises(TimeoutError, match="no trial ended"):
        view.wait(1)


def test_a_spec_is_loaded_in_the_background(tmp_path, store):
    view = Invariance(save_tiny(tmp_path / "m"), store=store)
    assert view.wait(60).error == 0


def test_the_line_makes_the_same_view():
    view = opened()
    view.set(untie=True, r1=True, kind="RO")
    view.wait(60)
    again = remade(view, loaded=tiny_model(tied=True))
    assert again.wait(60).steps == view.outcomes[-1].steps and again.outcomes[-1].broken
    assert again.state.trait_values() == view.state.trait_values() and "(loaded=loaded).at(" in view.line()
