"""The picture of one layer: a model's own linears, the rotations that are on, red wires; nothing that runs."""

import re
from xml.etree import ElementTree

import pytest

from dfrot_lab.model.families import FAMILIES
from dfrot_lab.model.shapes import Shape
from dfrot_lab.show.block import ACTING, WIRES, block_svg
from dfrot_lab.show.theme import MASSIVE_COLOUR

SHAPE = Shape(channels=64, layers=3, mlp=96, heads=4, kv_heads=2, head=16, vocabulary=100)


def drawn(family="LlamaForCausalLM", **how):
    """The picture as a tree without namespaces, its words and how often each class is in it."""
    svg = block_svg(FAMILIES[family], SHAPE, **how)
    tree = ElementTree.fromstring(re.sub(r' xmlns="[^"]+"', "", svg, count=1))
    words = [element.text for element in tree.iter("text")]
    marks = [
        element.get("class") for element in tree.iter() if element.get("class") in ("R1", "R2", "R3", "R4")
    ]
    return tree, words, marks


@pytest.mark.parametrize("family", FAMILIES)
def test_its_boxes_are_the_models_own_linears(family):
    tree, words, _ = drawn(family)
    roles = FAMILIES[family]
    names = [name for _, _, linears in roles.feeds for name in linears] + [roles.o, roles.down]
    assert {name.rsplit(".", 1)[-1] for name in names} <= set(words)
    assert ("no norm" in words) == any(not norm for _, norm, _ in roles.feeds)
    assert any("experts" in word for word in words) == bool(roles.experts)
    assert any(word.startswith("3 layers of 64 channels") for word in words)
    assert not list(tree.iter("script")) and not any("href" in key for e in tree.iter() for key in e.attrib)


def test_each_rotation_is_where_it_acts_and_only_if_it_is_on():
    assert drawn(on=())[2] == []
    each = {name: drawn(on=[name])[2] for name in ACTING}
    assert {name: len(marks) for name, marks in each.items()} == {
        "R1": 9,  # the embedding, q, k, v, o, gate, up, down, lm_head
        "R2": 2,  # v and o
        "R3": 2,  # queries and keys
        "R4": 1,  # down
        "R4 online": 1,
    }
    assert sorted(drawn()[2]) == sorted(mark for marks in each.values() for mark in marks)
    online = drawn("Gemma2ForCausalLM", on=["R1"])[2]
    assert len(online) == 7, "two products, and their inverse in the five linears that read them"
    assert len(drawn("Phi3ForCausalLM", on=["R1"])[2]) == 6, "q, k, v are one linear, gate and up another"


@pytest.mark.parametrize("name", WIRES)
def test_a_broken_wire_is_red_and_no_other(name):
    red = {e.get("class") for e in drawn(broken=[name])[0].iter("path") if e.get("stroke") == MASSIVE_COLOUR}
    assert red == {f"wire {name}"}


def test_circles_are_where_values_are_rounded():
    circles = [word for word in drawn()[1] if word == "Q"]
    assert len(circles) == 7, "what q, k, v read; keys; values; what o, gate and up, down read; the legend"
    assert "Q" not in drawn(rounded=False)[1]


@pytest.mark.parametrize(("field", "said"), [("on", ["R5"]), ("broken", ["tail"])])
def test_another_name_is_an_error_that_says_the_field(field, said):
    with pytest.raises(ValueError, match=f"{field} must be of .*; got {said[0]}"):
        block_svg(FAMILIES["LlamaForCausalLM"], SHAPE, **{field: said})
