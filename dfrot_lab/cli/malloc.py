"""Freed memory: kept for the next tensor, or given back to the system and fetched again page by page."""

import ctypes
import logging
import sys

log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # mallopt's parameter numbers in glibc's malloc.h
_PAD = 1 << 26


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what is freed for the rest of this process; False where that cannot be done.

    By default every tensor above 32 MB is mapped anew and its pages are zeroed on first use: a fifth of a
    batched forward pass on a CPU, half of a large Hadamard transform. In return the process stays as large
    as its peak. A decision for a program, not for a library: the command line takes it, a notebook may."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _PAD))
    done = mallopt is not None and all([mallopt(*setting) for setting in settings])
    log.debug("freed memory is %s", "kept" if done else "given back as usual")
    return done
