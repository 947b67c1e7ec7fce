"""Graders for the lesson: each calls a student's function on random inputs and says what is wrong, if any."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import RotationSpec

CLOSE = 1e-9  # largest relative difference from the right answer, in float64
_MATHS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
UNFINISHED = (*_MATHS, AssertionError, AttributeError, NameError, OSError)  # of a function not finished
Answer = Callable[..., Any]
Inputs = tuple[Any, ...]
Mistakes = dict[str, Tensor]  # wrong results by their sentences, cut to fit where only square inputs do


@dataclass(frozen=True)
class Verdict:
    """Whether the function is right, and the sentence that says so or what is wrong with it."""

    right: bool
    sentence: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"{'Right' if self.right else 'Not yet'}: {self.sentence}"


def _grade(trials: Iterable[tuple[Answer, Inputs, Tensor, Mistakes, str]], praise: str) -> Verdict:
    fault = next(filter(None, (_fault(*trial) for trial in trials)), "")
    return Verdict(not fault, fault or praise)


def _fault(function: Answer, inputs: Inputs, wanted: Tensor, mistakes: Mistakes, otherwise: str) -> str:
    """What is wrong with one call of a student's function, or ''."""
    before = copy.deepcopy(inputs)
    try:
        found = function(*inputs)
    except UNFINISHED as error:
        return f"your function raised {type(error).__name__}: {error}."
    if found is None:
        return "your function returned nothing: end it with return."
    if not isinstance(found, Tensor):
        return f"your function returned a {type(found).__name__}, a tensor was expected."
    tensors = [pair for pair in zip(before, inputs, strict=True) if isinstance(pair[0], Tensor)]
    if not all(torch.equal(*pair) for pair in tensors):
        return "your function changed its input: make a new tensor, others may still read the old one."
    if found.shape != wanted.shape:
        shape, expected = tuple(found.shape), tuple(wanted.shape)
        return f"your function returned shape {shape}, {expected} was expected."
    if _same(found, wanted):
        return ""
    return next((sentence for sentence, wrong in mistakes.items() if _same(found, wrong)), otherwise)


def _same(found: Tensor, wanted: Tensor) -> bool:
    return bool((found.detach().double() - wanted).norm() <= CLOSE * wanted.norm().clamp(min=1e-300))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check_rotate_row(function: Answer) -> Verdict:
    """Grade `rotate_row(x, R)`: rows x (tokens, channels) turned by R (channels, channels), x @ R."""
    otherwise = "the rows are not x @ R: try x = (1, 0, ...), which must come back as R's first row."
    undone = "you turned backwards: that is x @ R.T, which undoes R. In this house a row is turned by x @ R."
    entries = "you multiplied entry by entry (*): a rotation mixes channels, so use the matrix product @."
    trials = []
    for seed, tokens in enumerate((6, 1, 3)):
        x, R = _random(tokens, 6, seed=seed), rotations.make(RotationSpec(kind="RO", seed=seed), 6)
        mistakes = {
            undone: x @ R.T,
            "nothing was turned: the rows came back as they were.": x,
            "you put R on the left, R @ x: that mixes tokens, not channels.": R[:tokens, :tokens] @ x,
            entries: x * R[:tokens],
        }
        trials.append((function, (x, R), x @ R, mistakes, otherwise))
    return _grade(trials, "x @ R turns every row and keeps its length.")


def check_quantize(function: Answer) -> Verdict:
    """Grade `quantize_row(x, bits)`: a row x (channels,) on its symmetric grid, as values, not codes."""
    trials = []
    for seed, bits in enumerate((4, 3, 8)):
        top = 2 ** (bits - 1) - 1
        rule = f"the step must be max|x| / {top}, and every entry its nearest whole multiple."
        for x in (_random(16, seed=seed), -_random(16, seed=seed).abs()):
            wanted, mistakes = fake_quantize(x[None], QuantSpec(bits=bits))[0], _misquantized(x, bits, top)
            trials.append((function, (x, bits), wanted, mistakes, f"at {bits} bits {rule}"))
    zeros, rule = torch.zeros(4, dtype=torch.float64), "its step is 0, and 0 / 0 is not a number."
    trials.append((function, (zeros, 4), zeros, {}, f"a row of zeros must stay zeros: {rule}"))
    return _grade(trials, "step max|x| / (2^(bits-1) - 1), rounded to the nearest, on every row tried.")


