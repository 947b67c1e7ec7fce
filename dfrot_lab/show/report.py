"""A report to send to a colleague: one HTML file with a model's main results, figures and data inside,
nothing fetched when it is opened.
"""

import shlex
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.disk.atomic import replacing
from dfrot_lab.model import corpus, loading
from dfrot_lab.observe import capture as captures
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.specs import DEFAULT_MODEL, CorpusSpec, EvalSpec, RefineSpec
from dfrot_lab.rotate import dfrot
from dfrot_lab.score import perplexity, results
from dfrot_lab.score.perplexity import EvalResult
from dfrot_lab.show import figures, main_figures, report_page
from dfrot_lab.show.markup import visible
from dfrot_lab.show.report_page import figure_html, note, paragraph, section, table_html
from dfrot_lab.study import mainjob, paper
from dfrot_lab.study.mainjob import MainResult, Progress
from dfrot_lab.study.setting import Setting

PACKAGES = ("dfrot-lab", "torch", "transformers", "numpy", "matplotlib", "plotly")
SHOWN_TOKENS = 15
"""Massive tokens listed, the most extreme first; the rest are counted."""
SECONDS = {"capture": mainjob.NOMINAL_SECONDS["capture"], "tokens": 2.0, "errors": 2.0, "figures": 6.0}
"""Nominal seconds of each part on 2 cores with the default model."""


@dataclass(frozen=True)
class Findings:
    """What a report shows: the main job's result as far as it is stored, the rows that are not, and tables of
    massive tokens and token errors.
    """

    result: MainResult
    found: list[EvalResult]
    missing: list[EvalSpec]
    massive: pd.DataFrame
    errors: pd.DataFrame


def collect(setting: Setting, store: Store | None = None) -> Findings:
    """The main results of `setting` that are stored. The capture is recorded if it is missing; nothing else
    is computed that takes long.
    """
    store, setting = store or Store(), setting.resolved()
    there = captures.stored(setting.capture, store) is not None
    progress = Progress(
        [0.0 if there else SECONDS["capture"], SECONDS["tokens"], SECONDS["errors"], SECONDS["figures"]]
    )
    progress.begin("activations of the first calibration window")
    recorded = capture(setting.capture, store)
    specs, text_key = mainjob.main_specs(setting), cache(corpus.fingerprint)
    looked_up = {spec: perplexity.stored(spec, store, text_key) for spec in specs}
    found = [result for result in looked_up.values() if result]
    result = MainResult(setting, mainjob.main_table(found), recorded, dfrot.stored(setting.refine, store))
    progress.begin("massive tokens")
    massive = main_figures.massive_table(result)
    progress.begin("errors of every token")
    errors = main_figures.error_table(result)
    progress.begin("figures and page")
    return Findings(result, found, [spec for spec in specs if looked_up[spec] is None], massive, errors)


def page(findings: Findings) -> str:
    """The whole report as HTML."""
    setting = findings.result.setting
    with figures.theme():
        drawn = {
            name: figure
            for name, (figure, _) in main_figures.main_figures(findings.result, findings.errors).items()
        }
    sections = [
        section("What was measured", table_html(about(findings), index=False)),
        section("Massive tokens", *_massive_tokens(findings)),
        section("Quantization error of every token", *_token_errors(findings, drawn)),
        section(
            "The residual stream" + (" and the refined rotation" if findings.result.refinement else ""),
            *_refinement(findings, drawn),
        ),
        section("What a rotation is worth: perplexity", *_perplexity(findings, drawn)),
        section("The paper's numbers beside ours", *_paper(findings)),
        section("Limits", *map(paragraph, limits(setting))),
    ]
    return report_page.document(f"DFRot Lab: {named(setting.model.source)}", _abstract(findings), sections)


def named(source: str) -> str:
    """A model or text as a reader of the report needs it: of a file or folder its name, not where it lies on
    this machine.
    """
    return Path(source).name if Path(source).expanduser().exists() else source


