"""The lesson's graders: right functions pass in every spelling, wrong and unfinished ones are refused with
the mistake named.
"""

import re
from collections.abc import Callable

import pytest
import torch
from conftest import tiny_model

from dfrot_lab.explore import lesson
from dfrot_lab.model import surgery
from dfrot_lab.model.loading import linear


def by_rows(x, R):
    return torch.stack([sum(value * R[i] for i, value in enumerate(row)) for row in x])


def codes(bits):
    return 2 ** (bits - 1) - 1


def step(x, bits):
    return x.abs().max() / codes(bits)


def past_the_codes(x, largest):
    size = x.abs().max() / largest
    return (x / size).round() * size


def rounded(x, bits):
    return x if not x.any() else (x / step(x, bits)).round() * step(x, bits)


def on_grid(x, size, bits):
    """x on the grid of that step, its ends where the codes end."""
    return (x / size).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * size


def in_place(gain, weight):
    return weight.mul_(gain)


RIGHT: list[tuple[Callable, tuple[Callable, ...]]] = [
    (lesson.check_rotate_row, (lambda x, R: x @ R,)),
    (lesson.check_rotate_row, (by_rows,)),
    (lesson.check_quantize, (rounded,)),
    (lesson.check_fuse_norm, (lambda gain, weight: weight * gain,)),
    (lesson.check_fuse_norm, (lambda gain, weight: weight @ torch.diag(gain),)),
    (lesson.check_rotate_weights, (lambda weight, R: weight @ R, lambda weight, R: (weight.T @ R).T)),
]


@pytest.mark.parametrize(("grader", "functions"), RIGHT)
def test_right_functions_pass(grader, functions):
    verdict = grader(*functions)
    assert verdict and verdict.right
    assert repr(verdict).startswith("Right: ")


WRONG: list[tuple[Callable, Callable, str]] = [
    (lesson.check_rotate_row, lambda x, R: x @ R.T, "backwards"),
    (lesson.check_rotate_row, lambda x, R: x, "nothing was turned"),
    (lesson.check_rotate_row, lambda x, R: R @ x, "mixes tokens"),
    (lesson.check_rotate_row, lambda x, R: x * R, "entry by entry"),
    (lesson.check_rotate_row, lambda x, R: 2 * x @ R, "not x @ R"),
    (lesson.check_rotate_row, lambda x, R: (x @ R)[0], r"shape \(6,\), \(6, 6\) was expected"),
    (lesson.check_quantize, lambda x, bits: on_grid(x, x.abs().max() / 2 ** (bits - 1), bits), "divided by"),
    (lesson.check_quantize, lambda x, bits: past_the_codes(x, 2 ** (bits - 1)), "needs one more"),
    (lesson.check_quantize, lambda x, bits: (x / step(x, bits)).round(), "returned the codes"),
    (lesson.check_quantize, lambda x, bits: (x / step(x, bits)).trunc() * step(x, bits), "cut off"),
    (lesson.check_quantize, lambda x, bits: (x / step(x, bits)).floor() * step(x, bits), "rounded down"),
    (lesson.check_quantize, lambda x, bits: on_grid(x, x.max() / codes(bits), bits), "sign and all"),
    (lesson.check_quantize, lambda x, bits: x, "nothing was rounded"),
    (lesson.check_quantize, lambda x, bits: x.round(), r"step must be max\|x\| / 7"),
    (lesson.check_quantize, lambda x, bits: rounded(x, 4), r"at 3 bits"),
    (lesson.check_quantize, lambda x, bits: (x / step(x, bits)).round() * step(x, bits), "must stay zeros"),
    (lesson.check_fuse_norm, lambda gain, weight: weight / gain, "divided"),
    (lesson.check_fuse_norm, lambda gain, weight: weight, "came back as it was"),
    (lesson.check_fuse_norm, lambda gain, weight: weight + gain, "added"),
    (lesson.check_fuse_norm, lambda gain, weight: weight * gain[:, None], "scaled the rows"),
    (lesson.check_fuse_norm, lambda gain, weight: weight * gain**2, "not what the layer gave before"),
    (lesson.check_fuse_norm, in_place, "changed its input"),
    (lesson.check_fuse_norm, lambda gain, weight: None, "returned nothing"),
    (lesson.check_fuse_norm, lambda gain, weight: [weight * gain], "returned a list"),
    (lesson.check_fuse_norm, lambda gain: gain, "raised TypeError"),
    (lesson.check_fuse_norm, lambda gain, weight: weight @ gain[:3], "raised RuntimeError"),
]  # fmt: skip


@pytest.mark.parametrize(("grader", "function", "reason"), WRONG)
def test_wrong_functions_are_refused_with_the_reason(grader, function, reason):
    verdict = grader(function)
    assert not verdict
    assert repr(verdict).startswith("Not yet: ")
    assert "\n" not in verdict.sentence
    assert re.search(reason, verdict.sentence), verdict


WEIGHTS: list[tuple[Callable, Callable, str]] = [
    (lambda weight, R: weight @ R.T, lambda weight, R: R.T @ weight, "reader turns backwards"),
    (lambda weight, R: weight, lambda weight, R: R.T @ weight, "reader was not changed"),
    (
        lambda weight, R: R.T @ weight if len(weight) == 8 else weight @ R,
        lambda weight, R: R.T @ weight,
        "reader was turned on its output side",
    ),
    (lambda weight, R: weight @ R, lambda weight, R: R @ weight, "writer turns backwards"),
    (lambda weight, R: weight @ R, lambda weight, R: weight, "writer was not changed"),
    (
        lambda weight, R: weight @ R,
        lambda weight, R: weight @ R if weight.shape[1] == 8 else R.T @ weight,
        "writer was turned on its input side",
    ),
]


@pytest.mark.parametrize(("reader", "writer", "reason"), WEIGHTS)
def test_wrong_rotations_of_weights_are_refused_with_the_reason(reader, writer, reason):
    verdict = lesson.check_rotate_weights(reader, writer)
    assert not verdict
    assert reason in verdict.sentence


def test_a_defect_of_the_grader_itself_is_not_hidden():
    """What no student's function raises by being wrong goes through."""

    def stopped(x, R):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lesson.check_rotate_row(stopped)


def test_what_the_grader_calls_right_is_what_surgery_does_to_a_model():
    """The right answers, applied to a model by hand, give the weights that surgery gives."""
    loaded, by_hand = tiny_model(), tiny_model()
    surgery.prepare(loaded)
    layer, own = loaded.layers[0], by_hand.layers[0]
    gain = linear(own, "input_layernorm").weight
    fused = linear(own, "self_attn.q_proj").weight.double() * gain
    assert torch.equal(linear(layer, "self_attn.q_proj").weight, fused.float())
    assert lesson.check_fuse_norm(lambda gain, weight: weight * gain)
