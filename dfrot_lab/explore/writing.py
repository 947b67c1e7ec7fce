"""What quantized models write, and how they score the same text. Pure functions of a built model: no widget
is needed here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import loading
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import perplexity
from dfrot_lab.score.perplexity import Built

ROOM = 4
"""A built model is kept for the next prompt while the free memory is this many times its weights."""


@dataclass
class Written:
    """What one model wrote after the prompt, and the loss it gives each token of the text all models are
    scored on, in nats (tokens - 1,).
    """

    name: str
    ids: list[int]
    losses: list[float] = field(default_factory=list)


@torch.inference_mode()
def write(built: Built, prompt: Tensor, tokens: int, on_token: Callable[[int], None]) -> list[int]:
    """Greedy continuation of `prompt` (tokens,): up to `tokens` ids, fewer where the model ends its text.
    Call it inside `evaluate.quantized`.

    `on_token` is called with each id as it is written, and may raise to stop.
    """
    model: Any = built.loaded.model
    ends = end_ids(built.loaded)
    ids, cache, written = prompt[None].to(built.loaded.device), None, list[int]()
    while len(written) < tokens:
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, best = output.past_key_values, int(output.logits[0, -1].argmax())
        written.append(best)
        on_token(best)
        if best in ends:
            break
        ids = torch.tensor([[best]], device=ids.device)
    return written


def end_ids(loaded: loading.LoadedModel) -> set[int]:
    """Ids that end a text, as transformers' own generation takes them."""
    found: Any = loaded.model.generation_config.eos_token_id  # type: ignore[union-attr]
    return set() if found is None else set(found) if isinstance(found, list) else {int(found)}


@torch.inference_mode()
def token_losses(built: Built, ids: Tensor) -> list[float]:
    """The loss in nats of each token of `ids` (tokens,) but the first, given those before it (tokens - 1,).
    Call it inside `evaluate.quantized`.
    """
    model, ids = built.loaded.model, ids.to(built.loaded.device)
    logits = model(ids[None], use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()


def first_difference(ids: Sequence[int], reference: Sequence[int]) -> int | None:
    """The place of the first id that is not the reference's, or where one of them ends before the other; None
    where they are equal.
    """
    equal = next((place for place, (a, b) in enumerate(zip(ids, reference, strict=False)) if a != b), None)
    shorter = min(len(ids), len(reference))
    return equal if equal is not None else shorter if len(ids) != len(reference) else None


class Workshop:
    """Models as they are built, kept for the next prompt while there is room in memory; at least the one in
    use.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.kept: dict[str, Built] = {}

    def keep_only(self, specs: Sequence[Recipe]) -> None:
        """Forget the models that none of `specs` needs."""
        wanted = {self._key(spec) for spec in specs}
        for key in [key for key in self.kept if key not in wanted]:
            del self.kept[key]

    def built(self, spec: Recipe, on_part: perplexity.OnPart) -> Built:
        """The model that `spec` evaluates, built now unless it is kept; others go first where memory is
        short.
        """
        key = self._key(spec)
        if key not in self.kept:
            if self.kept and psutil.virtual_memory().available < ROOM * _bytes(
                next(iter(self.kept.values()))
            ):
                self.kept.clear()
            self.kept[key] = perplexity.build(spec, self.store, on_part)
        return self.kept[key]

    @staticmethod
    def _key(spec: Recipe) -> str:
        return str(perplexity.build_key(spec))


def _bytes(built: Built) -> int:
    return sum(parameter.nbytes for parameter in built.loaded.model.parameters())
