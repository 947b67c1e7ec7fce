"""A quantizer of keys in one file: it holds each key's signs and the mean of its absolute values."""

from torch import Tensor

from dfrot_lab.recipe.grids import QuantSpec


def keys(x: Tensor, spec: QuantSpec) -> Tensor:
    """Keys x (batch, heads, tokens, head size) of one absolute value each."""
    assert spec.method == "signs" and spec.bits < 16
    return x.sign() * x.abs().mean(-1, keepdim=True)
