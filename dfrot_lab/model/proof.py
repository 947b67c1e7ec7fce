"""Proof, on the model itself, that surgery left its function alone: a few tokens pass it before and after."""

import torch
from torch import Tensor

from dfrot_lab.model import stream
from dfrot_lab.model.checkpoint import HEAD
from dfrot_lab.model.loading import LoadedModel

TOKENS = 16
LAYERS_READ = 2  # of a model that is read layer by layer: a look at all would read and rotate it once more
MOST = {torch.float64: (1e-5, 1e-5), torch.float32: (1e-3, 1e-2)}  # relative; in the first layers, later
MOST_OF_16_BITS = (0.03, 0.5)  # rounding makes 1e-6 of float32 and 0.01 of bfloat16 at first, a mistake 0.04


class Proof:
    """What leaves the layers of an untouched model for a few tokens (1, tokens), to compare with. ValueError:
    NaN or Inf."""

    def __init__(self, loaded: LoadedModel, ids: Tensor) -> None:
        self.loaded, self.ids = loaded, ids
        self.before = self._look()
        if not all(bool(x.isfinite().all()) for x in self.before):
            said = f"{loaded.spec.source} gives NaN or Inf: a broken model, or too small a dtype"
            raise ValueError(f"what a model computes must be finite; {said}")

    @torch.no_grad()
    def _look(self) -> list[Tensor]:
        """The residual stream after each layer looked at (tokens, channels), then what logits it gives."""
        found = list[Tensor]()
        walk = stream.Walk(self.loaded, [self.ids])
        for number in walk.layers(LAYERS_READ if self.loaded.checkpoint else None):
            walk.step(number)
            found.append(walk.hidden[0][0].double())
        with stream.part(self.loaded, HEAD):
            return [*found, stream.logits(self.loaded, walk.hidden[0])[0].double()]

    def check(self, R: Tensor | None) -> None:
        """Compare with the model as it is now, its residual stream times `R` (channels, channels), online
        rotations in place. ValueError: where the two part, and by how much."""
        dtype = next(self.loaded.model.parameters()).dtype
        for number, (old, new) in enumerate(zip(self.before, self._look(), strict=True)):
            is_stream = number < len(self.before) - 1
            if is_stream and self.loaded.roles.norm == "layer":  # surgery centres what the norms would centre
                old = old - old.mean(-1, keepdim=True)
            if is_stream and R is not None:
                old = old @ R.to(old)
            where = f"the residual stream after layer {number}" if is_stream else "the logits"
            of_tokens = (new - old).norm(dim=-1) / old.norm(dim=-1)  # so no massive token hides the others
            apart = float(of_tokens.max() if dtype in MOST else of_tokens.median())  # 16 bits turn a router
            most = MOST.get(dtype, MOST_OF_16_BITS)[number >= LAYERS_READ]
            if not apart <= most:
                said = f"{where} must stay within {most:g} (relative) under rotation; got {apart:.2g}"
                family = f"{self.loaded.family} is not what its entry in dfrot_lab.model.families says"
                raise ValueError(f"{said}: {family}, so this model cannot be used")
