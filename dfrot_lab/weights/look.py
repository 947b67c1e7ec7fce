"""What a weight quantizer may ask of a layer's attention before anything of the layer is quantized: the
calibration windows pass it once more, as far as its scores, and a `Look` of the quantizer's file is shown
them. Its maps are there a few queries of one window at a time (`observe.attention`), never whole."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Attention weights of a chunk: window, first query and (heads, queries, tokens), a prefix's tokens
        in neither; at most QUERIES queries."""
        for window, (q, k) in enumerate(zip(*qkv[:2], strict=True)):
            own = None if mask is None else mask[window if len(mask) > 1 else 0]
            for first, part in attention.weights(q, k, own, how, QUERIES):
                rows = part[:, max(0, self.skip - first) :, self.skip :]
                yield window, max(0, first - self.skip), rows
