"""Rotations descended for a proxy of the error of captured rows, which says how spread a row is: DartQuant's
Whip, sum exp(-|y|) (arXiv 2511.04063, with its QR-Orth: plain descent on Z, R its orthogonal factor), and
KurTail's distance of a row's kurtosis from the uniform distribution's (2503.01483, which does not say its
steps: here QR-Orth's). Both count every row the same; `massive` gives the mean of massive rows a weight
beside that of the others, as DFRot would."""

from typing import ClassVar

import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.model import door
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import capture as captured
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import MethodSpec, one_of, ruled
from dfrot_lab.recipe.grids import QuantSpec
from dfrot_lab.recipe.specs import DEFAULT_RULE, MASSIVE_RULES, CaptureSpec, Recipe
from dfrot_lab.rotate import dfrot, downhill, random
from dfrot_lab.rotate.downhill import Loss, Sample, State, Way
from dfrot_lab.rotate.steps import Refined
from dfrot_lab.rotate.transforms import Context, Transforms

KIND = "proxy"
VERSION = 1
NEEDS = "activations"
MOMENTUM = 0.9  # DartQuant's
UNIFORM = 1.8  # kurtosis of the uniform distribution
MASSIVE = " + massive"  # the end of the names of those whose massive rows weigh more
NAMES = {"whip": "DartQuant", "kurtosis": "KurTail"}
RATES = {"whip": 0.01, "kurtosis": 0.03}  # DartQuant's 0.001 has gone half of the way here in 100 steps


class ProxySpec(MethodSpec):
    """The proxy, the rows it is of, `updates` steps at a `rate` (None: its own), each on some of the rows;
    `massive`: the weight of the mean over massive rows by `rule`; None: all rows alike, as published,
    and the rule says only which rows the history tells apart."""

    method: ClassVar[str] = "proxy"
    loss: str = one_of("whip", tuple(NAMES))
    capture: CaptureSpec = CaptureSpec()
    seed: int = ruled(0, "a whole number in 0..2^63", ge=0, lt=1 << 63)
    massive: float | None = ruled(None, "None or > 0", gt=0)
    rule: str = one_of(DEFAULT_RULE, MASSIVE_RULES)
    updates: int = ruled(100, "a whole number >= 1", ge=1)
    rate: float | None = ruled(None, "None or > 0", gt=0)

    @property
    def name(self) -> str:
        """Name for tables and figures: a `+ massive` where these weigh more than published."""
        return NAMES[self.loss] + ("" if self.massive is None else MASSIVE)


SPEC = ProxySpec


def spec(row: str, *, seed: int = 0, capture: CaptureSpec | None = None) -> ProxySpec:
    """The row of a proxy, as published or with massive rows weighing as much as all others."""
    loss = next(loss for loss, name in NAMES.items() if row.startswith(name))
    return ProxySpec(
        loss=loss, seed=seed, capture=capture or CaptureSpec(), massive=None if row == NAMES[loss] else 1.0
    )


def fit(recipe: Recipe, context: Context) -> Transforms:
    """R1 by the descent, R2 to R4 Hadamard."""
    assert isinstance(recipe.rotation, ProxySpec)
    found = descended(recipe.rotation, context.store)
    return Transforms(R1=found.R, seconds=found.seconds)


def descended(spec: ProxySpec, store: Store | None = None) -> Refined:
    """The rotation `spec` describes, from the store or made now; a stopped run goes on at its last look."""
    spec, store = door.resolved(spec), store or Store()

    def make(writer: Writer) -> None:
        recorded = captured(spec.capture, store)
        mask = massive.find(recorded, spec.rule).flatten()
        if spec.massive is not None:
            massive.warn(recorded, spec.rule)
        often = mask if spec.massive is not None else torch.zeros_like(mask)
        sample = Sample(recorded.all_rows(), weights(mask, spec.massive), mask, often)
        result = descend(sample, spec, downhill.resume(writer), lambda state: downhill.save(writer, state))
        dfrot.keep(writer, result, result.seconds)

    return dfrot.kept(store.get_or_make(KIND, lambda: keys.identity(spec, door.prints), make))


def weights(mask: Tensor, heavy: float | None) -> Tensor:
    """What each row weighs (rows,): all the same, or massive ones (where `mask` is) `heavy` in all and the
    others 1. Their sum is 1."""
    found = torch.ones(len(mask), dtype=torch.float64)
    if heavy is not None and mask.any() and not mask.all():
        found[mask] = heavy * float((~mask).sum()) / float(mask.sum())
    return found / found.sum()


def descend(
    sample: Sample, spec: ProxySpec, state: State | None = None,
    checkpoint: downhill.Checkpoint = lambda _state: None,
) -> Refined:  # fmt: skip
    """QR-Orth from a random Hadamard on the rows of a sample; the best of its looks."""
    start = random.start(spec.seed, sample.rows.shape[1])
    state = state or State(start, start, torch.zeros_like(start), start, [])  # momentum; Z
    loss, rate = LOSSES[spec.loss], spec.rate or RATES[spec.loss]

    def step(state: State, rows: Tensor, weights: Tensor, _number: int) -> None:
        slope = rows.T @ loss(rows @ state.R, weights)[1]
        qr_orth(state, slope, rate)

    way = Way(loss, step, spec.updates, QuantSpec(scheme="asymmetric"), spec.seed, back=False)
    return downhill.descend(sample, start, way, state, checkpoint)


def qr_orth(state: State, slope: Tensor, rate: float) -> None:
    """One step of descent with momentum on Z (the state's `second`), of which R is the orthogonal factor Q:
    `slope` (channels, channels) is the loss's at R."""
    Z = state.second.detach().requires_grad_()
    with torch.enable_grad():
        (_orthogonal(Z) * slope).sum().backward()
    assert Z.grad is not None
    state.first = MOMENTUM * state.first + Z.grad
    state.second = Z.detach() - rate * state.first
    state.R = _orthogonal(state.second)


def _orthogonal(Z: Tensor) -> Tensor:
    """Q of Z = QR with a positive diagonal in R: near to Z where Z is nearly orthogonal."""
    Q, upper = torch.linalg.qr(Z)
    return Q * torch.where(upper.diagonal().detach() < 0, -1.0, 1.0)


def whip(rotated: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """Whip, sum of exp(-|y|) over a row's channels, and its slope (DartQuant, Eq. 6): small where no entry is
    near 0, which rows of one length have when they are spread evenly."""
    near = (-rotated.abs()).exp()
    slope = near * -rotated.sign() * weights[:, None].to(rotated)
    return float((near.sum(1).double() * weights).sum()), slope


def kurtosis(rotated: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """The distance of each row's kurtosis m4 / m2^2 from the uniform distribution's, and its slope."""
    c = rotated - rotated.mean(1, keepdim=True)
    square = c * c
    m2, m3 = (power.mean(1, keepdim=True) for power in (square, square * c))
    m2 = m2.clamp(min=torch.finfo(rotated.dtype).tiny ** 0.25)
    ratio = square.square().mean(1, keepdim=True) / m2.square()
    slope = (square * c - m3) / m2.square() - ratio * c / m2
    slope *= (ratio - UNIFORM).sign() * weights[:, None].to(rotated) * (4 / rotated.shape[1])
    return float(((ratio[:, 0].double() - UNIFORM).abs() * weights).sum()), slope


LOSSES: dict[str, Loss] = {"whip": whip, "kurtosis": kurtosis}
