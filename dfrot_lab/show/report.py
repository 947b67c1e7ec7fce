"""A report to send to a colleague: one HTML file (`report.html.j2`) that fetches nothing when opened."""

import hashlib
import io
import shlex
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.disk.provenance import commit, version_of
from dfrot_lab.maths import tables
from dfrot_lab.model import corpus, loading
from dfrot_lab.model.public import origin, public
from dfrot_lab.observe.massive import doubt
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import MASSIVE_RULES, PACKAGED, WINDOW, CorpusSpec, Recipe
from dfrot_lab.show import figures, gallery, live, ranks
from dfrot_lab.show.theme import visible
from dfrot_lab.study import cost, main, paper
from dfrot_lab.study.progress import Progress
from dfrot_lab.study.setting import Setting, figure_site

PACKAGES = ("dfrot-lab", "torch", "transformers", "numpy", "matplotlib")
SCRIPTS = Path(__file__).with_name("report.js"), ranks.SCRIPT


@dataclass(frozen=True)
class Findings:
    """What a report shows: the main job's stored result, the rows missing, massive tokens, token errors,
    the most massive token on its way to rotations (`live.turning`), the leaderboard (`ranks.listed`)."""

    result: main.MainResult
    missing: list[Recipe]
    massive: pd.DataFrame
    errors: pd.DataFrame
    turning: Mapping[str, Any]
    board: Mapping[str, Any]


def collect(setting: Setting, store: Store | None = None) -> Findings:
    """The main results of `setting` that are stored; of long work the capture alone, if it is missing."""
    store, setting = store or Store(), setting.resolved()
    progress = Progress([cost.preparation(setting, store)[0], 2, 2, 6])  # measured on 2 cores
    progress.begin("activations of the first calibration window")
    result = main.stored(setting, store)
    missing = [
        spec for spec in main.recipes(main.rows_by_build(main.rows, setting)) if spec not in result.found
    ]
    progress.begin("massive tokens")
    massive = gallery.massive_table(result)
    progress.begin("errors of every token")
    site = figure_site(result.capture.sites)
    errors = result.errors([site])
    progress.begin("figures and page")
    turning = live.turning(result, site, result.capture.largest(site))
    return Findings(result, missing, massive, errors, turning, ranks.listed(setting, store))


def script() -> str:
    """The page's own script."""
    return "\n".join(file.read_text(encoding="utf-8") for file in SCRIPTS)


def page(values: Mapping[str, Any]) -> str:
    """The whole report as HTML, of its `values`, all escaped but the script. It loads nothing and runs its
    own script alone, which its Content-Security-Policy names by its hash."""
    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True}
    pages = Environment(loader=PackageLoader("dfrot_lab", "show"), **options)
    pages.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    pages.filters["sha256"] = lambda script: b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return pages.get_template("report.html.j2").render(values)


def values(findings: Findings) -> dict[str, Any]:
    """What the page shows, by the names the template uses."""
    result, table, massive = findings.result, findings.result.table, findings.massive
    setting, refined = public(result.setting), result.refinement
    with figures.theme():
        drawn = gallery.main_figures(result, findings.errors)
        pictures = {name: _svg(figure) for name, (figure, _) in drawn.items()}
    last = len(refined.history) - 1 if refined else 0
    lines = np.unique(np.linspace(0, last, 12).round().astype(int))  # of a history, first and last with them
    alone = Counter(f"{main.row_label(spec)} {spec.bits}" for spec in findings.missing)
    gaps = table[
        table["metric"].eq(tables.change("RH")) & table["rotation"].eq("RO") & ~table["keep_out"].eq(True)
    ]
    gap: Any = None if gaps.empty else gaps.iloc[0].to_dict()
    beside = paper.beside_rows(table)
    beside.insert(1, "ours", beside.pop("ours").map("{:,.2f}".format))  # before models: always in sight
    return {
        "model": setting.model.source, "packaged": result.setting.model.source in PACKAGED,
        "corpus": setting.corpus, "windows": setting.windows, "window": result.capture.tokens,
        "site": figure_site(result.capture.sites), "quantizer": setting.refine.quantizer.name,
        "about": about(findings), "command": command(setting),
        "missing": pd.DataFrame([*alone.items()], columns=["row", "builds that are missing"]),
        "massive": gallery.most_massive(massive), "doubt": doubt(result.capture, setting.rule),
        "any_massive": bool(findings.errors["massive"].any()), "tokens": massive_tokens(massive), "shown": 8,
        "by_sun": massive.loc[massive["sun"], "token"].nunique(),
        "script": Markup(script()), "channels": result.capture.channels,
        "gap": gap and {"bits": gap["bits"], "cell": tables.cell(gap)},
        "live": {
            "tokens": live.tokens(findings.errors), "turning": findings.turning, "board": findings.board
        },
        "steps": live.STEPS,
        "pictures": pictures,
        "history": refined and refined.history.iloc[lines].round(4), "paper": beside.fillna(""),
        "comparison": tables.comparison(table) if result.found else None,
        "differences": gallery.differences(table), "builds": setting.builds,
        "resolution": gallery.resolution(table),
    }  # fmt: skip


