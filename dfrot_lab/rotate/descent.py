"""Steps that minimise DFRot's objective sooner: Procrustes steps to first order, on a part of the rows. With
e = x R - Q(x R), G = sum w x^T x and P = sum w x^T e, the product of Eq. 6 is G R - P, and Eq. 8's solution
its polar factor: to first order (I - D) R with G D + D G = P R^T - R P^T, in G's eigenbasis a division by
sums of two eigenvalues. So a step needs no SVD and no loss, and takes momentum and a sample of the rows."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import centred, fake_quantize
from dfrot_lab.model.integer import product
from dfrot_lab.recipe.grids import QuantSpec

ROWS_AT_ONCE = 4096  # rows of one product: x R, its quantized values, their difference stay in cache
PARTS = 8  # an accelerated step sees all massive rows and one of so many parts of the others, in turn
LEAST_ROWS = 1024  # rows of such a part where there are that many
EIGHT_BITS = QuantSpec(bits=8)
TURN_ERROR = 0.02  # how far a singular value may leave 1 in one step; every check brings them back


def parts(mask: Tensor, weights: Tensor, count: int = PARTS) -> list[tuple[Tensor, Tensor]]:
    """(row numbers, weights (rows, 1)) of each of `count` parts: all massive rows, and some others that stand
    for all."""
    massive_rows = mask.nonzero().flatten()
    others = (~mask & (weights > 0)).nonzero().flatten()
    others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0)).to(others.device)]
    size, found = max(1, -(-len(others) // count), min(len(others), LEAST_ROWS)), []
    for part in others.split(size):
        scaled = weights[part] * len(others) / max(1, len(part))
        weight = torch.cat([weights[massive_rows], scaled])[:, None]
        found.append((torch.cat([massive_rows, part]), weight))
    return found


@dataclass(frozen=True)
class Metric:
    """Eigenvectors V (channels, channels) of G, and 1 / (sums of two eigenvalues, kept from 0)."""

    V: Tensor
    inverse: Tensor

    def into(self, R: Tensor) -> Tensor:
        """R (channels, channels) as the steps hold it: V^T R, in the rows' dtype."""
        return self.V.T @ R.to(self.V)

    def out_of(self, R: Tensor) -> Tensor:
        """Back, made orthogonal again: float64."""
        return orthonormal(self.V @ R).double()


def metric(rows: Tensor, weights: Tensor) -> Metric:
    """The metric of G = sum w x^T x over `rows` (tokens, channels) with `weights` (tokens,)."""
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part, weight in zip(rows.split(ROWS_AT_ONCE), weights.split(ROWS_AT_ONCE), strict=True):
        gram += part.T @ (part * weight[:, None].to(part))
    values, V = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    least = 0.1 * values.median() + 1e-6 * values.max()
    return Metric(V.to(rows), (1 / (values[:, None] + values + least)).to(rows))


def move(rows: Tensor, at: Tensor, weights: Tensor, metric: Metric, R: Tensor, grid: QuantSpec) -> Tensor:
    """D of V R over the rows `at`, with `weights` (rows, 1), in V's frame: the smaller of them turns."""
    few = len(at) < len(R)
    whole, total = R if few else metric.V @ R, torch.zeros_like(R)
    for part, weight in zip(at.split(ROWS_AT_ONCE), weights.split(ROWS_AT_ONCE), strict=True):
        x = rows[part] @ metric.V if few else rows[part]
        y = x @ whole
        error = y.sub_(fake_quantize(y, grid)).mul_(weight.to(y))
        total += torch.linalg.multi_dot([x.T, error, R.T])  # in the cheapest order for the sizes at hand
    total = total if few else metric.V.T @ total
    return (total - total.T).mul_(metric.inverse)


def turn(R: Tensor, skew: Tensor, length: float) -> Tensor:
    """exp(-length skew) R (channels, channels) by the exponential's series, until its rest is below
    TURN_ERROR. Its products are of 8-bit codes: an error of 1% of the turn, less than sampling rows makes."""
    codes, scale = _coded(skew)
    angle, order, term = min(length * _largest(skew), 1e30), 0, R.T.contiguous()  # else its powers overflow
    found = term.clone()
    while order == 0 or (angle ** (order + 1) / math.factorial(order + 1) > TURN_ERROR and order < 8):
        order += 1
        own, size = _coded(term)
        term = product(own, codes).to(term.dtype)  # with skew^T, which is -skew
        term = term.mul_(size).mul_(scale.T * (-length / order))
        found += term
    return found.T.contiguous()


def _coded(a: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes (n, n) of the rows of a matrix and their scales (n, 1)."""
    codes = torch.empty(a.shape, dtype=torch.int8, device=a.device)
    return codes, centred(a, EIGHT_BITS, out=codes)


def _largest(a: Tensor) -> float:
    """The largest singular value of a normal matrix (n, n), nearly, by six power iterations."""
    vector = a.new_ones(len(a), 1)
    for _ in range(6):
        vector = a @ (vector / vector.norm().clamp(min=1e-30))
    return float(vector.norm())


def orthonormal(R: Tensor) -> Tensor:
    """The polar factor of a nearly orthogonal R (channels, channels) by Newton-Schulz, in R's dtype."""
    for _ in range(30):
        gram = R.T @ R
        size = _largest(gram)  # the largest singular value squared; the iteration needs it below 3
        if not math.isfinite(size):
            break
        if size > 2:
            R, gram = R / math.sqrt(size), gram / size
        gram.diagonal().sub_(1)
        R = R - 0.5 * (R @ gram)
        if float(gram.abs().max()) < 1e-3:  # the next one's would be its square
            break
    return R
