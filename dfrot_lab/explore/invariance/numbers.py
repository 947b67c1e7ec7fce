"""Any set of surgery steps tried on one model, by hand where refused: the logits, the text, what is wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dfrot_lab.explore.generate.numbers import continuation, prompt_ids
from dfrot_lab.maths import rotations
from dfrot_lab.model import surgery
from dfrot_lab.model.loading import LoadedModel, linear
from dfrot_lab.recipe.specs import RotationSpec

TOLERANCE = 2e-5  # relative error of logits that float32 may cause in 30 layers; mistakes: 100 times more
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
}  # every switch and its label, in the order the steps are taken
SHORT = ("untie", "centre", "fuse", "gains to 1", "R1", "R2", "R3", "R4 fused", "R4 online")

WHERE = {
    "tied": ("head",), "gain": ("read", "head"), "drop": ("read", "head"), "centre": ("stream",),
    "r4_fused": ("down",), "r4_online": ("down",),
}  # fmt: skip
"""The wires of the picture of one layer (`show.block`) on which a fault is first felt."""
WHY = {
    "tied": "lm_head and the embedding are one tensor: the head needs the final norm's gain, the embedding "
    "must not have it.",
    "gain": "R1 without fused gains: a gain scales channels, R1 mixes them, and the two do not commute.",
    "drop": "The gains were set to 1 and nothing took them over: the check before R1 is content with that, "
    "the logits are not.",
    "centre": "RMSNorm does not subtract a mean, so an embedding without its mean is another embedding "
    "(LayerNorm would not see it).",
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
        on = [name for key, name in zip(STEPS, SHORT, strict=True) if getattr(self, key)]
        return " + ".join(on).replace("R1", f"R1 ({self.rotation.name})") or "untouched"

    @property
    def acting(self) -> tuple[str, ...]:
        """The rotations that are on, as `show.block` calls them."""
        by = {"r1": "R1", "r2": "R2", "r3": "R3", "r4_fused": "R4", "r4_online": "R4 online"}
        return tuple(name for key, name in by.items() if getattr(self, key))

    @property
    def residual(self) -> "Steps":
        """The part that changes every weight: what is worth keeping between two trials."""
        return replace(self, r2=False, r3=False, r4_fused=False, r4_online=False)


def faults(steps: Steps, tied: bool) -> list[str]:
    """Why `steps` change the logits of a model, `tied` or not: names of WHY, none for a right set."""
    found = {
        "tied": tied and not steps.untie and steps.fuse,
        "gain": steps.r1 and not steps.fuse and not steps.drop,
        "drop": steps.drop and not steps.fuse,
        "centre": steps.centre,
        "r4_fused": steps.r4_fused and not steps.r4_online,
        "r4_online": steps.r4_online and not steps.r4_fused,
    }
    return [name for name, is_so in found.items() if is_so]


@dataclass(frozen=True)
class Outcome:
    """A trial: relative error of the logits, tokens written, why it is wrong (of WHY), what was refused."""

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
    def reasons(self) -> tuple[str, ...]:
        """A sentence for each fault."""
        return tuple(WHY[name] for name in self.faults)

    @property
    def wires(self) -> tuple[str, ...]:
        """Where in a layer the faults are first felt; nowhere if the logits stay."""
        return tuple(dict.fromkeys(wire for name in self.faults for wire in WHERE[name] if self.broken))

    @property
    def verdict(self) -> str:
        """One paragraph for the reader."""
        if not self.broken:
            return f"The logits stay: relative error {self.error:.1e}, tolerance {TOLERANCE:g}."
        refused = "The package refuses this: \u201c{}\u201d. Done by hand all the same:"
        reasons = self.reasons or ("No known reason: please report it.",)
        moved = f"the logits move by {self.error:.1e}."
        return " ".join([*map(refused.format, self.refusals), moved, *reasons])


class Bench:
    """A model and a copy of its weights, so that sets of steps can be tried on it one after the other."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, self.tied = loaded, surgery.is_tied(loaded)
        self._pristine = self._copy("")
        self._tail: dict[str, Tensor] = {}
        self._base: Steps | None = None
        self._truth: tuple[str, Tensor] | None = None

    @torch.no_grad()
    def measure(self, steps: Steps, prompt: str, step: Callable[[], None] = lambda: None) -> Outcome:
        """Try `steps` on `prompt` (ValueError if empty or too long); `step` is called between the parts."""
        loaded = self.loaded
        ids = prompt_ids(loaded, prompt, NEW_TOKENS).to(loaded.device)
        if self._truth is None or self._truth[0] != prompt:
            self.apply(Steps())
            self._truth = (prompt, loaded.model(ids[None]).logits)
        step()
        refusals = self.apply(steps)
        step()
        with surgery.online(loaded, r3=steps.r3, r4=steps.r4_online):
            logits = loaded.model(ids[None]).logits
            step()
            written = continuation(loaded, ids, NEW_TOKENS, lambda _id: step())
        tokens = tuple(loaded.tokenizer.decode([i]) for i in written)
        error = float((logits - self._truth[1]).norm() / self._truth[1].norm())
        return Outcome(steps, error, tokens, tuple(faults(steps, self.tied)), tuple(refusals))

    @torch.no_grad()
    def apply(self, steps: Steps) -> list[str]:
        """Change the model's weights as `steps` say, from its own ones; returns the package's refusals."""
        loaded, roles = self.loaded, self.loaded.roles
        if self._base == steps.residual:
            loaded.model.load_state_dict(self._tail, strict=False)
        else:
            self._base = None  # what follows may end half-way
            if self.tied:
                _tie(loaded)
            loaded.model.load_state_dict(self._pristine, strict=False)
            self._refusals = _residual(loaded, steps)
            # what R2 and R4 change: this copy spares the many products of R1 at the next trial
            self._tail = self._copy(*(f".{name.split('.')[-1]}." for name in (roles.v, roles.o, roles.down)))
            self._base = steps.residual
        if steps.r2:
            surgery.rotate_heads(loaded)
        if steps.r4_fused:
            surgery.rotate_down(loaded)
        return self._refusals

    def _copy(self, *parts: str) -> dict[str, Tensor]:
        """A copy of the parameters whose name has one of `parts` in it."""
        named = self.loaded.model.named_parameters()
        return {name: p.detach().clone() for name, p in named if any(part in name for part in parts)}


