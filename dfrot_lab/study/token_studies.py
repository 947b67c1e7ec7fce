"""The experiments that look at single tokens: their errors, a massive token's values, the residual stream."""

import pandas as pd
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.observe import errors, massive, residual
from dfrot_lab.observe.capture import capture
from dfrot_lab.rotate import dfrot
from dfrot_lab.study.setting import FIGURE_LAYER, Setting


def token_errors(setting: Setting, store: Store) -> pd.DataFrame:
    """Each token's squared error at every site under NR, RO, RH and DFRot, a column each; the first three's
    order (Fig. 2 and 3)."""
    recorded = capture(setting.capture, store)
    rotation, quantizers = matrices(setting, store), [setting.refine.quantizer]
    table = errors.wide(errors.token_errors(recorded, rotation, quantizers, rule=setting.rule))
    return table.assign(order=errors.orders(table))


def token_orders(setting: Setting, store: Store) -> pd.DataFrame:
    """How many tokens of each site have which order, and their mean errors: Fig. 2 and 13 to 24 in
    numbers."""
    groups = token_errors(setting, store).groupby(["site", "order"], observed=True, sort=False)
    counts = groups[["NR", "RO", "RH", "DFRot"]].mean().assign(tokens=groups.size()).reset_index()
    about = {"model": setting.model.source, "corpus": setting.corpus}
    return counts.astype({"site": str, "order": str}).assign(**about)


def massive_magnitudes(setting: Setting, store: Store) -> pd.DataFrame:
    """Sun et al., Fig. 1: |residual stream| of the first tokens, all channels, in the middle of the model."""
    layers = len(capture(setting.capture, store).sites) // 2
    return residual.magnitudes(setting.capture, min(FIGURE_LAYER, layers // 2), store=store)


def massive_token(setting: Setting, store: Store) -> pd.DataFrame:
    """The most massive token's values before and after quantization under each rotation, where it is massive
    (Fig. 4)."""
    recorded = capture(setting.capture, store)
    token = int(recorded.residual_max.amax(0).argmax())
    first = recorded.sites[0].rsplit(".", 1)[-1]
    marked = massive.find(recorded, "sun")[:, token].tolist()
    pairs = zip(recorded.sites, marked, strict=True)
    largest = recorded.sites[int(recorded.residual_max[:, token].argmax())]  # where no rule calls it massive
    sites = [site for site, heavy in pairs if heavy and site.endswith(first)] or [largest]
    made, quantizer = matrices(setting, store), setting.refine.quantizer
    values = [
        errors.massive_values(recorded, site, token, made, quantizer).assign(site=site) for site in sites
    ]
    about = {"text": recorded.texts[token], "model": setting.model.source, "corpus": setting.corpus}
    return pd.concat(values, ignore_index=True).assign(token=token, **about)


def matrices(setting: Setting, store: Store) -> dict[str, Tensor]:
    """NR, RO, RH of the setting's seed and its DFRot: float64 (channels, channels) each."""
    random = errors.default_rotations(capture(setting.capture, store).channels, setting.seed)
    return {**random, "DFRot": dfrot.refined(setting.refine, store).R}
