"""OptRot (arXiv 2512.24124): an R1 that makes weights easier to round and looks at no text. It minimises the
sum of the fourth powers of all entries of the rotated weights, W R of what reads the residual stream and
R^T W of what writes into it, norms fused: lengths stay, so a small sum has no outlier. Those weights count
that are rounded, R2 and R4 in them; no embedding, head or router. Its steps are Offset+'s, from a random
Hadamard: Adam on the rotations, on a part of the weights each. The paper's own were not found, nor the
formula of its OptRot+, which weighs by the activations' covariance: that one is not here."""

import logging
from typing import Any, ClassVar

import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Writer
from dfrot_lab.model import door, stream
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.parts import feeds, rounded, writers
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import MethodSpec, ruled
from dfrot_lab.recipe.grids import SYM4
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.rotate import dfrot, downhill, offset, random
from dfrot_lab.rotate.downhill import Sample, State, Way
from dfrot_lab.rotate.steps import Refined
from dfrot_lab.rotate.transforms import Context, Transforms

log = logging.getLogger(__name__)
KIND = "optrot"
VERSION = 1
NEEDS = "weights"
LENGTH = 0.2  # of the first step, falling to 0 in a line: Offset+'s 0.06 ends 4% higher on the default model


class OptRotSpec(MethodSpec):
    """`updates`, the steps of the descent, on at most `rows` of the weights' rows, drawn with `seed`, as is
    the random Hadamard it starts from."""

    method: ClassVar[str] = "optrot"
    seed: int = ruled(0, "a whole number in 0..2^63", ge=0, lt=1 << 63)
    updates: int = ruled(200, "a whole number >= 1", ge=1)
    rows: int = ruled(1 << 18, "a whole number >= 1", ge=1)

    @property
    def name(self) -> str:
        """Name for tables and figures."""
        return "OptRot"


SPEC = OptRotSpec


def spec(_row: str, *, seed: int = 0, **_capture: object) -> OptRotSpec:
    """The row OptRot: no text is looked at."""
    return OptRotSpec(seed=seed)


def fit(recipe: Recipe, context: Context) -> Transforms:
    """R1 by the descent, R2 to R4 Hadamard."""
    assert isinstance(recipe.rotation, OptRotSpec)
    found = descended(recipe.rotation, context)
    return Transforms(R1=found.R, seconds=found.seconds)


def descended(spec: OptRotSpec, context: Context) -> Refined:
    """The rotation `spec` describes, from the store or made now of the weights of the recipe's model; a
    stopped run goes on at its last look."""

    def make(writer: Writer) -> None:
        sample = drawn(context.turned(), spec)
        result = descend(sample, spec, downhill.resume(writer), lambda state: downhill.save(writer, state))
        dfrot.keep(writer, result, result.seconds)

    def key() -> Any:
        model = door.resolved(context.recipe.model)
        of = {"of": keys.identity(spec, door.prints), "model": keys.identity(model, door.prints)}
        return of | context.others

    return dfrot.kept(context.store.get_or_make(KIND, key, make))


def turned(loaded: LoadedModel, number: int) -> list[Tensor]:
    """The weights of a layer that R1 turns and that are rounded, each so that its rows (.., channels) are
    multiplied by R1 from the right: W of what reads, W^T of what writes."""
    readers = [one for _, reads in feeds(loaded, number).values() for one in reads]
    found = [one.weight for one in rounded(loaded, number, readers)]
    return found + ([] if loaded.roles.online else [one.weight.T for one in writers(loaded, number)])


def drawn(loaded: LoadedModel, spec: OptRotSpec) -> Sample:
    """Rows (rows, channels) of all weights that R1 turns, those that are drawn standing for all; a model that
    is streamed is read layer by layer."""
    sizes = torch.tensor([sum(map(len, turned(loaded, number))) for number in range(len(loaded.layers))])
    total = int(sizes.sum())
    places = offset.sample(torch.zeros(total, dtype=torch.bool), spec.rows, spec.seed)
    ends, rows = sizes.cumsum(0), list[Tensor]()
    for number, own in enumerate(places.tensor_split(torch.searchsorted(places, ends[:-1]))):
        with stream.part(loaded, number):
            at = (own - ends[number] + sizes[number]).to(loaded.device)
            rows.append(torch.cat(turned(loaded, number))[at].float())
    log.info("%d of %d rows of weights", len(places), total)
    weights = torch.full((len(places),), total / len(places), dtype=torch.float64, device=loaded.device)
    return Sample(torch.cat(rows), weights, torch.zeros_like(weights, dtype=torch.bool))


def descend(
    sample: Sample, spec: OptRotSpec, state: State | None = None,
    checkpoint: downhill.Checkpoint = lambda _state: None,
) -> Refined:  # fmt: skip
    """Go down from a random Hadamard on the rows of a sample; the best of its looks. Its history has, beside
    the objective, the rows' errors on a symmetric 4-bit grid."""

    def step(state: State, rows: Tensor, weights: Tensor, number: int) -> None:
        length = LENGTH * (1 - number / spec.updates)
        downhill.adam(state, rows, weights, number, fourth_powers, length)

    start = random.start(spec.seed, sample.rows.shape[1])
    way = Way(fourth_powers, step, spec.updates, SYM4, spec.seed)
    return downhill.descend(sample, start, way, state, checkpoint)


def fourth_powers(rotated: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """The sum of rotated rows' fourth powers (OptRot's objective), and its slope."""
    cubes = rotated * rotated * rotated
    value = float(((cubes * rotated).sum(1).double() * weights).sum())
    return value, 4 * cubes * weights[:, None].to(rotated)