def _misquantized(x: Tensor, bits: int, top: int) -> Mistakes:
    """What the known mistakes make of a row x at `bits`, where the codes end at `top`."""
    step, wide, signed = x.abs().max() / top, x.abs().max() / (top + 1), x.max() / top
    divided = f"you divided by 2^(bits-1) = {top + 1}"
    needs = f"{divided}: at {bits} bits the codes end at {top}, and the largest entry needs one more."
    missed = f"{divided}: the largest code is {top}, so the largest entry would not be on the grid."
    sign = "the step came from the largest entry, sign and all: take the largest absolute value."
    return {
        needs: (x / wide).round() * wide,
        missed: (x / wide).round().clamp(-top - 1, top) * wide,
        "you returned the codes: multiply them by the step again.": (x / step).round(),
        "you cut off instead of rounding to the nearest: use round.": (x / step).trunc() * step,
        "you rounded down instead of to the nearest: use round.": (x / step).floor() * step,
        sign: (x / signed).round().clamp(-top - 1, top) * signed,
        "nothing was rounded: the row came back as it was.": x,
    }


def check_fuse_norm(function: Answer) -> Verdict:
    """Grade `fuse_norm(gain, weight)`: a weight (out, channels) that takes over a gain (channels,)."""
    divided = "you divided by the gain: the norm no longer multiplies by it, so the linear must."
    rows = "you scaled the rows, the linear's outputs: the gain belongs to its inputs, the columns."
    otherwise = "norm(x) without its gain, times your weight, is not what the layer gave before."
    trials = []
    for seed, out in enumerate((8, 5, 3)):
        gain, weight = 1 + 0.5 * _random(8, seed=seed), _random(out, 8, seed=seed + 10)
        mistakes = {
            divided: weight / gain,
            "the gain is not in it: the weight came back as it was.": weight,
            "you added the gain: it is a factor.": weight + gain,
            rows: weight * gain[:out, None],
        }
        trials.append((function, (gain, weight), weight * gain, mistakes, otherwise))
    praise = "W diag(g): column by column the linear takes over what the norm gives up, and its outputs stay."
    return _grade(trials, praise)


def check_rotate_weights(reader: Answer, writer: Answer) -> Verdict:
    """Grade `reader(weight, R)` of linears that read x @ R, weight (out, channels), `writer(weight, R)` of
    those whose output must come out times R, weight (channels, in)."""
    R = rotations.make(RotationSpec(kind="RO", seed=7), 8)
    columns, rows = "R belongs to its inputs, the columns.", "R belongs to its outputs, the rows."
    trials = []
    for seed, n in enumerate((8, 5)):
        read, write = _random(n, 8, seed=seed), _random(8, n, seed=seed + 20)
        mistakes = {
            "the reader turns backwards: (x R)(W R.T).T is not x W.T; it needs W @ R.": read @ R.T,
            "the reader was not changed.": read,
            f"the reader was turned on its output side: {columns}": R.T[:n, :n] @ read,
        }
        otherwise = "the reader does not undo R: (x @ R) @ W_new.T must be x @ W.T."
        trials.append((reader, (read, R), read @ R, mistakes, otherwise))
        mistakes = {
            "the writer turns backwards: its output would come out times R.T; it needs R.T @ W.": R @ write,
            "the writer was not changed.": write,
            f"the writer was turned on its input side: {rows}": write @ R[:n, :n],
        }
        otherwise = "the writer's output must come out times R: h @ W_new.T must be h @ W.T @ R."
        trials.append((writer, (write, R), R.T @ write, mistakes, otherwise))
    praise = "readers take W @ R, writers R.T @ W: together they leave every logit where it was."
    return _grade(trials, praise)
