"""All layers of a text in the browser: slider and film move there, and tell the kernel once they rest."""

from pathlib import Path
from typing import Any

import anywidget
from traitlets import Bytes, Int, List, Tuple, Unicode, validate

from dfrot_lab.explore.massive import numbers
from dfrot_lab.show.theme import visible


class Film(anywidget.AnyWidget):
    """The control of the layer (`value`, 0 to `max`): slider, play, the text's words shaded by their largest
    |x|, and in `view` "words" or "3-D" its cells in space. A click on a token sends {"token": it}."""

    _esm = Path(__file__).parents[1] / "film.js"
    max, description = Int(), Unicode()
    value, token, view = Int().tag(sync=True), Int().tag(sync=True), Unicode().tag(sync=True)
    frames = Bytes(b"\0\0").tag(sync=True)
    shape, ends = Tuple((1, 1, 1, 1)).tag(sync=True), Tuple((0, 1)).tag(sync=True)
    words: Any = List([""]).tag(sync=True)
    marked: Any = List().tag(sync=True)
    _seen: Any = None

    @validate("value")
    def _within(self, proposal: Any) -> int:
        return min(max(int(proposal["value"]), 0), self.max)

    def show(self, seen: numbers.Look, rule: str, view: str, token: int) -> None:
        """A text, once all its layers; what the rule marks in each, the view, the token that is picked."""
        masks = [numbers.marks(seen, layer, rule) for layer in range(len(seen.streams))]
        with self.hold_sync():
            if seen is not self._seen:
                codes, size = numbers.frames(seen), numbers.per_column(*seen.streams[0].shape)
                self.frames, self.shape, self.ends = codes.tobytes(), (*codes.shape, size), numbers.ends(seen)
                self._seen, self.words = seen, [visible(text) for text in seen.texts]
            self.marked = [mask.nonzero()[:, 0].tolist() for mask in masks]
            self.view, self.token = view, token
