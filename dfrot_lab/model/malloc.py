"""How this process keeps memory that tensors have freed."""

import ctypes
import sys

MALLOC = ((-4, 0), (-1, -1), (-2, 1 << 26))
"""No mapping of its own for a large piece, no trimming, 64 MB at a time: M_MMAP_MAX and so on in malloc.h."""


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what is freed for the rest of this process; False where that cannot be done.
    Else every tensor above 32 MB is mapped anew and zeroed: a fifth of a batched forward pass on a CPU, half
    of a large Hadamard transform. In return the process stays as large as its peak: a program decides."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return mallopt is not None and all([mallopt(*setting) for setting in MALLOC])
