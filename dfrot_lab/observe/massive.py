"""Find massive tokens by a named rule, and say how extreme they are.

| rule | a token is massive at a site when | source |
|---|---|---|
| sun | its residual stream before the norm has an |a| > 100 that is >= 1000 x the median |a| there | Sun et al., arXiv 2402.17762, Sec. 2 |
| nr_error | root E(NR) of its normalised row, symmetric 4-bit, is < 8.5 sqrt(C / 4096) | DFRot's released code (8.5 at C = 4096) |
| ro_vs_nr | E(RO) >= E(NR) of its normalised row, symmetric 4-bit | DFRot's released code, its rule for Mistral |
| ratio | its largest |a| in the residual stream is > 64 x the median of all tokens' largest | PrefixQuant, arXiv 2410.05265 (upper outliers) |

The first and last need the residual stream, so they need a Capture; the other two need the normalised row
alone. A massive row has one entry that takes almost all of the norm sqrt(C), so it lies on a symmetric grid
already: that is why its unrotated error is *small*.
"""

from collections.abc import Sequence
from functools import cache

import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.maths import rotations
from dfrot_lab.maths.quantizers import squared_error
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import MASSIVE_RULES, QuantSpec, RotationSpec

SUN_ABSOLUTE, SUN_RATIO = 100.0, 1000.0
NR_ERROR_ROOT, NR_ERROR_CHANNELS = 8.5, 4096
KEEP_OUT_ROOT = 9.5
"""The released evaluation's own threshold for `QuaRot.FP16()`, a little wider than refinement's 8.5, at the
same C = 4096.
"""
PREFIX_RATIO = 64.0
ROWS_RULES = ("nr_error", "ro_vs_nr")
RULE_QUANTIZER = QuantSpec(bits=4, symmetric=True)


@cache
def _reference_ro(channels: int) -> Tensor:
    """The RO matrix the ro_vs_nr rule compares with: seed 0."""
    return rotations.make(RotationSpec(kind="RO", seed=0), channels).float()


def rows_rule(x: Tensor, rule: str, *, root: float = NR_ERROR_ROOT) -> Tensor:
    """Massive mask (tokens,) of normalised, unrotated rows `x` (tokens, channels) by `nr_error` or
    `ro_vs_nr`.

    `root` is the nr_error threshold at C = 4096; it scales with sqrt(C), as the row norm does.
    """
    if rule == "nr_error":
        return squared_error(x, RULE_QUANTIZER).sqrt() < root * (x.shape[-1] / NR_ERROR_CHANNELS) ** 0.5
    if rule == "ro_vs_nr":
        rotated = x @ _reference_ro(x.shape[-1]).to(x)
        return squared_error(rotated, RULE_QUANTIZER) >= squared_error(x, RULE_QUANTIZER)
    raise ValueError(
        f"rule must be nr_error or ro_vs_nr for rows alone (sun and ratio need the residual stream of a Capture); got {rule!r}"
    )


def residual_rule(magnitude: Tensor, median: Tensor, rule: str) -> Tensor:
    """Massive mask (sites, tokens) by `sun` or `ratio`, from each token's largest |a| in the residual stream
    and the median |a| (sites,).
    """
    if rule == "sun":
        return (magnitude > SUN_ABSOLUTE) & (magnitude >= SUN_RATIO * median[:, None])
    if rule == "ratio":
        return magnitude > PREFIX_RATIO * magnitude.median(dim=1, keepdim=True).values
    raise ValueError(f"rule must be sun or ratio for the residual stream; got {rule!r}")


def find(capture: Capture, rule: str, sites: Sequence[str] | None = None) -> Tensor:
    """Massive mask (sites, tokens) of a capture by one of the four rules, at all its sites or those named."""
    if rule not in MASSIVE_RULES:
        raise ValueError(f"rule must be one of {', '.join(MASSIVE_RULES)}; got {rule!r}")
    chosen = capture.sites if sites is None else list(sites)
    if rule in ROWS_RULES:
        return torch.stack([rows_rule(capture.rows(site), rule) for site in chosen])
    places = [capture.place(site) for site in chosen]
    return residual_rule(capture.residual_max[places], capture.residual_median[places], rule)


def table(capture: Capture) -> pd.DataFrame:
    """One row a (site, token) that any rule calls massive: residual maximum, its channel, the site's median,
    their ratio, and each rule's verdict.
    """
    masks = {rule: find(capture, rule) for rule in MASSIVE_RULES}
    any_rule = torch.stack(list(masks.values())).any(0)
    site, token = any_rule.nonzero(as_tuple=True)
    texts = capture.texts
    largest, median = capture.residual_max[site, token], capture.residual_median[site]
    return pd.DataFrame(
        {
            "site": [capture.sites[i] for i in site.tolist()],
            "token": token.numpy(),
            "text": [texts[i] for i in token.tolist()],
            "residual_max": largest.numpy(),
            "channel": capture.residual_channel[site, token].numpy(),
            "median": median.numpy(),
            "ratio_to_median": (largest / median).numpy(),
            **{rule: mask[site, token].numpy() for rule, mask in masks.items()},
        }
    )
