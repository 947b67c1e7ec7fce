"""QJL (arXiv 2406.03482, Sec. 3): of a key k its norm and the signs of m projections S k are held, with a
Gaussian S (m, head size), and a query's score is estimated, without bias over S, by

    q . k  ~  sqrt(pi / 2) / m |k| <S q, sign(S k)>  =  q . k^,   k^ = sqrt(pi / 2) / m |k| S^T sign(S k).

The estimator is linear in q, so it is the score of the vector k^: attention is given k^ in the key's place,
and nothing else changes. A projection is one bit, so b bits a channel are m = b * head size of them. Not
here: the release's orthogonal rows of S, and its second sketch for channels that are large in all tokens. It
holds keys alone: k^ is right on average and, as a vector, far from k:

    E |k^ - k|^2 = (pi head size / 2 - 1) / m |k|^2."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from dfrot_lab.recipe.grids import QuantSpec

VERSION = 1


def keys(x: Tensor, spec: QuantSpec) -> Tensor:
    """Keys x (..., head size) as the vectors whose scores are QJL's: one S, of `seed`, for all heads."""
    S = sketch(spec.bits * x.shape[-1], x.shape[-1], int(spec.seed or 0))
    S = S.to(x.device, torch.promote_types(x.dtype, torch.float32))
    rows = x.to(S.dtype)
    signs = torch.where(rows @ S.T < 0, -1.0, 1.0).to(S.dtype)
    scale = math.sqrt(math.pi / 2) / len(S) * rows.norm(dim=-1, keepdim=True)
    return (signs @ S * scale).to(x.dtype)


@lru_cache(maxsize=8)
def sketch(projections: int, head: int, seed: int) -> Tensor:
    """S (projections, head) of standard normal numbers, float64 on the CPU. Same seed, same bytes."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(projections, head, dtype=torch.float64, generator=source)
