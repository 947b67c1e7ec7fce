"""Graders for the lesson: each calls a student's own function on random inputs and says in one sentence what
is right or what is wrong.

Nothing is run from text: a grader takes the function itself. What it is compared with is the package's own
function, or the rule that defines it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize, quantize
from dfrot_lab.model.surgery import fuse_norm
from dfrot_lab.recipe.specs import QuantSpec, RotationSpec

CLOSE = 1e-9
"""Largest relative difference from the right answer, in float64."""
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a function that is not finished may raise."""
Answer = Callable[..., Any]


@dataclass(frozen=True)
class Verdict:
    """Whether the function is right, and the sentence that says so or what is wrong with it."""

    right: bool
    sentence: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"{'Right' if self.right else 'Not yet'}: {self.sentence}"


class _Wrong(Exception):
    """What is wrong, in the words of the verdict."""


def _graded(check: Callable[[], None], praise: str) -> Verdict:
    try:
        check()
    except _Wrong as wrong:
        return Verdict(False, str(wrong))
    return Verdict(True, praise)


def _call(function: Answer, wanted: Tensor, *inputs: Any) -> Tensor:
    """What the function makes of `inputs`, if it is a tensor of `wanted`'s shape and the inputs are as they
    were.
    """
    before = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    try:
        found = function(*inputs)
    except MISTAKES as error:
        raise _Wrong(f"your function raised {type(error).__name__}: {error}.") from error
    if found is None:
        raise _Wrong("your function returned nothing: end it with return.")
    if not isinstance(found, Tensor):
        raise _Wrong(f"your function returned a {type(found).__name__}, a tensor was expected.")
    for old, new in zip(before, inputs, strict=True):
        if isinstance(old, Tensor) and not torch.equal(old, new):
            raise _Wrong(
                "your function changed its input: make a new tensor, others may still read the old one."
            )
    if found.shape != wanted.shape:
        raise _Wrong(
            f"your function returned shape {tuple(found.shape)}, {tuple(wanted.shape)} was expected."
        )
    return found.detach().double()


def _same(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= CLOSE * wanted.norm().clamp(min=1e-300))


def _first(found: Tensor, wanted: Tensor, known: dict[str, Tensor], otherwise: str) -> None:
    """Nothing where the answer is right; else the known mistake it equals, or the general sentence."""
    if _same(found, wanted):
        return
    for sentence, wrong in known.items():
        if wrong.shape == wanted.shape and _same(found, wrong):
            raise _Wrong(sentence)
    raise _Wrong(otherwise)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check_rotate_row(function: Answer) -> Verdict:
    """Grade `rotate_row(x, R)`: rows x (tokens, channels) turned by R (channels, channels), x @ R."""

    def check() -> None:
        for seed, tokens in enumerate((6, 1, 3)):
            x, R = _random(tokens, 6, seed=seed), rotations.make(RotationSpec(kind="RO", seed=seed), 6)
            known = {
                "you turned backwards: that is x @ R.T, which undoes R. In this house a row is turned by x @ R.": x
                @ R.T,
                "nothing was turned: the rows came back as they were.": x,
            }
            if tokens == 6:
                known["you put R on the left, R @ x: that mixes tokens, not channels."] = R @ x
                known[
                    "you multiplied entry by entry (*): a rotation mixes channels, so use the matrix product @."
                ] = x * R
            _first(
                _call(function, x, x, R),
                x @ R,
                known,
                "the rows are not x @ R: try x = (1, 0, ...), which must come back as R's first row.",
            )

    return _graded(check, "x @ R turns every row and keeps its length.")


