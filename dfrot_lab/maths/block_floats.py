"""Four-bit floats with a scale for each block of channels, as GPUs multiply them: elements E2M1, of which
there are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to the even code, beyond 6 to 6.

MXFP4 (OCP Microscaling v1.0): blocks of 32, scale 2^(floor(log2 max|x|) - 2): the largest entry comes to lie
in [4, 8), and is cut to 6 where it is above.
NVFP4: blocks of 16, scale g round_E4M3(max|x| / (6 g)); g = max|x| of all that is rounded together over
448 * 6, so that the largest block's is E4M3's largest number. Here g is of what passes a site at a time."""

import torch
from torch import Tensor

LARGEST, EXPONENT = 6.0, 2  # of E2M1: its largest number, and that one's exponent
E4M3 = 2.0**-9, 448.0  # the smallest and the largest number of E4M3


def e2m1(x: Tensor) -> Tensor:
    """`x` rounded to the nearest E2M1 number, same shape and dtype."""
    size = x.abs().clamp_(max=LARGEST)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return torch.copysign((size / step).round_().mul_(step), x)


def mx_scale(blocks: Tensor) -> Tensor:
    """MXFP4's scale (blocks, 1) of `blocks` (blocks, n): a power of 2, 1 for a block of zeros."""
    largest = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1 - EXPONENT  # frexp has its mantissa in [0.5, 1)
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(-127, 127))
    return torch.where(largest == 0, torch.ones_like(scale), scale)


def nv_scale(blocks: Tensor, whole: Tensor) -> Tensor:
    """NVFP4's scale (blocks, 1) of `blocks` (blocks, n), `whole` being max|x| of all that shares one g; a
    block whose own is below the smallest E4M3 number has that one."""
    common = torch.where(whole == 0, torch.ones_like(whole), whole / (E4M3[1] * LARGEST))
    own = blocks.abs().amax(-1, keepdim=True) / (LARGEST * common)
    held = own.clamp(*E4M3).to(torch.float8_e4m3fn).to(blocks.dtype)
    return held * common


def fake_quantize(blocks: Tensor, scheme: str) -> Tensor:
    """`blocks` (blocks, n), each with a scale, rounded to the format of a name; same shape and dtype."""
    scale = mx_scale(blocks) if scheme == "mxfp4" else nv_scale(blocks, blocks.abs().amax())
    return e2m1(blocks / scale).mul_(scale)
