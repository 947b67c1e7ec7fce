"""Graders for the lesson: each calls a student's function on random inputs and says what is wrong, if any."""

import torch
from torch import Tensor

from dfrot_lab.explore.playground import numbers
from dfrot_lab.explore.verdicts import (
    CLOSE,
    Answer,
    Mistakes,
    Predictions as Predictions,
    Verdict,
    called,
    grade,
    random_rows,
    same,
    verdict,
)
from dfrot_lab.maths import offsets, rotations
from dfrot_lab.maths.hadamard import hadamard_matrix
from dfrot_lab.maths.quantizers import fake_quantize, squared_error
from dfrot_lab.recipe.grids import SYM4, QuantSpec
from dfrot_lab.recipe.specs import RotationSpec
from dfrot_lab.rotate.steps import polar

SEEDS = 4  # matrices a kind over which a token's error is averaged


def check_rotate_row(function: Answer) -> Verdict:
    """Grade `rotate_row(x, R)`: rows x (tokens, channels) turned by R (channels, channels), x @ R."""
    otherwise = "the rows are not x @ R: try x = (1, 0, ...), which must come back as R's first row."
    undone = "you turned backwards: that is x @ R.T, which undoes R. In this house a row is turned by x @ R."
    entries = "you multiplied entry by entry (*): a rotation mixes channels, so use the matrix product @."
    trials = []
    for seed, tokens in enumerate((6, 1, 3)):
        x, R = random_rows(tokens, 6, seed=seed), rotations.make(RotationSpec(kind="RO", seed=seed), 6)
        mistakes = {
            undone: x @ R.T,
            "nothing was turned: the rows came back as they were.": x,
            "you put R on the left, R @ x: that mixes tokens, not channels.": R[:tokens, :tokens] @ x,
            entries: x * R[:tokens],
        }
        trials.append((function, (x, R), x @ R, mistakes, otherwise))
    return grade(trials, "x @ R turns every row and keeps its length.")


def check_quantize(function: Answer) -> Verdict:
    """Grade `quantize_row(x, bits)`: a row x (channels,) on its symmetric grid, as values, not codes."""
    trials = []
    for seed, bits in enumerate((4, 3, 8)):
        top = 2 ** (bits - 1) - 1
        rule = f"the step must be max|x| / {top}, and every entry its nearest whole multiple."
        for x in (random_rows(16, seed=seed), -random_rows(16, seed=seed).abs()):
            wanted, mistakes = fake_quantize(x[None], QuantSpec(bits=bits))[0], _misquantized(x, bits, top)
            trials.append((function, (x, bits), wanted, mistakes, f"at {bits} bits {rule}"))
    zeros, rule = torch.zeros(4, dtype=torch.float64), "its step is 0, and 0 / 0 is not a number."
    trials.append((function, (zeros, 4), zeros, {}, f"a row of zeros must stay zeros: {rule}"))
    return grade(trials, "step max|x| / (2^(bits-1) - 1), rounded to the nearest, on every row tried.")


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
        gain, weight = 1 + 0.5 * random_rows(8, seed=seed), random_rows(out, 8, seed=seed + 10)
        mistakes = {
            divided: weight / gain,
            "the gain is not in it: the weight came back as it was.": weight,
            "you added the gain: it is a factor.": weight + gain,
            rows: weight * gain[:out, None],
        }
        trials.append((function, (gain, weight), weight * gain, mistakes, otherwise))
    praise = "W diag(g): column by column the linear takes over what the norm gives up, and its outputs stay."
    return grade(trials, praise)


def check_rotate_weights(reader: Answer, writer: Answer) -> Verdict:
    """Grade `reader(weight, R)` of linears that read x @ R, weight (out, channels), `writer(weight, R)` of
    those whose output must come out times R, weight (channels, in)."""
    R = rotations.make(RotationSpec(kind="RO", seed=7), 8)
    columns, rows = "R belongs to its inputs, the columns.", "R belongs to its outputs, the rows."
    trials = []
    for seed, n in enumerate((8, 5)):
        read, write = random_rows(n, 8, seed=seed), random_rows(8, n, seed=seed + 20)
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
    return grade(trials, praise)


def check_double(function: Answer) -> Verdict:
    """Grade `double(H)`: a Hadamard matrix (2n, 2n) made of a smaller one, H (n, n)."""
    praise = "every entry is 1 or -1 and H @ H.T is 2n times the identity. This is Sylvester's doubling."
    return verdict((_double_fault(function, order) for order in (1, 2, 12, 20)), praise)


def _double_fault(function: Answer, order: int) -> str:
    size = 2 * order
    found, fault = called(function, (hadamard_matrix(order),), (size, size))
    if fault:
        return fault
    if not bool((found.abs() == 1).all()):
        return "every entry must be 1 or -1: build it of H and -H alone."
    product = found @ found.T
    wrong = (product - size * torch.eye(size, dtype=torch.float64)).nonzero()
    if not len(wrong):
        return ""
    i, j = wrong[0].tolist()
    said = f"rows {i} and {j} of order {size} have the product {int(product[i, j])}, not 0"
    return f"{said}: H @ H.T must be {size} times the identity, so one of the four blocks needs a minus."


def _errors(rows: Tensor) -> dict[str, Tensor]:
    """Squared errors (tokens,) of rows (tokens, channels) at symmetric 4 bits, a kind of rotation each."""
    found = {}
    for kind, seeds in (("NR", 1), ("RO", SEEDS), ("RH", SEEDS)):
        turned = [rows @ numbers.matrix(kind, seed, rows.shape[1]) for seed in range(seeds)]
        found[kind] = torch.stack([squared_error(each, SYM4) for each in turned]).mean(0)
    return found


