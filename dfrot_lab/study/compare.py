"""Several models side by side: massive tokens by each rule, 4-bit errors, the gap between RO and RH, how much
of it keeping massive tokens out closes, and what each kind of site costs."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.maths import statistics, tables
from dfrot_lab.maths.tables import SHARE
from dfrot_lab.model import door, hooks, loading
from dfrot_lab.model.stream import Walk
from dfrot_lab.observe import massive
from dfrot_lab.observe.capture import Capture
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import MASSIVE_RULES, RELEASED_KEEP_OUT, Recipe
from dfrot_lab.score import build, perplexity, rows as rows_of
from dfrot_lab.study import cost, keepout, main
from dfrot_lab.study.main import Row
from dfrot_lab.study.progress import Progress
from dfrot_lab.study.setting import Setting

BITS = "16-4-16"  # nothing but activations is rounded
KEPT: tuple[dict[str, Any], ...] = (
    {"keep_out": RELEASED_KEEP_OUT}, {"keep_out": "most_massive", "keep_out_tokens": 4},
)  # fmt: skip
SITES = (*hooks.LINEAR_INPUTS, "k", "v")
TOKEN, ROWS, ERROR, LEVEL = "most massive token", "massive rows", "mean E(xR)", f"perplexity, {BITS}"
DIVERGENCE, CHANGE, FURTHER = (
    f"KL divergence, {BITS}",
    "change of perplexity, %",
    "difference in KL divergence",
)
COST = "change of perplexity one site costs, %"
PARTS = (TOKEN, ROWS, ERROR, LEVEL, DIVERGENCE, CHANGE, FURTHER, SHARE, COST)


def compare(
    models: Sequence[str], setting: Setting | None = None, store: Store | None = None
) -> pd.DataFrame:
    """What is found in each of `models`, given as ModelSpec.source takes them; else all is as `setting` says.
    A row a finding: `part` (of PARTS), `what`, then the columns of results rows. Computed once, a stopped run
    goes on. ValueError: not two different models; one that is not here or cannot be rotated, before work."""
    names, store = list(dict.fromkeys(models)), store or Store()
    require("models", repr(names), len(names) > 1, "at least two different ones")
    setting = (setting or Setting.of_profile()).resolved()
    each = [setting.with_(model=setting.model.with_(source=name)) for name in names]
    for own in each:
        loading.resolve(own.model)
    return tables.whole(pd.concat([_findings(own, store) for own in each], ignore_index=True))


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `compare` to be read: rows (part, what), a column a model, cells as text."""
    entries: list[Any] = table.to_dict("records")
    cells = [tables.cell(row) if np.ndim(row["ci95"]) else f"{row['value']:,.4g}" for row in entries]
    shown = table.assign(cell=cells)
    shown = shown.sort_values("part", key=lambda part: part.map(PARTS.index), kind="stable")
    wide = shown.pivot(index=["part", "what"], columns="model", values="cell")
    places = pd.MultiIndex.from_frame(shown[["part", "what"]].drop_duplicates())
    return wide.reindex(index=places, columns=list(dict.fromkeys(table["model"]))).fillna("")


def _findings(setting: Setting, store: Store) -> pd.DataFrame:
    """All rows of one model."""
    result = main.run(setting, store, rows)
    shares = list[dict[str, Any]]()
    for kept in KEPT:
        shares += keepout.share_of(result.found, setting, BITS, "rtn", **kept)
    results = _placed(tables.whole(pd.concat([result.table, pd.DataFrame(shares)], ignore_index=True)))
    about = {**main.named(setting), "device": setting.model.device}
    seen = [*_massive(result.capture), *_errors(result), *_costs(result, store)]
    return pd.concat([pd.DataFrame(seen).assign(**about), results], ignore_index=True)


def rows(setting: Setting) -> Iterator[Row]:
    """Full precision, RO, RH and DFRot, each against RH; RO and RH with massive tokens kept out."""
    yield Row(setting.row("16-16-16", setting.rotation("NR")))
    rh = setting.row(BITS, setting.rotation("RH"), weights="rtn")
    for name in ("RO", "RH", "DFRot"):
        plain = setting.row(BITS, setting.method(name), weights="rtn")
        yield Row(plain, against={} if name == "RH" else {"RH": rh})
        for kept in KEPT if name != "DFRot" else ():
            yield Row(plain.with_(**kept), against={name: plain})