def _svg(figure: Figure) -> str:
    """A figure as base64 SVG; it is closed."""
    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    figures.plt.close(figure)
    return b64encode(data.getvalue()).decode()


def about(findings: Findings) -> pd.DataFrame:
    """What the report is of, as lines: what, value."""
    setting, recorded = findings.result.setting, findings.result.capture
    shown, manifest = public(setting), recorded.artefact.manifest
    texts = {split: CorpusSpec(name=setting.corpus, split=split) for split in ("calibration", "evaluation")}
    on = f"on the first {recorded.tokens} calibration tokens"
    lines = {
        "model": shown.model.source,
        "made from": origin(str(manifest["note"]["provenance"]), setting.model),
        "model's content hash": loading.fingerprint(setting.model), "text": shown.corpus,
        **{f"{split} text, sha256": corpus.fingerprint(spec) for split, spec in texts.items()},
        "evaluation": f"{setting.builds} builds of {setting.windows} windows of {setting.window} tokens",
        "seeds of the rotations": f"from {setting.seed}, one a build",
        "refinement": f"gamma {setting.gamma:g}, rule {setting.rule}, {setting.steps} steps, {on}",
        "rotations and weights": f"{', '.join(registry.rows())}; {', '.join(registry.WEIGHTS)}",
        "family, device": f"{manifest['note']['family']}, {setting.model.device}",
        "capture": f"{recorded.key}, recorded {manifest['created']}",
        "versions": ", ".join(f"{name} {version_of(name)}" for name in PACKAGES),
        "code": commit() or "no checkout", "report made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }  # fmt: skip
    return pd.DataFrame({"what": list(lines), "value": [str(value) for value in lines.values()]})


def massive_tokens(table: pd.DataFrame) -> pd.DataFrame:
    """A line a token of `massive_table`: text, largest |value|, where, at how many sites by each rule."""
    top = table.drop_duplicates("token").set_index("token")
    whole = "{:,.0f}".format
    shown = {
        "text": top["text"].map(visible), "largest |value|": top["residual_max"].map(whole),
        "times the median": top["ratio_to_median"].map(whole), "channel": top["channel"], "at": top["site"],
    }  # fmt: skip
    counts = table.groupby("token")[list(MASSIVE_RULES)].sum().add_prefix("sites by ")
    return pd.DataFrame(shown).join(counts).reset_index()


def command(setting: Setting) -> str:
    """The command that computes every row a report of `setting` shows."""
    own = f"--builds {setting.builds} --gamma {setting.gamma:g} --rule {setting.rule}"
    own += "" if setting.window == WINDOW else f" --window {setting.window}"
    return f"dfrot-lab run {_options(setting, setting.seed)} {own}"


def _options(setting: Setting, seed: int) -> str:
    model, text = map(shlex.quote, (setting.model.source, setting.corpus))
    own = f" --calibration {shlex.quote(setting.calibration)}" if setting.calibration else ""
    dtype = setting.model.dtype
    own += (
        "" if dtype == "auto" or (dtype, setting.model.device) == ("float32", "cpu") else f" --dtype {dtype}"
    )
    return f"--model {model} --corpus {text}{own} --seed {seed} --windows {setting.windows}"
