"""Hadamard matrices H (n, n) of +-1 with H @ H.T = n I, and the transform that never forms them. Here n is a
product of orders from the table that compressed-tensors ships (multiples of 4 up to 256) and one power of
two, and H the Kronecker product of the factors' matrices, as in QuaRot (arXiv 2404.00456)."""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from safetensors.torch import load_file
from torch import Tensor

from dfrot_lab.recipe.base import require

log = logging.getLogger(__name__)
Transform = Callable[[Tensor, float], Tensor]
LARGEST = 64  # largest order that is one matrix product: on a CPU, splitting it would be slower
STAGE = 32  # what a larger power of two is split into: the fastest in `benchmarks/hadamard.py`
CHUNK = 1 << 19  # elements worked on at once on a CPU: what is between two stages stays in cache
KERNEL_MAX = 32768  # largest power of two that the fast-hadamard-transform package takes


@functools.cache
def _tables() -> dict[int, Tensor]:
    """The shipped int8 matrices by order. The package is found and not imported, which would take seconds."""
    spec = importlib.util.find_spec("compressed_tensors")
    for folder in (spec and spec.submodule_search_locations) or []:
        file = Path(folder) / "transform" / "utils" / "hadamards.safetensors"
        if file.is_file():
            return {int(order): matrix for order, matrix in load_file(file).items()}
    lacks = "compressed_tensors must ship transform/utils/hadamards.safetensors; got none"
    raise FileNotFoundError(f"{lacks}. Run: pip install -r requirements.txt")


