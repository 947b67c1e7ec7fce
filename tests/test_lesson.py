"""The lesson's graders: right functions pass in every spelling, wrong and unfinished ones are refused with
the mistake named.
"""

import re
from collections.abc import Callable

import pytest
import torch
from conftest import tiny_model
from scipy.linalg import orthogonal_procrustes

from dfrot_lab.explore import lesson, verdicts
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


# ---- Hadamard matrices by doubling


def blocks(H, signs):
    a, b, c, d = signs
    return torch.cat([torch.cat([a * H, b * H], 1), torch.cat([c * H, d * H], 1)])


@pytest.mark.parametrize("signs", [(1, 1, 1, -1), (1, 1, -1, 1), (-1, 1, 1, 1)])
def test_every_doubling_with_an_odd_number_of_minuses_is_right(signs):
    assert lesson.check_double(lambda H: blocks(H, signs))


def test_the_kronecker_product_is_right_too():
    assert lesson.check_double(lambda H: torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), H))


@pytest.mark.parametrize(
    ("double", "reason"),
    [
        (lambda H: blocks(H, (1, 1, 1, 1)), "rows 0 and 1 of order 2 have the product 2"),
        (lambda H: blocks(H, (1, -1, -1, 1)), "have the product -2, not 0"),
        (lambda H: blocks(H, (1, 0, 0, 1)), "every entry must be 1 or -1"),
        (lambda H: blocks(H, (1, 1, 1, -1)) / 2**0.5, "every entry must be 1 or -1"),
        (lambda H: H, r"shape \(1, 1\), \(2, 2\) was expected"),
        (lambda H: blocks(H, (1, 1, 1, -1)) if len(H) < 12 else blocks(H, (1, 1, 1, 1)), "of order 24"),
        (lambda H: H.neg_(), "changed its input"),
    ],
)
def test_a_wrong_doubling_is_refused_with_the_rows_that_show_it(double, reason):
    verdict = lesson.check_double(double)
    assert not verdict and re.search(reason, verdict.sentence), verdict


# ---- the four questions


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def outliers(tokens, channels, times=10.0, part=1.0):
    """Rows of which this part has two channels so many times as large as the others."""
    x = noise(tokens, channels)
    x[: int(part * tokens), :2] *= times
    return x


def spiked(channels, snr, others=1.0):
    x = others * noise(channels)
    x[5] = snr * channels**0.5
    return x


@pytest.mark.parametrize("times", [8, 10, 15])
def test_outlier_channels_are_why_one_rotates(times):
    assert lesson.check_needs_rotation(lambda tokens, channels: outliers(tokens, channels, times))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (noise, "finds nothing to spread"),
        (lambda t, c: outliers(t, c, part=0.6), "some of these rows only"),
        (lambda t, c: torch.stack([spiked(c, 12)] * t), "these are massive tokens"),
        (lambda t, c: torch.zeros(t, c), "finds nothing to spread"),
        (lambda t, c: noise(t, c) / 0, "finite numbers"),
        (lambda t, c: noise(c, t), r"shape \(256, 64\)"),
    ],
)
def test_rows_that_do_not_need_a_rotation_are_refused(rows, reason):
    verdict = lesson.check_needs_rotation(rows)
    assert not verdict and re.search(reason, verdict.sentence), verdict


@pytest.mark.parametrize("snr", [9, 12, 18])  # the window of theory.paper_window(576) is 7.3 to 22.8
def test_a_spike_in_the_window_is_why_hadamard(snr):
    assert lesson.check_needs_hadamard(lambda channels: spiked(channels, snr))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (lambda c: spiked(c, 3), "NR > RO > RH: not to rotate is the worst"),
        (lambda c: spiked(c, 60), "RO > RH > NR: not to rotate is the best"),
        (torch.ones, "this is no spike"),
        (lambda c: torch.full((c,), float("nan")), "finite numbers"),
        (lambda c: spiked(c, 12)[None], r"shape \(1, 576\), \(576,\) was expected"),
    ],
)
def test_a_token_of_another_order_is_refused_with_its_order(row, reason):
    verdict = lesson.check_needs_hadamard(row)
    assert not verdict and re.search(reason, verdict.sentence), verdict


def polar(product):
    u, _, vt = torch.linalg.svd(product)
    return u @ vt


def procrustes(rows, rounded, weights):
    """By another library: rows and targets times the root of the weight."""
    by = weights.sqrt()[:, None]
    return torch.from_numpy(orthogonal_procrustes((by * rows).numpy(), (by * rounded).numpy())[0])