def check_quantize(function: Answer) -> Verdict:
    """Grade `quantize_row(x, bits)`: one row x (channels,) rounded to its symmetric grid of that many bits,
    as values (not codes).
    """

    def check() -> None:
        for seed, bits in enumerate((4, 3, 8)):
            spec, top = QuantSpec(bits=bits), 2 ** (bits - 1) - 1
            for x in (_random(16, seed=seed), -_random(16, seed=seed).abs()):
                scale = x.abs().max() / top
                wide = x.abs().max() / (top + 1)
                known = {
                    f"you divided by 2^(bits-1) = {top + 1}: at {bits} bits the codes end at {top}, and the largest entry needs one more.": (
                        (x / wide).round() * wide
                    ),
                    f"you divided by 2^(bits-1) = {top + 1}: the largest code is {top}, so the largest entry would not be on the grid.": (
                        (x / wide).round().clamp(-top - 1, top) * wide
                    ),
                    "you returned the codes: multiply them by the step again.": quantize(x[None], spec)
                    .codes[0]
                    .double(),
                    "you cut off instead of rounding to the nearest: use round.": (x / scale).trunc() * scale,
                    "you rounded down instead of to the nearest: use round.": (x / scale).floor() * scale,
                    "the step came from the largest entry, sign and all: take the largest absolute value.": (
                        (x / (x.max() / top)).round().clamp(-top - 1, top) * (x.max() / top)
                    ),
                    "nothing was rounded: the row came back as it was.": x,
                }
                general = f"at {bits} bits the step must be max|x| / {top}, and every entry its nearest whole multiple."
                _first(_call(function, x, x, bits), fake_quantize(x[None], spec)[0], known, general)
        zeros = torch.zeros(4, dtype=torch.float64)
        if not bool((_call(function, zeros, zeros, 4) == 0).all()):
            raise _Wrong("a row of zeros must stay zeros: its step is 0, and 0 / 0 is not a number.")

    return _graded(check, "step max|x| / (2^(bits-1) - 1), rounded to the nearest, on every row tried.")


def check_fuse_norm(function: Answer) -> Verdict:
    """Grade `fuse_norm(gain, weight)`: the weight (out, channels) of a linear that takes over the gain
    (channels,) of the norm it reads.
    """

    def check() -> None:
        for seed, out in enumerate((8, 5, 3)):
            gain, weight = 1 + 0.5 * _random(8, seed=seed), _random(out, 8, seed=seed + 10)
            known = {
                "you divided by the gain: the norm no longer multiplies by it, so the linear must.": weight
                / gain,
                "the gain is not in it: the weight came back as it was.": weight,
                "you added the gain: it is a factor.": weight + gain,
            }
            if out == len(gain):
                known[
                    "you scaled the rows, the linear's outputs: the gain belongs to its inputs, the columns."
                ] = weight * gain[:, None]
            found = _call(function, weight, gain, weight)
            _first(
                found,
                _fused(gain, weight),
                known,
                "norm(x) without its gain, times your weight, is not what the layer gave before.",
            )

    return _graded(
        check,
        "W diag(g): column by column the linear takes over what the norm gives up, and its outputs stay.",
    )


def check_rotate_weights(reader: Answer, writer: Answer) -> Verdict:
    """Grade `reader(weight, R)` for linears that read the residual stream (out, channels), `writer(weight,
    R)` for those that write it (channels, n).

    Rows: x @ W.T. A reader gets x @ R and must give what it gave before; a writer's output must come out
    times R.
    """

    def check() -> None:
        R = rotations.make(RotationSpec(kind="RO", seed=7), 8)
        for seed, other in enumerate((8, 5)):
            read, write = _random(other, 8, seed=seed), _random(8, other, seed=seed + 20)
            known = {
                "the reader turns backwards: (x R)(W R.T).T is not x W.T; it needs W @ R.": read @ R.T,
                "the reader was not changed.": read,
                **(
                    {
                        "the reader was turned on its output side: R belongs to its inputs, the columns.": R.T
                        @ read
                    }
                    if other == 8
                    else {}
                ),
            }
            _first(
                _call(reader, read, read, R),
                read @ R,
                known,
                "the reader does not undo R: (x @ R) @ W_new.T must be x @ W.T.",
            )
            known = {
                "the writer turns backwards: its output would come out times R.T; it needs R.T @ W.": R
                @ write,
                "the writer was not changed.": write,
                **(
                    {
                        "the writer was turned on its input side: R belongs to its outputs, the rows.": write
                        @ R
                    }
                    if other == 8
                    else {}
                ),
            }
            _first(
                _call(writer, write, write, R),
                R.T @ write,
                known,
                "the writer's output must come out times R: h @ W_new.T must be h @ W.T @ R.",
            )

    return _graded(
        check, "readers take W @ R, writers R.T @ W: together they leave every logit where it was."
    )


def _fused(gain: Tensor, weight: Tensor) -> Tensor:
    """What the package's own surgery makes of a norm's gain and the linear behind it."""
    norm, linear = nn.Linear(1, 1), nn.Linear(1, 1)
    norm.weight, linear.weight = (
        nn.Parameter(value.clone(), requires_grad=False) for value in (gain, weight)
    )
    fuse_norm(norm, [linear])
    return linear.weight.detach()
