"""The main job, what `make run` does: capture, refine, evaluate every rotation at every setting of the
bits."""

import logging
from dataclasses import dataclass

import pandas as pd

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.observe import capture as captures
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe.specs import RELEASED_KEEP_OUT
from dfrot_lab.rotate import dfrot
from dfrot_lab.rotate.steps import Refined
from dfrot_lab.study import cost, runner
from dfrot_lab.study.cost import Progress
from dfrot_lab.study.runner import Found, Row
from dfrot_lab.study.setting import Setting

log = logging.getLogger(__name__)

BITS = ("16-4-16", "4-4-16", "4-4-4")


def rows(setting: Setting) -> list[Row]:
    """Full precision; NR, RO, RH, DFRot at all bits, RO and RH also with massive tokens kept out; then RO and
    RH at 16-4-16 with more seeds. Each rotation is compared with RH at the same bits, each keep-out row with
    its own rotation. Rows that share a built model stand side by side."""
    rotations = [(name, setting.method(name)) for name in ("NR", "RO", "RH", "DFRot")]
    found = [Row(setting.row("16-16-16", setting.rotation("NR")))]
    for name, rotation in rotations:
        for bits in BITS:
            plain, rh = setting.row(bits, rotation), setting.row(bits, setting.rotation("RH"))
            found.append(Row(plain, against={} if name == "RH" else {"RH": rh}))
            if name in ("RO", "RH"):
                found.append(Row(plain.with_(keep_out=RELEASED_KEEP_OUT), against={name: plain}))
    for offset in range(1, setting.seeds):
        ro, rh = (setting.row(BITS[0], setting.rotation(kind, offset)) for kind in ("RO", "RH"))
        found += [Row(ro, against={"RH": rh}), Row(rh)]
    return found


@dataclass(frozen=True)
class MainResult:
    """What the main job found: rows as a table, evaluations, the capture, the refinement if there is one."""

    setting: Setting
    table: pd.DataFrame
    found: Found
    capture: Capture
    refinement: Refined | None


def run(setting: Setting, store: Store | None = None) -> MainResult:
    """Capture, refine, evaluate every row; what is stored is reused, a stopped run goes on where it was."""
    store, setting = store or Store(), setting.resolved()
    log.info("model %s, corpus %s, device %s", setting.model.source, setting.corpus, setting.model.device)
    asked, progress = rows(setting), Progress()
    progress.extend(cost.preparation(setting, store))
    progress.begin("capturing activations")
    recorded = captures.capture(setting.capture, store)
    progress.begin(f"refining R1 with gamma {setting.gamma:g}")
    refinement = dfrot.refined(setting.refine, store)
    table, found = runner.evaluated(asked, store, progress)
    return MainResult(setting, table, found, recorded, refinement)


def stored(setting: Setting, store: Store) -> MainResult:
    """As `run`, of what is stored; the capture alone is recorded if it is missing."""
    setting = setting.resolved()
    found = runner.looked_up(rows(setting), store)
    recorded, refinement = captures.capture(setting.capture, store), dfrot.stored(setting.refine, store)
    return MainResult(setting, runner.table_of(rows(setting), found), found, recorded, refinement)
