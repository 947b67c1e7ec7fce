"""What a weight quantizer may ask of a layer's attention before anything of the layer is quantized: the
calibration windows pass it once more, as far as its scores, and a `Look` of the quantizer's file is shown
them. Its maps are there a few queries of one window at a time, never whole."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.observe import attention

INPUT = "input_norm"  # the site that q, k and v read
QUERIES = attention.QUERIES  # whose maps exist at once


class Look:
    """Of one layer of a model, `skip` tokens at the start of each window being a prefix."""

    def __init__(self, loaded: LoadedModel, number: int, skip: int) -> None:
        self.loaded, self.layer, self.skip = loaded, loaded.layers[number], skip

    @staticmethod
    def why_not(_loaded: LoadedModel, /) -> str | None:
        """Why a model cannot be looked at so; None if it can."""
        return None

    def see(self, x: Tensor, qkv: Sequence[Tensor], mask: Tensor | None, how: Mapping[str, Any]) -> None:
        """A chunk of windows: what q, k and v read `x` (windows, tokens without a prefix's, channels), and
        what attention is about to see (`hooks.Call`), all (windows, heads, tokens, head size)."""

    def finish(self, again: Callable[[], None]) -> None:
        """All chunks have been seen; `again` shows the first once more."""

    def weighed(self, _chunk: int, rows: Tensor, /) -> Tensor:
        """The rows (tokens, in) that any linears of the layer read of a chunk, as their Hessian has them."""
        return rows

    def of(self, site: str) -> Any:
        """What the quantizer is told of a site's linears beside their Hessian, as `Seen.attention`."""

    def parts(
        self, qkv: Sequence[Tensor], mask: Tensor | None, how: Mapping[str, Any]
    ) -> Iterator[tuple[int, Tensor]]:
        """Attention weights of a chunk: window and (heads, queries, tokens), no prefix's tokens
        among either; at most QUERIES queries, and no tokens after the last of them: they look at none."""
        for window, (q, k) in enumerate(zip(*qkv[:2], strict=True)):
            whole = None if mask is None else mask[window if len(mask) > 1 else 0]
            for first in range(self.skip, q.shape[1], QUERIES):
                own = q[:, first : first + QUERIES]
                stop = first + own.shape[1]
                seen = own.new_ones(1, own.shape[1], stop, dtype=torch.bool).tril(first)
                seen = seen if whole is None else whole[:, first:stop, :stop]
                for _, part in attention.weights(own, k[:, :stop], seen, how, QUERIES):
                    yield window, part[..., self.skip :]