def about(findings: Findings) -> pd.DataFrame:
    """What the report is of, as lines: what, value."""
    setting, recorded = findings.result.setting, findings.result.capture
    manifest = recorded.artefact.manifest
    where = str(manifest["note"]["provenance"])
    texts = {split: CorpusSpec(name=setting.corpus, split=split) for split in ("calibration", "evaluation")}
    lines: dict[str, Any] = {
        "model": named(setting.model.source),
        "made from": where
        if setting.model.source == DEFAULT_MODEL
        else f"{where.split(' ', 1)[0]} {named(setting.model.source)}",
        "model's content hash": loading.fingerprint(setting.model),
        "text": named(setting.corpus),
        **{f"{split} text, sha256": corpus.fingerprint(spec) for split, spec in texts.items()},
        "evaluation": f"{setting.windows} windows of {setting.window} tokens",
        "seed of the rotations": setting.seed,
        "refinement": f"gamma {setting.gamma:g}, {setting.steps} steps, on the first {recorded.tokens} calibration tokens",
        "capture": f"{recorded.key}, recorded {manifest['created']}",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
        "code": results.commit() or "no checkout",
        "report made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    return pd.DataFrame({"what": list(lines), "value": [str(value) for value in lines.values()]})


def massive_tokens(table: pd.DataFrame) -> pd.DataFrame:
    """A line a token of `massive.table`, the most extreme first: its text, largest |value|, where, and at how
    many sites each rule marks it.
    """
    top = table.sort_values("residual_max", ascending=False).drop_duplicates("token").set_index("token")
    rules = ["sun", "nr_error", "ro_vs_nr", "ratio"]
    counts = table.groupby("token")[rules].sum().loc[top.index]
    shown = pd.DataFrame(
        {
            "token": top.index,
            "text": top["text"].map(visible),
            "largest |value|": top["residual_max"].map("{:,.0f}".format),
        }
    )
    shown = shown.assign(
        **{
            "times the median": top["ratio_to_median"].map("{:,.0f}".format),
            "channel": top["channel"],
            "at": top["site"],
        }
    )
    return shown.join(counts.add_prefix("sites by ")).reset_index(drop=True)


def command(setting: Setting) -> str:
    """The command that computes every row a report of `setting` shows."""
    return f"dfrot-lab run {_options(setting, setting.seed)} --gamma {setting.gamma:g}"


def public(setting: Setting) -> Setting:
    """`setting` with a model's or text's own path cut to its name: what a page that is sent away may say."""
    return replace(
        setting, model=setting.model.with_(source=named(setting.model.source)), corpus=named(setting.corpus)
    )


def row_command(setting: Setting, spec: EvalSpec) -> str:
    """The command that computes one row."""
    seed = results.seed_of(spec)
    weights = f" --weights {spec.weights.method}" if spec.weights.quantizer.bits < 16 else ""
    kept = " --keep-out" if spec.keep_out else ""
    gamma = f" --gamma {spec.rotation.gamma:g}" if isinstance(spec.rotation, RefineSpec) else ""
    options = _options(setting, setting.seed if seed is None else seed)
    return f"dfrot-lab evaluate {options} --rotation {spec.rotation.name} --bits {spec.bits}{weights}{kept}{gamma}"


def _options(setting: Setting, seed: int) -> str:
    model, text = shlex.quote(setting.model.source), shlex.quote(setting.corpus)
    return f"--model {model} --corpus {text} --seed {seed} --windows {setting.windows}"


def limits(setting: Setting) -> list[str]:
    """What the numbers do not say."""
    small = (
        "The default model is small and its published weights are 4-bit already. "
        if setting.model.source == DEFAULT_MODEL
        else ""
    )
    return [
        f"{small}Levels of perplexity cannot be compared with the paper's larger models; the order of the rotations and the sign of the gaps can.",
        f"Intervals are a bootstrap over {setting.windows} windows of one text: how sure the mean over such windows is, not how another text "
        "or seed would come out. Rows are compared on the same windows, so a paired difference is surer than two intervals side by side.",
        "Perplexity and token errors are measured with quantization simulated exactly; nothing here says how fast a 4-bit kernel would run.",
        "lm_head, embeddings and norms stay in full precision, as in the paper.",
    ]


def _abstract(findings: Findings) -> str:
    setting, text = findings.result.setting, ""
    if len(findings.massive):
        head = findings.massive.iloc[0]
        text = (
            f"The most massive token, {visible(head['text'])!r}, reaches {head['residual_max']:,.0f} in channel {head['channel']} of the residual "
            f"stream, {head['ratio_to_median']:,.0f} times the median. "
        )
    rows = results.records(findings.result.table, f"{results.PERPLEXITY} - RH")
    gaps = [
        row for row in rows if row["rotation"] == "RO" and not row["keep_out"] and row["seed"] == setting.seed
    ]
    if gaps:
        low, high = gaps[-1]["ci95"]
        text += f"At {results.bits(gaps[-1])} RO's perplexity is {gaps[-1]['value']:.2f} [{low:.2f}, {high:.2f}] above RH's."
    return text


def _massive_tokens(findings: Findings) -> list[str]:
    tokens = massive_tokens(findings.massive)
    if tokens.empty:
        return [paragraph("No token of the first calibration window is massive by any of the four rules.")]
    rest = f" The {SHOWN_TOKENS} most extreme are shown." if len(tokens) > SHOWN_TOKENS else ""
    marked = f"{len(tokens)} of {findings.result.capture.tokens} tokens are massive somewhere by at least one of four rules.{rest}"
    return [paragraph(marked), table_html(tokens.head(SHOWN_TOKENS), index=False)]


def _token_errors(findings: Findings, drawn: dict[str, Any]) -> list[str]:
    site, quantizer = (
        main_figures.error_site(findings.result.capture),
        findings.result.setting.refine.quantizer.name,
    )
    said = f"E(xR), a token's squared error at {site} under {quantizer}, one rotation against another. Below the line the second is better."
    return [
        paragraph(said),
        report_page.error_scatter(findings.errors),
        figure_html(
            drawn["token-errors"],
            f"Three scatter plots of every token's error at {site}: RO and RH against NR, RH against RO",
        ),
        paragraph("The site's most massive token, its values before and after quantization:"),
        figure_html(
            drawn["massive-token-values"],
            "The massive token's values against their quantized values, a panel for each rotation",
        ),
    ]


def _refinement(findings: Findings, drawn: dict[str, Any]) -> list[str]:
    parts = [
        figure_html(
            drawn["residual-and-refinement"],
            "The residual stream's largest values and median by layer; a refinement's loss by step",
        )
    ]
    refinement = findings.result.refinement
    if refinement is None:
        return [
            *parts,
            note(
                "DFRot's rotation is not refined yet. This computes it, with all rows:",
                command(public(findings.result.setting)),
            ),
        ]
    history = refinement.history
    shown = (
        history
        if len(history) <= 12
        else history.iloc[[*range(0, len(history), max(1, len(history) // 10)), -1]].drop_duplicates("step")
    )
    return [
        *parts,
        paragraph("Mean squared error of ordinary and massive rows, and the distance from the start:"),
        table_html(shown.round(4), index=False),
    ]


def _perplexity(findings: Findings, drawn: dict[str, Any]) -> list[str]:
    table, setting = findings.result.table, findings.result.setting
    parts = [
        paragraph(
            f"On {named(setting.corpus)}, {setting.windows} windows, with the 95% interval; bits are weights-activations-KV cache."
        )
    ]
    if findings.found:
        parts.append(table_html(results.comparison(table)))
    if "perplexity" in drawn:
        parts.append(
            figure_html(
                drawn["perplexity"],
                "Perplexity of each rotation with its interval, a panel for each setting of the bits",
            )
        )
    for metric in [name for name in dict.fromkeys(table["metric"]) if name != results.PERPLEXITY]:
        parts += [
            paragraph(f"{metric}, on the same windows, with the paired 95% interval:"),
            table_html(results.comparison(table, metric)),
        ]
    if findings.found and not (seeds := results.by_seed(table)).empty:
        parts += [paragraph("RO - RH, each random seed on its own:"), table_html(seeds)]
    if findings.missing:
        rows = [
            (f"{mainjob.row_name(spec)}, seed {results.seed_of(spec)}", row_command(public(setting), spec))
            for spec in findings.missing
        ]
        parts.append(
            note(
                f"{len(rows)} rows are not stored. This computes them all, and may be stopped and resumed:",
                command(public(setting)),
            )
        )
        parts.append(
            table_html(
                pd.DataFrame(rows, columns=["row", "alone"]).replace(", seed None", "", regex=True),
                index=False,
            )
        )
    return parts


def _paper(findings: Findings) -> list[str]:
    beside = paper.beside_rows(findings.found)
    if beside.empty:
        return [
            paragraph(
                "There are none: the paper has no number for the rows above, or this is not a checkout with data/paper."
            )
        ]
    mine = beside.assign(ours=beside["ours"].map("{:,.2f}".format)).fillna("")
    said = f"WikiText-2 perplexity as printed (Inf and NaN too), other models; ours is {named(findings.result.setting.model.source)}"
    return [paragraph(f"{said} on {named(findings.result.setting.corpus)}."), table_html(mine, index=False)]


def check_out(path: Path) -> Path:
    """`path`, if a report can be written there; else a ValueError that says why, before anything is computed."""
    if path.is_dir():
        raise ValueError(f"--out must be a file; {path} is a folder. Say for example {path / 'report.html'}")
    if not path.parent.is_dir():
        raise ValueError(
            f"--out must be in a folder that is there; got {path}. Make the folder {path.parent} first"
        )
    return path


def write(path: Path, text: str) -> None:
    """Put `text` into `path`, whole or not at all: until it is complete, what was there stays."""
    with replacing(check_out(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
