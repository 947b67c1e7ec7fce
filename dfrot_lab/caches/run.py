"""Keys and values as attention reads them once they are held: by a grid for each token and head, or by any
quantizer of registry.CACHES.

In one window all tokens pass at once, so every query reads every key and value, its own too, as it is held
for tokens long after it, and what a method keeps float is float for the window's last tokens alone. In a
cache that grows token by token each query would read the newest keys and values before it as float."""

import torch
from torch import Tensor

from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.grids import QuantSpec

HELD = {"k": "keys", "v": "values"}  # the kinds of site, and what is there


def held(x: Tensor, spec: QuantSpec, kind: str) -> Tensor:
    """Keys (`kind` k) or values (v) x (batch, heads, tokens, head size) as `spec` holds them; the same shape
    and dtype, x itself at 16 bits. ValueError: groups that do not divide a head."""
    if spec.method is None or spec.bits == 16:
        return fake_quantize(x, spec)
    found: Tensor = getattr(registry.load(registry.CACHES, spec.method), HELD[kind])(x, spec)
    return found


def check(spec: QuantSpec, kind: str, window: int, head: int) -> None:
    """Hold a window of zeros of one head of `head` channels: what cannot be held is a ValueError now, not
    after minutes of work on weights."""
    held(torch.zeros(1, 1, window, head), spec, kind)