def check_needs_rotation(function: Answer) -> Verdict:
    """Grade `ordinary_tokens(tokens, channels)`: rows of which three in four lose half as much again without
    a rotation as under RO and under RH: what makes 4 bits fail."""
    praise = "large channels set the step of every token; any rotation spreads them, RO and RH alike."
    return verdict([_needs_rotation_fault(function)], praise)


def _needs_rotation_fault(function: Answer) -> str:
    rows, fault = called(function, (64, 256), (64, 256))
    if fault or not bool(rows.isfinite().all()):
        return fault or "all entries must be finite numbers."
    lost = _errors(rows)
    mended = (lost["NR"] > 1.5 * lost["RO"]) & (lost["NR"] > 1.5 * lost["RH"])
    if float(mended.double().mean()) > 0.75:
        return ""
    if float((lost["RO"] / lost["NR"]).median()) > 1.1:
        spike = "a spike that rules its row, and RO makes it worse than no rotation does"
        return f"these are massive tokens: {spike}. Make the large channels smaller."
    if float(mended.double().mean()) > 0.25:
        return "a rotation mends some of these rows only: an outlier channel is large in every token."
    few = "make a few channels ten times as large as the others, in every token"
    return f"a rotation finds nothing to spread here, all channels are alike: {few}."


def check_needs_hadamard(function: Answer) -> Verdict:
    """Grade `massive_token(channels)`: one row that loses most under RO and least under RH."""
    praise = "RO > NR > RH, the paper's order: RO makes a bell of the spike, RH two levels."
    return verdict([_needs_hadamard_fault(function)], praise)


def _needs_hadamard_fault(function: Answer) -> str:
    row, fault = called(function, (576,), (576,))
    if fault or not bool(row.isfinite().all()):
        return fault or "all entries must be finite numbers."
    errors = {kind: float(error) for kind, error in _errors(row[None]).items()}
    order = sorted(errors, key=lambda kind: -errors[kind])
    if order == ["RO", "NR", "RH"]:
        return ""
    why = "this is no spike. Take noise in all channels, and one that is far larger"
    if order[0] == "NR":
        why = "not to rotate is the worst, so any rotation would do. Make the spike larger against the rest"
    elif order == ["RO", "RH", "NR"]:
        why = "not to rotate is the best: the spike is on its own grid. Leave the other channels more"
    return f"the order is {' > '.join(order)}: {why}."


def check_next_rotation(function: Answer) -> Verdict:
    """Grade `next_rotation(rows, rounded, weights)`: the rotation R of least sum of w ||x R - y||^2 over rows
    x (tokens, channels), what they were rounded to, y, and the weights w (tokens,) of the squared loss."""
    praise = "U V^T of the SVD: the nearest rotation, and a rotation, so the model stays what it was."
    return verdict((_next_rotation_fault(function, seed) for seed in range(3)), praise)


def _next_rotation_fault(function: Answer, seed: int) -> str:
    rows = random_rows(40, 8, seed=seed)
    start = rotations.make(RotationSpec(kind="RO", seed=seed), 8)
    rounded = fake_quantize(rows @ start, QuantSpec(bits=3))
    weights = torch.where(torch.arange(40) % 8 == 0, 100.0, 1.0).double()
    found, fault = called(function, (rows, rounded, weights), (8, 8))
    if fault:
        return fault
    if not _is_rotation(found):
        return "this is no rotation, R @ R.T is not the identity: put in, it would change the model."
    best, counted = polar(rows.T @ (weights[:, None] * rounded)), "the weights are of the squared loss"
    if same(found, best):
        return ""
    mistakes = {
        "massive rows count like the others here: multiply each row by its weight.": torch.ones_like(weights),
        f"{counted} already: do not square them again.": weights**2,
        f"{counted}: do not take their root.": weights**0.5,
    }
    for sentence, weight in mistakes.items():
        if same(found, polar(rows.T @ (weight[:, None] * rounded))):
            return sentence
    back = "this turns what was rounded back to the rows: take U @ Vt, not its transpose."
    return back if same(found, best.T) else "a rotation, but another one comes nearer: U @ Vt of rows.T @ y."


def _is_rotation(R: Tensor) -> bool:
    return same(R @ R.T, torch.eye(len(R), dtype=torch.float64))


def check_point(function: Answer) -> Verdict:
    """Grade `point(u)`: a rotation R with u @ R the same in every channel, u (channels,) of length 1."""
    praise = "what all rows share along u is now their mean, which a zero point takes for nothing."
    return verdict((_point_fault(function, channels) for channels in (4, 16, 50)), praise)


def _point_fault(function: Answer, channels: int) -> str:
    u = random_rows(channels, seed=channels)
    u = u / u.norm()
    R, fault = called(function, (u,), (channels, channels))
    if fault:
        return fault
    if not _is_rotation(R):
        return "this is no rotation, R @ R.T is not the identity: put in, it would change the model."
    if _is_flat(u @ R):
        return ""
    if float((u @ R).abs().max()) > 1 - CLOSE:
        return "you sent u to one channel: that makes a spike of it, which takes the whole grid."
    turned = "you sent it there by R @ u; rows are turned by x @ R, so take the transpose."
    return turned if _is_flat(R @ u) else "u @ R must be the same number in every channel."


def _is_flat(y: Tensor) -> bool:
    return abs(float(offsets.offset_share(y)) - 1) <= CLOSE
