"""Freed memory is kept where that can be asked for: seen from outside, in a process of its own."""

import platform
import subprocess
import sys

import pytest

from dfrot_lab.model import malloc

COUNT_FAULTS = """
import resource, sys
import torch
from dfrot_lab.model.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(10):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    return int(
        subprocess.run(
            [sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pages_are_fetched_once_and_not_for_every_tensor():
    assert faults("kept") < faults("as usual") / 5


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(malloc.sys, "platform", "win32")
    assert malloc.keep_freed_memory() is False
    monkeypatch.setattr(malloc.sys, "platform", "linux")
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: object())
    assert malloc.keep_freed_memory() is False