def _tie(loaded: LoadedModel) -> None:
    linear(loaded.model, loaded.roles.lm_head).weight = linear(loaded.model, loaded.roles.embedding).weight


def _gains(loaded: LoadedModel) -> list[Tensor]:
    norms = [norm for _, norm, _ in loaded.roles.feeds if norm]
    inner = [linear(layer, norm).weight for layer in loaded.layers for norm in norms]
    return [*inner, linear(loaded.model, loaded.roles.final_norm).weight]


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
        refusals += _insist(loaded, surgery.fuse_norms)
    if steps.drop:
        for gain in _gains(loaded):
            gain.fill_(1)
    if steps.r1:
        R = rotations.make(steps.rotation, loaded.channels)
        refusals += _insist(loaded, lambda model: surgery.rotate_residual(model, R), aside=True)
    if tied:
        _tie(loaded)
    return list(dict.fromkeys(refusals))


def _insist(loaded: LoadedModel, change: Callable[[LoadedModel], None], *, aside: bool = False) -> list[str]:
    """Make the change; where refused, on an untied model, its gains `aside` (set to 1, and back)."""
    try:
        change(loaded)
    except ValueError as refusal:
        surgery.untie(loaded)
        kept = [(gain, gain.clone()) for gain in _gains(loaded)] if aside else []
        for gain, _ in kept:
            gain.fill_(1)
        change(loaded)
        for gain, value in kept:
            gain.copy_(value)
        return [str(refusal)]
    return []
