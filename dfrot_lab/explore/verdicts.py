"""What the lesson's graders share: a verdict in a sentence, a guarded call, and a student's predictions."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import pandas as pd
import torch
from torch import Tensor

CLOSE = 1e-9  # largest relative difference from the right answer, in float64
_MATHS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
UNFINISHED = (*_MATHS, AssertionError, AttributeError, NameError, OSError)  # of a function not finished
Answer = Callable[..., Any]
Inputs = tuple[Any, ...]
Mistakes = dict[str, Tensor]  # wrong results by their sentences, cut to fit where only square inputs do
Trial = tuple[Answer, Inputs, Tensor, Mistakes, str]


@dataclass(frozen=True)
class Verdict:
    """Whether the function is right, and the sentence that says so or what is wrong with it."""

    right: bool
    sentence: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"{'Right' if self.right else 'Not yet'}: {self.sentence}"


def verdict(faults: Iterable[str], praise: str) -> Verdict:
    """The first fault that is not '', or the praise; none is looked for after the first."""
    fault = next(filter(None, faults), "")
    return Verdict(not fault, fault or praise)


def grade(trials: Iterable[Trial], praise: str) -> Verdict:
    """A verdict on calls with one right result each, and known wrong ones."""
    return verdict((_fault(*trial) for trial in trials), praise)


def called(function: Answer, inputs: Inputs, shape: tuple[int, ...]) -> tuple[Tensor, str]:
    """What a student's function returns, float64, of the `shape` expected, and '' or what is wrong."""
    nothing, before = torch.zeros(shape, dtype=torch.float64), copy.deepcopy(inputs)
    try:
        found = function(*inputs)
    except UNFINISHED as error:
        return nothing, f"your function raised {type(error).__name__}: {error}."
    if found is None:
        return nothing, "your function returned nothing: end it with return."
    if not isinstance(found, Tensor):
        return nothing, f"your function returned a {type(found).__name__}, a tensor was expected."
    tensors = [pair for pair in zip(before, inputs, strict=True) if isinstance(pair[0], Tensor)]
    if not all(torch.equal(*pair) for pair in tensors):
        fault = "your function changed its input: make a new tensor, others may still read the old one."
        return nothing, fault
    if tuple(found.shape) != shape:
        return nothing, f"your function returned shape {tuple(found.shape)}, {shape} was expected."
    return found.detach().double(), ""


def _fault(function: Answer, inputs: Inputs, wanted: Tensor, mistakes: Mistakes, otherwise: str) -> str:
    """What is wrong with one call of a student's function, or ''."""
    found, fault = called(function, inputs, tuple(wanted.shape))
    if fault or same(found, wanted):
        return fault
    return next((sentence for sentence, wrong in mistakes.items() if same(found, wrong)), otherwise)


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    if found.shape != wanted.shape:
        return False
    return bool((found.detach().double() - wanted).norm() <= CLOSE * wanted.norm().clamp(min=1e-300))


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian numbers, float64, the same for the same seed."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Outcome:
    """One prediction beside the measurement: what was `said` first (... if nothing was), what it is."""

    question: str
    said: Any
    measured: Any
    right: bool

    def __repr__(self) -> str:
        if self.said is ...:
            advice = "put your answer in place of ... in this cell's first line, and run it again"
            return f"{self.question}: you have predicted nothing ({advice})"
        word = "as you said" if self.right else f"you said {_written(self.said)}"
        return f"{self.question}: {_written(self.measured)}, {word}"


def _written(value: Any) -> str:
    if isinstance(value, set | frozenset):
        return ", ".join(sorted(map(str, value))) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _agree(said: Any, measured: Any, within: float) -> bool:
    """Numbers by a factor of at most 1 + `within`; words but for blanks and capitals; the rest if equal."""
    if isinstance(said, Real) and isinstance(measured, Real):
        low, high = sorted((float(said), float(measured)))
        return low == high or (low > 0 and high <= low * (1 + within))
    if isinstance(said, str) and isinstance(measured, str):
        return "".join(said.split()).lower() == "".join(measured.split()).lower()
    if isinstance(measured, set | frozenset) and isinstance(said, list | tuple | set | frozenset):
        return set(said) == measured
    return bool(said == measured)


@dataclass
class Predictions:
    """A student's predictions, kept as they were first said, each beside what was measured."""

    kept: dict[str, Outcome] = field(default_factory=dict)

    def reveal(self, question: str, said: Any, measured: Any, within: float = 0.0) -> Outcome:
        """Set what was `said` before the measurement beside it: numbers are right within that factor. What
        was said first stays, and ... says nothing."""
        if question in self.kept:
            said = self.kept[question].said
        found = Outcome(question, said, measured, said is not ... and _agree(said, measured, within))
        if said is not ...:
            self.kept[question] = found
        return found

    def table(self) -> pd.DataFrame:
        """All of them so far, a row a question: said, measured, right."""
        rows = [
            (each.question, _written(each.said), _written(each.measured), each.right)
            for each in self.kept.values()
        ]
        return pd.DataFrame(rows, columns=["question", "said", "measured", "right"]).set_index("question")
