"""Any set of surgery steps, right or wrong, tried on one model: how far the logits move, what the model then
says, and why a wrong set is wrong.

What the package refuses is refused here too, and then done by hand all the same, so that the damage can be
seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.model import surgery
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.recipe.specs import RotationSpec

TOLERANCE = 2e-5
"""Relative error of the logits that float32 rounding may cause through some 30 layers; mistakes begin a
hundred times higher.
"""
NEW_TOKENS = 12
PROMPT = "The capital of France is Paris. The capital of Germany is"

STEPS = {
    "untie": "Untie lm_head from the embedding",
    "centre": "Centre the embedding",
    "fuse": "Fuse the norm gains",
    "drop": "Set the gains to 1 without fusing",
    "r1": "R1: rotate the residual stream",
    "r2": "R2: rotate the values of each head",
    "r3": "R3: rotate queries and keys, online",
    "r4_fused": "R4: the half fused into down_proj",
    "r4_online": "R4: the online half before down_proj",
}
"""Every switch and its label, in the order the steps are taken."""
SHORT = {
    "untie": "untie",
    "centre": "centre",
    "fuse": "fuse",
    "drop": "gains to 1",
    "r1": "R1",
    "r2": "R2",
    "r3": "R3",
}
SHORT |= {"r4_fused": "R4 fused", "r4_online": "R4 online"}

WHY = {
    "tied": "lm_head and the embedding are one tensor: the head needs the final norm's gain, the embedding must not have it.",
    "gain": "R1 without fused gains: a gain scales channels, R1 mixes them, and the two do not commute.",
    "drop": "The gains were set to 1 and nothing took them over: the check before R1 is content with that, the logits are not.",
    "centre": "RMSNorm does not subtract a mean, so an embedding without its mean is another embedding (LayerNorm would not see it).",
    "r4_fused": "Only half of R4: down_proj expects a rotated input, and nothing rotates it.",
    "r4_online": "Only half of R4: its input is rotated, and down_proj does not take that back.",
}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Which steps are on, and the matrix R1 takes."""

    untie: bool = False
    centre: bool = False
    fuse: bool = False
    drop: bool = False
    r1: bool = False
    r2: bool = False
    r3: bool = False
    r4_fused: bool = False
    r4_online: bool = False
    rotation: RotationSpec = field(default_factory=RotationSpec)

    @property
    def name(self) -> str:
        """`untie + fuse + R1 (RH)`; `untouched` with no step on."""
        on = [
            f"R1 ({self.rotation.name})" if key == "r1" else short
            for key, short in SHORT.items()
            if getattr(self, key)
        ]
        return " + ".join(on) or "untouched"

    @property
    def residual(self) -> "Steps":
        """The part that changes every weight: what is worth keeping between two trials."""
        return replace(self, r2=False, r3=False, r4_fused=False, r4_online=False)


def faults(steps: Steps, tied: bool) -> list[str]:
    """Why `steps` change the logits of a model whose embedding is `tied` or not: one sentence a reason, none
    for a right set.
    """
    found = {
        "tied": tied and not steps.untie and steps.fuse,
        "gain": steps.r1 and not steps.fuse and not steps.drop,
        "drop": steps.drop and not steps.fuse,
        "centre": steps.centre,
        "r4_fused": steps.r4_fused and not steps.r4_online,
        "r4_online": steps.r4_online and not steps.r4_fused,
    }
    return [WHY[name] for name, is_so in found.items() if is_so]


@dataclass(frozen=True)
class Outcome:
    """One trial: relative error of the logits, the tokens generated, the reasons it is wrong and what the
    package refused.
    """

    steps: Steps
    error: float
    tokens: tuple[str, ...]
    faults: tuple[str, ...]
    refusals: tuple[str, ...]

    @property
    def broken(self) -> bool:
        """Whether the logits left the tolerance (or are not numbers)."""
        return not self.error <= TOLERANCE

    @property
    def verdict(self) -> str:
        """One paragraph for the reader."""
        if not self.broken:
            return f"The logits stay: relative error {self.error:.1e}, tolerance {TOLERANCE:g}."
        refused = [
            f"The package refuses this: \u201c{text}\u201d. Done by hand all the same:"
            for text in self.refusals
        ]
        return " ".join(
            [
                *refused,
                f"the logits move by {self.error:.1e}.",
                *(self.faults or ("No known reason: please report it.",)),
            ]
        )