def _placed(table: pd.DataFrame) -> pd.DataFrame:
    """Results rows with their part, and what each is: `RO`, `RO against RH`, `RO, kept out`."""
    table = table[table["metric"] != tables.AGREEMENT]
    parts = {tables.PERPLEXITY: LEVEL, SHARE: SHARE, tables.DIVERGENCE: DIVERGENCE}
    other = table["metric"].str.endswith("%").map({True: CHANGE, False: FURTHER})
    entries: list[Any] = table.to_dict("records")
    said = [f"{tables.label(row)} {tables.against(row['metric'])}".strip() for row in entries]
    return table.assign(part=table["metric"].map(parts).fillna(other), what=said)


def _massive(recorded: Capture) -> Iterator[dict[str, Any]]:
    """The token farthest above the median token; the rows each rule marks, and those of that token."""
    ratio = recorded.residual_max / recorded.residual_max.median(1, keepdim=True).values
    site, token = divmod(int(ratio.argmax()), recorded.tokens)
    facts = {"its place": token, "its largest value": float(recorded.residual_max[site, token])}
    facts["times the median token's"] = float(ratio[site, token])
    yield from ({"part": TOKEN, "what": what, "value": value} for what, value in facts.items())
    for rule in MASSIVE_RULES:
        mask = massive.find(recorded, rule)
        for what, found in ((rule, mask), (f"{rule}, of that token", mask[:, token])):
            yield {"part": ROWS, "what": what, "value": int(found.sum()), "rule": rule}


def _errors(result: main.MainResult) -> Iterator[dict[str, Any]]:
    """The squared error of ordinary and of massive rows by the evaluation's quantizer: means over sites."""
    quantizer, rule = result.setting.refine.quantizer, result.setting.rule
    of_sites = result.errors().groupby(["massive", "site"], observed=True)[[*result.matrices]].mean()
    for rotation, means in of_sites.groupby(level="massive").mean().items():
        about = {"part": ERROR, "rotation": rotation, "rule": rule, "activations": quantizer.name}
        for is_massive, value in means.items():
            what = f"{rotation}, {'massive' if is_massive else 'ordinary'} rows"
            yield {**about, "what": what, "value": value}


def _costs(result: main.MainResult, store: Store) -> Iterator[dict[str, Any]]:
    """By how many percent perplexity rises when one kind of site alone is rounded to 4 bits, under RH."""
    each = result.setting.each()
    full = [result.found[own.row("16-16-16", own.rotation("NR"))].losses.mean() for own in each]
    recipes = [own.row("16-4-4", own.rotation("RH")) for own in each]
    artefacts = [site_losses(recipe, store) for recipe in recipes]
    about = {"part": COST, "rotation": "RH", "windows": recipes[0].windows, "window": recipes[0].window}
    about |= {"metric": tables.change("full precision"), "activations": recipes[0].activations.name}
    about |= {"recipe": recipes[0].key, "key": artefacts[0].key, "commit": artefacts[0].manifest["commit"]}
    for kind in SITES:
        rises = [
            np.mean(artefact.json(kind)) - exact for artefact, exact in zip(artefacts, full, strict=True)
        ]
        found = statistics.estimate(rises)
        interval = None if math.isnan(found.error) else [float(rows_of.percent(end)) for end in found.ci95]
        value = float(rows_of.percent(found.mean))
        yield {**about, "what": kind, "value": value, "ci95": interval, "builds": len(each)}


def site_losses(recipe: Recipe, store: Store) -> Artefact:
    """By each kind of SITES, the windows' losses (windows,) with it alone rounded as `recipe` says."""
    recipe = door.resolved(recipe).canonical()

    def make(writer: Writer) -> None:
        progress = Progress([cost.scoring(recipe).seconds(cost.TWO_CORES)] * len(SITES))
        built = build.build(recipe, store)
        ids = build.windows(recipe, built.loaded)
        for kind in SITES:
            progress.begin(f"{kind} alone in {recipe.activations.bits} bits")
            if not writer.has(kind):
                with build.quantized(built, recipe, only=kind):
                    walk = Walk(built.loaded, ids.split(1), name=kind, writer=writer)
                    writer.save_json(kind, perplexity.window_losses(walk))

    def inputs() -> dict[str, Any]:
        return keys.evaluation(recipe, door.prints) | {"each alone": SITES}

    return store.get_or_make("site-losses", inputs, make)
