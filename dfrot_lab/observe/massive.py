"""Find massive tokens by a named rule, and say how extreme they are.

| rule | a token is massive at a site when | source |
|---|---|---|
| ratio_8 | its largest residual value is > 8 x the median token's largest | here: the portable one |
| ratio_64 | the same with 64 | PrefixQuant's 64, arXiv 2410.05265; it looks at inputs of linears |
| sun | a residual value > 100 is >= 1000 x the median value there | Sun et al., arXiv 2402.17762 |
| nr_error_8.5 | root E(NR) of its row, symmetric 4-bit, is < 8.5 sqrt(C / 4096) | DFRot's code, to refine |
| nr_error_9.5 | the same with 9.5 | DFRot's code, to keep tokens out |
| ro_vs_nr | E(RO) >= E(NR) of its row, symmetric 4-bit | DFRot's code, for Mistral |

Values are absolute ones. The first three rules need a Capture's residual stream, the others the row alone: a
massive one lies on a symmetric grid already, by its one large entry, so its unrotated error is *small*. For
keeping tokens out, the activations' own quantizer takes the symmetric one's place, as in DFRot's code."""

import logging
from collections.abc import Sequence
from functools import cache

import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.grids import SYM4, QuantSpec
from dfrot_lab.recipe.specs import MASSIVE_RULES, ROW_RULES, RotationSpec

log = logging.getLogger(__name__)
SUN_ABSOLUTE, SUN_RATIO = 100.0, 1000.0
NR_ERROR_CHANNELS = 4096


@cache
def _reference_ro(channels: int) -> Tensor:
    """The RO matrix the ro_vs_nr rule compares with: seed 0."""
    return rotations.make(RotationSpec(kind="RO"), channels).float()


def threshold(rule: str) -> float:
    """The number in a rule's name: 8.5 of `nr_error_8.5`."""
    return float(rule.rsplit("_", 1)[-1])


def rows_rule(x: Tensor, rule: str, quantizer: QuantSpec = SYM4) -> Tensor:
    """Massive mask (tokens,) of normalised, unrotated rows (tokens, channels), by a rule of ROW_RULES with
    errors of `quantizer`: the released optimiser's, or that of the activations whose tokens are kept out."""
    said = f"{', '.join(ROW_RULES)} for rows alone (the others need the residual stream of a Capture)"
    require("rule", repr(rule), rule in ROW_RULES, f"one of {said}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # the sum of squares of 16 bits would be off by 1%
    error = squared_error(x, quantizer)
    if rule == "ro_vs_nr":
        return squared_error(x @ _reference_ro(x.shape[-1]).to(x), quantizer) >= error
    return error.sqrt() < threshold(rule) * (x.shape[-1] / NR_ERROR_CHANNELS) ** 0.5


def residual_rule(magnitude: Tensor, median: Tensor, rule: str) -> Tensor:
    """Massive mask (sites, tokens) from each token's largest |value| and each site's median; ValueError."""
    if rule == "sun":
        return (magnitude > SUN_ABSOLUTE) & (magnitude >= SUN_RATIO * median[:, None])
    is_ratio = rule in MASSIVE_RULES and rule not in ROW_RULES
    require("rule", repr(rule), is_ratio, "sun or a ratio for the residual stream")
    return magnitude > threshold(rule) * magnitude.median(dim=1, keepdim=True).values


def find(capture: Capture, rule: str, sites: Sequence[str] | None = None) -> Tensor:
    """Massive mask (sites, tokens) of a capture by one of the rules, at all its sites or those named."""
    require("rule", repr(rule), rule in MASSIVE_RULES, f"one of {', '.join(MASSIVE_RULES)}")
    chosen = capture.sites if sites is None else list(sites)
    if rule in ROW_RULES:
        return torch.stack([rows_rule(capture.rows(site), rule) for site in chosen])
    places = [capture.place(site) for site in chosen]
    return residual_rule(capture.residual_max[places], capture.residual_median[places], rule)


def doubt(capture: Capture, rule: str) -> str | None:
    """What is odd about the rows a rule marks, if anything: none, over 2%, or rows no other rule marks."""
    mask = find(capture, rule)
    marked = int(mask.sum())
    if not marked:
        return f"no token is massive by {rule}: there is none to look at, and gamma has no effect"
    said = f"rule {rule} marks {marked} rows, "
    if marked > 0.02 * mask.numel():
        return f"{said}{marked / mask.numel():.1%} of all: more than rare tokens; look at the others"
    others = [other for other in MASSIVE_RULES if not other.startswith(rule.rsplit("_", 1)[0])]
    alone = int((mask & ~torch.stack([find(capture, other) for other in others]).any(0)).sum())
    return f"{said}{alone} of which no other rule calls massive" if alone > marked / 2 else None


def warn(capture: Capture, rule: str) -> None:
    """Say once a process what is odd about the rows a rule marks."""
    if said := doubt(capture, rule):
        _warn_once(capture.key, said)


@cache
def _warn_once(_capture: str, said: str) -> None:
    log.warning("%s", said)


def table(capture: Capture) -> pd.DataFrame:
    """A row a (site, token) that any rule calls massive: residual maximum, channel, median, ratio, rules."""
    masks = {rule: find(capture, rule) for rule in MASSIVE_RULES}
    site, token = torch.stack(list(masks.values())).any(0).nonzero(as_tuple=True)
    largest, median = capture.residual_max[site, token], capture.residual_median[site]
    words = [capture.texts[i] for i in token.tolist()]
    about = {"site": [capture.sites[i] for i in site.tolist()], "token": token, "text": words}
    about |= {"residual_max": largest, "channel": capture.residual_channel[site, token]}
    about |= {"median": median, "ratio_to_median": largest / median}
    return pd.DataFrame({**about, **{rule: mask[site, token] for rule, mask in masks.items()}})