def test_procrustes_is_what_dfrot_does():
    assert lesson.check_next_rotation(procrustes)
    assert lesson.check_next_rotation(lambda x, y, w: polar(x.T @ (w[:, None] * y)))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, y, w: torch.linalg.lstsq(x, y).solution, "this is no rotation"),
        (lambda x, y, w: x.T @ (w[:, None] * y), "this is no rotation"),
        (lambda x, y, w: polar(x.T @ y), "count like the others"),
        (lambda x, y, w: polar(x.T @ (w[:, None] ** 2 * y)), "do not square them again"),
        (lambda x, y, w: polar(x.T @ (w[:, None] ** 0.5 * y)), "do not take their root"),
        (lambda x, y, w: polar(y.T @ (w[:, None] * x)), "back to the rows"),
        (lambda x, y, w: torch.linalg.qr(x.T @ (w[:, None] * y)).Q, "another one comes nearer"),
    ],
)
def test_what_is_not_the_nearest_rotation_is_refused(function, reason):
    verdict = lesson.check_next_rotation(function)
    assert not verdict and re.search(reason, verdict.sentence), verdict


def reflection(u, goal):
    normal = (u - goal) / (u - goal).norm()
    return torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(normal, normal)


def flat(u):
    return torch.ones_like(u) / len(u) ** 0.5


def turning(u):
    """To the all-ones direction by two reflections: not symmetric, unlike one."""
    first = torch.eye(len(u), dtype=u.dtype)[0]
    return reflection(u, first) @ reflection(first, flat(u))


@pytest.mark.parametrize(
    "point", [lambda u: reflection(u, flat(u)), lambda u: reflection(u, -flat(u)), turning]
)
def test_any_rotation_that_makes_u_an_offset_is_right(point):
    assert lesson.check_point(point)


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (lambda u: reflection(u, torch.eye(len(u), dtype=u.dtype)[0]), "a spike of it"),
        (lambda u: turning(u).T, "take the transpose"),
        (lambda u: torch.eye(len(u)), "the same number in every channel"),
        (lambda u: torch.outer(u, flat(u)), "this is no rotation"),
    ],
)
def test_a_rotation_that_makes_no_offset_of_u_is_refused(point, reason):
    verdict = lesson.check_point(point)
    assert not verdict and re.search(reason, verdict.sentence), verdict


# ---- predictions


def test_a_prediction_is_kept_as_it_was_first_said():
    mine = lesson.Predictions()
    assert "predicted nothing" in repr(mine.reveal("angles", ..., 8)) and mine.table().empty
    assert not mine.reveal("angles", 3, 8).right
    later = mine.reveal("angles", 8, 8)
    assert (later.said, later.right) == (3, False) and repr(later) == "angles: 8, you said 3"
    mine.reveal("order", "ro>nr > rh", "RO > NR > RH")
    assert mine.table().to_dict("index") == {
        "angles": {"said": "3", "measured": "8", "right": False},
        "order": {"said": "ro>nr > rh", "measured": "RO > NR > RH", "right": True},
    }


def test_a_measurement_that_changed_is_set_beside_what_was_said_first():
    mine = lesson.Predictions()
    mine.reveal("angles", 8, 8)
    assert not mine.reveal("angles", 8, 9).right


@pytest.mark.parametrize(
    ("said", "measured", "within", "right"),
    [
        (8, 8, 0.0, True),
        (8.0, 8, 0.0, True),
        (7, 8, 0.0, False),
        (5, 5.8, 0.25, True),
        (7.2, 5.8, 0.25, True),
        (7.3, 5.8, 0.25, False),
        (0, 0.1, 0.5, False),
        (-5.8, 5.8, 0.25, False),
        ("No", "no", 0.0, True),
        ({"fuse", "r1"}, {"fuse"}, 0.0, False),
        (["fuse", "untie"], {"untie", "fuse"}, 0.0, True),
        ("five", 5, 0.0, False),
        (None, 5, 0.0, False),
    ],
)
def test_when_a_prediction_is_right(said, measured, within, right):
    outcome = lesson.Predictions().reveal("", said, measured, within)
    assert outcome.right is right
    assert ("as you said" in repr(outcome)) is right


def test_sets_and_numbers_are_written_for_people():
    outcome = verdicts.Outcome("broken", set(), {"untie", "fuse"}, right=False)
    assert repr(outcome) == "broken: fuse, untie, you said none"
    assert repr(verdicts.Outcome("times", 2.0, 5.8123, right=False)) == "times: 5.81, you said 2"