class Bench:
    """A model and a copy of its weights, so that sets of steps can be tried on it one after the other."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.tied = surgery.is_tied(loaded)
        self._pristine = _copy(loaded)
        self._base: Steps | None = None
        self._tail: dict[str, Tensor] = {}
        self._refusals: list[str] = []
        self._truth: tuple[str, Tensor] | None = None

    @torch.no_grad()
    def measure(
        self,
        steps: Steps,
        prompt: str = PROMPT,
        *,
        generate: bool = True,
        step: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Try `steps` and compare with the untouched model on `prompt`; `step` is called between the parts.
        ValueError: an empty prompt.
        """
        ids = self._ids(prompt)
        if self._truth is None or self._truth[0] != prompt:
            self.apply(Steps())
            self._truth = (prompt, self.loaded.model(ids).logits)
        step()
        refusals = self.apply(steps)
        step()
        with surgery.online(self.loaded, r3=steps.r3, r4=steps.r4_online):
            logits = self.loaded.model(ids).logits
            step()
            tokens = self._generate(ids, step) if generate else ()
        error = float((logits - self._truth[1]).norm() / self._truth[1].norm())
        return Outcome(steps, error, tokens, tuple(faults(steps, self.tied)), tuple(refusals))

    def apply(self, steps: Steps) -> list[str]:
        """Change the model's weights as `steps` say, starting from its own; returns the package's refusals."""
        if self._base != steps.residual:
            self._base = None  # what follows may end half-way
            _restore(self.loaded, self._pristine, self.tied)
            self._refusals = _residual(self.loaded, steps)
            self._tail = _copy(self.loaded, self._edited_later())
            self._base = steps.residual
        else:
            _fill(self.loaded, self._tail)
        if steps.r2:
            surgery.rotate_heads(self.loaded)
        if steps.r4_fused:
            surgery.rotate_down(self.loaded)
        return self._refusals

    def _edited_later(self) -> tuple[str, ...]:
        """Names of what R2 and R4 change: a copy of these few weights spares the many products of R1 at the
        next trial.
        """
        roles = self.loaded.roles
        return tuple(f".{name}." for name in (roles.v, roles.o, roles.down))

    def _ids(self, prompt: str) -> Tensor:
        ids = self.loaded.tokenizer(prompt, return_tensors="pt").input_ids
        if ids.numel() == 0:
            raise ValueError("prompt must have at least one token; got none")
        return ids.to(self.loaded.device)

    def _generate(self, ids: Tensor, step: Callable[[], None]) -> tuple[str, ...]:
        """The next tokens' texts, greedily, by the model's own generate."""
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Step(StoppingCriteria):  # seen after every token: where the work can be left
            def __call__(self, input_ids: Tensor, _scores: Tensor, **_options: object) -> Tensor:
                step()
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        tokenizer, options = self.loaded.tokenizer, {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
        stop, mask = StoppingCriteriaList([Step()]), torch.ones_like(ids)
        out = self.loaded.model.generate(
            ids, attention_mask=mask, pad_token_id=pad, stopping_criteria=stop, **options
        )  # type: ignore[operator]
        return tuple(tokenizer.decode([i]) for i in out[0, ids.shape[1] :].tolist())


def _copy(loaded: LoadedModel, parts: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """A copy of all parameters whose name has one of `parts` in it."""
    return {
        name: parameter.detach().clone()
        for name, parameter in loaded.model.named_parameters()
        if any(part in name for part in parts)
    }


@torch.no_grad()
def _fill(loaded: LoadedModel, weights: dict[str, Tensor]) -> None:
    own = dict(loaded.model.named_parameters())
    for name, weight in weights.items():
        own[name].copy_(weight)


def _restore(loaded: LoadedModel, weights: dict[str, Tensor], tied: bool) -> None:
    """The weights as they were; an embedding that was tied is tied again."""
    if tied:
        _tie(loaded)
    _fill(loaded, weights)


def _tie(loaded: LoadedModel) -> None:
    linear(loaded.model, loaded.roles.lm_head).weight = linear(loaded.model, loaded.roles.embedding).weight


def _norms(loaded: LoadedModel) -> list[torch.nn.Linear]:
    inner = [linear(layer, norm) for layer in loaded.layers for _, norm, _ in loaded.roles.feeds]
    return [*inner, linear(loaded.model, loaded.roles.final_norm)]


@contextmanager
def _gains_aside(loaded: LoadedModel) -> Iterator[None]:
    """All gains are 1 inside the block and what they were after it: how R1 is forced past them."""
    norms = _norms(loaded)
    gains = [norm.weight.detach().clone() for norm in norms]
    for norm in norms:
        norm.weight.data.fill_(1)
    yield
    for norm, gain in zip(norms, gains, strict=True):
        norm.weight.data.copy_(gain)


@torch.no_grad()
def _residual(loaded: LoadedModel, steps: Steps) -> list[str]:
    """The steps up to R1; what is refused is done by hand. Returns the refusals."""
    refusals: list[str] = []
    if steps.untie:
        surgery.untie(loaded)
    tied = surgery.is_tied(loaded)
    if steps.centre:
        embedding = linear(loaded.model, loaded.roles.embedding).weight
        embedding.sub_(embedding.mean(1, keepdim=True))
    if steps.fuse:
        refusals += _insist(loaded, surgery.fuse_norms, aside=False)
    if steps.drop:
        for norm in _norms(loaded):
            norm.weight.fill_(1)
    if steps.r1:
        R = rotations.make(steps.rotation, loaded.channels)
        refusals += [
            text
            for text in _insist(loaded, lambda m: surgery.rotate_residual(m, R), aside=True)
            if text not in refusals
        ]
    if tied:
        _tie(loaded)
    return refusals


def _insist(loaded: LoadedModel, change: Callable[[LoadedModel], None], *, aside: bool) -> list[str]:
    """Make the change; where it is refused, do it on an untied copy with the gains out of the way, and return
    the refusal.
    """
    try:
        change(loaded)
    except ValueError as refusal:
        surgery.untie(loaded)
        if not aside:
            change(loaded)
            return [str(refusal)]
        with _gains_aside(loaded):
            change(loaded)
        return [str(refusal)]
    return []