def _odd_splits(odd: int, least: int = 3) -> Iterator[tuple[int, ...]]:
    """Every way to write `odd` as a non-decreasing product of odd parts d whose order 4d is in the table."""
    if odd == 1:
        yield ()
    for part in range(least, min(odd, max(_tables()) // 4) + 1, 2):
        if odd % part == 0 and 4 * part in _tables():
            yield from ((part, *rest) for rest in _odd_splits(odd // part, part))


@functools.cache
def factors(n: int) -> tuple[int, ...] | None:
    """Table orders and one last power of two, whose product is n: 576 -> (36, 16), 1680 -> (28, 60, 1); None
    for 13696. Of several the fewest orders, then the smallest sum: the transform's cost."""
    if n < 1:
        return None
    power = n & -n
    splits = [split for split in _odd_splits(n // power) if power % 4 ** len(split) == 0]
    best = min(splits, key=lambda split: (len(split), sum(split)), default=None)
    return None if best is None else (*(4 * part for part in best), power // 4 ** len(best))


def _required_factors(n: int) -> tuple[int, ...]:
    require("hadamard.n", n, n >= 1, ">= 1")
    if (found := factors(n)) is not None:
        return found
    rule = "a power of two times orders from the table (multiples of 4 up to 256)"
    said = f"hadamard.n must be {rule}; got {n}: no Hadamard matrix of that order is known here"
    raise ValueError(f"{said}. The largest block of it that has one is {_largest(n)}")


@functools.cache
def _largest(n: int) -> int:
    """The largest divisor of n of which a Hadamard matrix is known."""
    return next(size for size in range(n, 0, -1) if n % size == 0 and factors(size))


@functools.cache
def _say_blocks(n: int, block: int) -> None:
    what = f"in {n // block} blocks of {block} on the diagonal" if block > 1 else "not at all"
    log.warning("no Hadamard matrix of order %d is known here: what is %d wide is rotated %s", n, n, what)


def block_of(n: int, asked: int | None = None, name: str = "block") -> int:
    """The order of the Hadamard matrices on the diagonal of a transform of n: `asked`, else the largest there
    is, which is n where one is known, and once a process said where not. ValueError: `asked` does not fit."""
    largest = _largest(n)
    if asked is not None:
        rule = f"a divisor of {n} of which a Hadamard matrix is known, such as {largest}"
        require(name, asked, n % asked == 0 and factors(asked), rule)
        return asked
    if largest < n:
        _say_blocks(n, largest)
    return largest


def _kron(orders: tuple[int, ...]) -> Tensor:
    """int8 Kronecker product of the orders' matrices: of a power of two Sylvester's, else the table's."""
    powers = {n: scipy.linalg.hadamard(n, dtype=np.int8) for n in orders if n & (n - 1) == 0}
    parts = (torch.from_numpy(powers[n]) if n in powers else _tables()[n] for n in orders)
    return functools.reduce(torch.kron, parts)


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """H (n, n) of +-1 with H @ H.T = n I, over `factors(n)`. ValueError: none is known, but which block."""
    return _kron(_required_factors(n)).to(dtype)  # built in int8: n = 14336 needs 0.2 GB before the one cast


@functools.cache
def _small(orders: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else a cached matrix could never take part in a backward pass
        return _kron(orders).to(device=device, dtype=dtype)


@functools.cache
def _stages(n: int) -> tuple[tuple[int, ...], ...]:
    """The factors of n as the products a CPU computes: 1536 -> ((12, 4), (32,)), a 12 x 4 and a 32."""
    *tables, power = _required_factors(n)
    tail = 0
    while power > LARGEST:
        power, tail = power // STAGE, tail + 1
    head: list[tuple[int, ...]] = [(table,) for table in tables]
    if head and head[-1][0] * power <= LARGEST:
        head[-1] += (power,)
    elif power > 1 or not head:
        head.append((power,))
    return (*head, *[(STAGE,)] * tail)


def _kron_product(x: Tensor, stages: Sequence[tuple[int, ...]], scale: float, out: Tensor | None) -> Tensor:
    """x (..., n) @ (H_1 kron H_2 kron ... kron I).T * scale, into `out` if given, one small product a stage.
    The identity fills up what `stages` leave of n; where scale is not 1 they must leave nothing."""
    rows, right = x, x.shape[-1]
    for orders in stages:
        h = _small(orders, x.dtype, x.device)
        right //= len(h)
        if right > 1:
            rows = torch.matmul(h, rows.reshape(-1, len(h), right))
        else:
            result = None if out is None else out.view(-1, len(h))
            rows = torch.mm(rows.reshape(-1, len(h)), h.T * scale, out=result)
    return rows.reshape(x.shape)


def _torch_transform(x: Tensor, scale: float) -> Tensor:
    """The transform in torch products, for every device without a kernel; on a CPU a few rows at a time."""
    n, stages = x.shape[-1], _stages(x.shape[-1])
    if x.device.type != "cpu" or x.numel() <= CHUNK or (x.requires_grad and torch.is_grad_enabled()):
        return _kron_product(x, stages, scale, None)
    rows, step = x.reshape(-1, n), max(1, CHUNK // n)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for part, result in zip(rows.split(step), out.split(step), strict=True):
        _kron_product(part, stages, scale, result)
    return out.reshape(x.shape)


def _kernel_transform(x: Tensor, scale: float, kernel: Transform) -> Tensor:
    """The transform with `kernel(rows (..., 2^k), scale)` for the last factor, small products for others."""
    *tables, power = _required_factors(x.shape[-1])
    if power == 1:
        return _torch_transform(x, scale)
    rows = _kron_product(x, [(table,) for table in tables], 1.0, None)
    return kernel(rows.reshape(-1, power), scale).reshape(x.shape)


@functools.cache
def _cuda_kernel() -> Transform | None:
    """The function of the fast-hadamard-transform package where that works, else None (said once)."""
    try:
        return importlib.import_module("fast_hadamard_transform").hadamard_transform
    except ImportError as error:
        if error.name != "fast_hadamard_transform":
            log.warning("fast_hadamard_transform cannot be imported (%s): using torch products", error)
        return None


def hadamard_transform(x: Tensor, scale: float = 1.0) -> Tensor:
    """x (..., n) @ H.T * scale with H = hadamard_matrix(n), without forming it; a rotation at scale n**-0.5,
    in x's dtype. fast-hadamard-transform does powers of two on CUDA where installed; nothing is padded (which
    would be no rotation). ValueError: n without a matrix, x not of floats."""
    said = f"shape {tuple(x.shape)}, {x.dtype}. Cast it: x.float()"
    fits = x.ndim > 0 and x.is_floating_point()
    require("hadamard_transform.x", said, fits, "(..., n) of a float dtype")
    orders = _required_factors(x.shape[-1])
    if x.numel() == 0:
        return x.clone()  # a kernel launch over no rows is a CUDA error
    kernel = _cuda_kernel() if x.is_cuda and x.dtype != torch.float64 and orders[-1] <= KERNEL_MAX else None
    if kernel is not None and len(orders) == 1:
        return _kernel_transform(x, scale, kernel)  # it sums in float32 and rounds once, by itself
    # rounded once, at the end: a sum of n terms can leave float16's range before `scale` brings it back
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    done = _torch_transform(work, scale) if kernel is None else _kernel_transform(work, scale, kernel)
    return done.to(x.dtype)
