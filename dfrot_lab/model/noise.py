"""What rounding alone does, made visible: a model changed in its last bit."""

import torch

from dfrot_lab.model.checkpoint import EMBEDDING
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.parts import edit_rows, tables
from dfrot_lab.model.stream import change


def jitter(loaded: LoadedModel, seed: int) -> None:
    """Change what embeds tokens in its last bit, each value by about the precision of its dtype: what a 4-bit
    model then loses or gains is rounding alone."""

    size = torch.finfo(next(loaded.model.parameters()).dtype).eps

    def change_it(_part: int) -> None:
        source = torch.Generator().manual_seed(seed)
        edit_rows(tables(loaded), lambda w: w * (1 + size * torch.randn(w.shape, generator=source).to(w)))

    change(loaded, change_it, {EMBEDDING})
