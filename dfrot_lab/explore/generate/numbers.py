"""What models write, and how they score the same text. No widget is needed here."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dfrot_lab.model.loading import LoadedModel

PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "top_p": 1.0, "pad_token_id": 0}
GREEDY = {"do_sample": False, "temperature": 1.0, "top_k": 50}  # all said: a model's own would change words


@dataclass
class Written:
    """The ids a model wrote after the prompt; its loss in nats of each token of one text but the first."""

    name: str
    ids: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def prompt_ids(loaded: LoadedModel, prompt: str, tokens: int) -> Tensor:
    """The ids (tokens,) of a prompt that `tokens` more can follow; ValueError where none or too many are."""
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids[0]
    if len(ids) == 0:
        raise ValueError("prompt must have at least one token; got none")
    if len(ids) + tokens > loaded.context:
        room = f"the model's context of {loaded.context} tokens"
        raise ValueError(f"prompt and text must fit {room}; got {len(ids)} and {tokens} to write")
    return ids


@torch.inference_mode()
def continuation(
    loaded: LoadedModel, prompt: Tensor, tokens: int, on_token: Callable[[int], None] = lambda _id: None, *,
    temperature: float = 0.0, top_k: int = 50, seed: int = 0,
) -> list[int]:  # fmt: skip
    """Up to `tokens` ids that follow `prompt` (tokens,): the likeliest at temperature 0, else drawn among the
    `top_k` likeliest, by models of one seed alike. `on_token` is called with each, and may raise to stop."""

    def each(ids: Tensor, _scores: Any, **_options: Any) -> Tensor:
        on_token(int(ids[0, -1]))
        return torch.zeros(1, dtype=torch.bool, device=ids.device)

    model: Any = loaded.model
    ids = prompt[None].to(loaded.device)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else GREEDY
    options = {**PLAIN, **drawn, "max_new_tokens": tokens, "stopping_criteria": [each]}
    with torch.random.fork_rng(enabled=temperature > 0):  # transformers draws from the global generator
        if temperature > 0:
            torch.manual_seed(seed)
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return written[0, len(prompt) :].tolist()


@torch.inference_mode()
def token_losses(loaded: LoadedModel, ids: Tensor) -> list[float]:
    """The loss in nats of each token of `ids` (tokens,) but the first, given those before it."""
    ids = ids.to(loaded.device)
    logits = loaded.model(ids[None], use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").tolist()


def first_difference(ids: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first place where two texts differ, or where one of them ends before the other; None if equal."""
    pairs = enumerate(itertools.zip_longest(ids, reference))
    return next((place for place, (own, wanted) in pairs if own != wanted), None)
