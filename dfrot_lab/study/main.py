"""The main job, what `make run` does: capture, refine, evaluate every rotation at every setting of the bits.
And the experiments that look at single tokens of its capture."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.observe import capture as captures
from dfrot_lab.observe import errors, massive, residual
from dfrot_lab.recipe.specs import RELEASED_KEEP_OUT
from dfrot_lab.rotate import dfrot
from dfrot_lab.rotate.steps import RefineResult
from dfrot_lab.study import cost, runner
from dfrot_lab.study.runner import Found, Row
from dfrot_lab.study.setting import FIGURE_LAYER, Setting

log = logging.getLogger(__name__)

BITS = ("16-4-16", "4-4-16", "4-4-4")


def rows(setting: Setting) -> list[Row]:
    """Full precision; NR, RO, RH, DFRot at all bits, RO and RH also with massive tokens kept out; then RO and
    RH at 16-4-16 with more seeds. Each rotation is compared with RH at the same bits, each keep-out row with
    its own rotation. Rows that share a built model stand side by side."""
    found = [Row(setting.row("16-16-16", setting.rotation("NR")))]
    for name in ("NR", "RO", "RH", "DFRot"):
        for bits in BITS:
            plain, rh = (setting.row(bits, setting.method(method)) for method in (name, "RH"))
            found.append(Row(plain, against={} if name == "RH" else {"RH": rh}))
            if name in ("RO", "RH"):
                found.append(Row(plain.with_(keep_out=RELEASED_KEEP_OUT), against={name: plain}))
    for offset in range(1, setting.seeds):
        ro, rh = (setting.row(BITS[0], setting.rotation(kind, offset)) for kind in ("RO", "RH"))
        found += [Row(ro, against={"RH": rh}), Row(rh)]
    return found


@dataclass(frozen=True)
class MainResult:
    """What the main job found: the capture, the refinement if there is one, rows as a table, evaluations."""

    setting: Setting
    capture: captures.Capture
    refinement: RefineResult | None
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    found: Found = field(default_factory=dict)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """NR, RO, RH and, where there is a refinement, DFRot: float64 (channels, channels) each."""
        refined = {} if self.refinement is None else {"DFRot": self.refinement.R}
        return {**errors.default_rotations(self.capture.channels, self.setting.seed), **refined}

    def errors(self, sites: Sequence[str] | None = None) -> pd.DataFrame:
        """Each token's squared error at all sites or those named, a column a rotation, by the evaluation's
        and the refinement's own quantizer; massive by the setting's rule."""
        quantizers, rule = [self.setting.refine.quantizer], self.setting.rule
        return errors.wide(
            errors.token_errors(self.capture, self.matrices, quantizers, sites=sites, rule=rule)
        )


def run(setting: Setting, store: Store | None = None) -> MainResult:
    """Capture, refine, evaluate every row; what is stored is reused, a stopped run goes on where it was."""
    store, setting = store or Store(), setting.resolved()
    log.info("model %s, corpus %s, device %s", setting.model.source, setting.corpus, setting.model.device)
    progress = cost.Progress(cost.preparation(setting, store))
    progress.begin("capturing activations")
    recorded = captures.capture(setting.capture, store)
    progress.begin(f"refining R1 with gamma {setting.gamma:g}")
    refinement = dfrot.refined(setting.refine, store)
    return MainResult(setting, recorded, refinement, *runner.evaluated(rows(setting), store, progress))


def stored(setting: Setting, store: Store) -> MainResult:
    """As `run`, of what is stored; the capture alone is recorded if it is missing."""
    setting = setting.resolved()
    recorded, refinement = captures.capture(setting.capture, store), dfrot.stored(setting.refine, store)
    return MainResult(setting, recorded, refinement, *runner.looked_up(rows(setting), store))


def _prepared(setting: Setting, store: Store) -> MainResult:
    """The capture and the refinement, and no row."""
    return MainResult(setting, captures.capture(setting.capture, store), dfrot.refined(setting.refine, store))


def token_errors(setting: Setting, store: Store) -> pd.DataFrame:
    """Each token's squared error at every site under NR, RO, RH and DFRot, a column each; the first three's
    order (Fig. 2 and 3)."""
    table = _prepared(setting, store).errors()
    return table.assign(order=errors.orders(table))


def token_orders(setting: Setting, store: Store) -> pd.DataFrame:
    """How many tokens of each site have which order, and their mean errors: Fig. 2, 13 to 24 in numbers."""
    groups = token_errors(setting, store).groupby(["site", "order"], observed=True, sort=False)
    counts = groups[["NR", "RO", "RH", "DFRot"]].mean().assign(tokens=groups.size()).reset_index()
    about = {"model": setting.model.source, "corpus": setting.corpus}
    return counts.astype({"site": str, "order": str}).assign(**about)


def massive_magnitudes(setting: Setting, store: Store) -> pd.DataFrame:
    """Sun et al., Fig. 1: |residual stream| of the first tokens, all channels, in the middle of the model."""
    layers = len(captures.capture(setting.capture, store).sites) // 2
    return residual.magnitudes(setting.capture, min(FIGURE_LAYER, layers // 2), store=store)


def massive_token(setting: Setting, store: Store) -> pd.DataFrame:
    """The most massive token's values before and after quantization under each rotation, where it is massive
    (Fig. 4)."""
    prepared = _prepared(setting, store)
    recorded, made, quantizer = prepared.capture, prepared.matrices, setting.refine.quantizer
    token = int(recorded.residual_max.amax(0).argmax())
    first = recorded.sites[0].rsplit(".", 1)[-1]
    pairs = zip(recorded.sites, massive.find(recorded, "sun")[:, token].tolist(), strict=True)
    largest = recorded.sites[int(recorded.residual_max[:, token].argmax())]  # where no rule calls it massive
    sites = [site for site, heavy in pairs if heavy and site.endswith(first)] or [largest]
    values = [errors.massive_values(recorded, at, token, made, quantizer).assign(site=at) for at in sites]
    about = {"text": recorded.texts[token], "model": setting.model.source, "corpus": setting.corpus}
    return pd.concat(values, ignore_index=True).assign(token=token, **about)
