"""Rows of recipes in, a table of results out; the main job (`make run`); experiments on single tokens."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.tables import COLUMNS, whole
from dfrot_lab.model import shapes
from dfrot_lab.model.public import public
from dfrot_lab.observe import capture as captures, errors, massive, residual
from dfrot_lab.recipe.specs import RELEASED_KEEP_OUT, Recipe
from dfrot_lab.rotate import dfrot
from dfrot_lab.rotate.steps import Refined
from dfrot_lab.score import build, perplexity, rows as score_rows
from dfrot_lab.study import cost, needs
from dfrot_lab.study.setting import FIGURE_LAYER, Setting

log = logging.getLogger(__name__)

BITS = ("16-4-16", "4-4-16", "4-4-4")
Found = dict[Recipe, perplexity.EvalResult]  # evaluations by the recipe that was asked for
Evaluated = tuple[pd.DataFrame, Found]


@dataclass(frozen=True)
class Row:
    """One evaluation of an experiment: its own columns; recipes, by name, to take paired differences to."""

    spec: Recipe
    labels: Mapping[str, Any] = field(default_factory=dict)
    against: Mapping[str, Recipe] = field(default_factory=dict)


def row_label(spec: Recipe, more: str = "") -> str:
    """A row's rotation in words, with `more` behind it: `RO`, `RO, kept out`, `full precision`."""
    if spec.bits == "16-16-16":
        return "full precision"
    return spec.rotation.name + more + (", kept out" if spec.keep_out else "")


def row_name(spec: Recipe) -> str:
    """A row in words: `RO (seed 0) 4-4-16, kept out`."""
    seed = spec.rotation.first_seed
    return row_label(spec, ("" if seed is None else f" (seed {seed})") + f" {spec.bits}")


def evaluated(asked: Sequence[Row], store: Store, progress: cost.Progress | None = None) -> Evaluated:
    """Evaluate rows in order: their table (`table_of`) and evaluations. What is stored is reused."""
    specs = list(dict.fromkeys(row.spec for row in asked))
    progress = progress or cost.Progress()
    progress.costs += cost.seconds(specs, store)
    names = map(row_name, specs)

    def announce(_done: perplexity.EvalResult | None = None) -> None:
        if name := next(names, None):
            progress.begin(name)

    announce()
    found = dict(zip(specs, perplexity.evaluate_all(specs, store, on_result=announce), strict=True))
    return table_of(asked, found), found


def table_of(asked: Sequence[Row], found: Found) -> pd.DataFrame:
    """The table of the rows that were found: a line for each perplexity, and for each paired difference."""
    lines: list[dict[str, Any]] = []
    for n, row in enumerate(asked):
        if row.spec in found and row not in asked[:n]:
            own = found[row.spec]
            lines.append({**row.labels, **score_rows.row(own)})
            pairs = [(found[other], name) for name, other in row.against.items() if other in found]
            lines += [{**row.labels, **score_rows.difference_row(own, *pair)} for pair in pairs]
    return whole(pd.DataFrame(lines, columns=None if lines else list(COLUMNS)))


def rows(setting: Setting) -> Iterator[Row]:
    """Full precision; all rotations at all bits, each against RH; RO and RH with massive tokens kept out,
    against themselves, and at 16-4-16 with more seeds. Rows that share a built model stand side by side."""
    yield Row(setting.row("16-16-16", setting.rotation("NR")))
    for name in ("NR", "RO", "RH", "DFRot"):
        for bits in BITS:
            plain, rh = (setting.row(bits, setting.method(method)) for method in (name, "RH"))
            yield Row(plain, against={} if name == "RH" else {"RH": rh})
            if name in ("RO", "RH"):
                yield Row(plain.with_(keep_out=RELEASED_KEEP_OUT), against={name: plain})
    for offset in range(1, setting.seeds):
        ro, rh = (setting.row(BITS[0], setting.rotation(kind, offset)) for kind in ("RO", "RH"))
        yield from (Row(ro, against={"RH": rh}), Row(rh))


@dataclass(frozen=True)
class MainResult:
    """What the main job found: the capture, the refinement if there is one, rows as a table, evaluations."""

    setting: Setting
    capture: captures.Capture
    refinement: Refined | None
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    found: Found = field(default_factory=dict)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """NR, RO, RH and, where there is a refinement, DFRot: float64 (channels, channels) each."""
        refined = {} if self.refinement is None else {"DFRot": self.refinement.R}
        return {**errors.default_rotations(self.capture.channels, self.setting.seed), **refined}

    def errors(self, sites: Sequence[str] | None = None) -> pd.DataFrame:
        """Tokens' squared errors at `sites` or all, a column a rotation, by the refinement's quantizer."""
        by, rule = [self.setting.refine.quantizer], self.setting.rule
        return errors.wide(errors.token_errors(self.capture, self.matrices, by, sites=sites, rule=rule))


def run(
    setting: Setting, store: Store | None = None, asked: Callable[[Setting], Iterator[Row]] = rows
) -> MainResult:
    """Capture, refine, evaluate every row; what is stored is reused, a stopped run goes on where it was."""
    store, setting = store or Store(), setting.resolved()
    said = public(setting)
    log.info("model %s, corpus %s, device %s", said.model.source, said.corpus, said.model.device)
    log.info("%s", needs.hadamards(shapes.shape(setting.model)))
    rows = list(asked(setting))
    for spec in {row.spec: None for row in rows}:
        if not perplexity.stored(spec, store):
            build.require_texts(spec, store)
    progress = cost.Progress(cost.preparation(setting, store))
    progress.begin("capturing activations")
    recorded = captures.capture(setting.capture, store)
    progress.begin(f"refining R1 with gamma {setting.gamma:g}")
    refinement = dfrot.refined(setting.refine, store)
    return MainResult(setting, recorded, refinement, *evaluated(rows, store, progress))


def stored(setting: Setting, store: Store) -> MainResult:
    """As `run`, of what is stored; the capture alone is recorded if it is missing."""
    setting = setting.resolved()
    recorded, refinement = captures.capture(setting.capture, store), dfrot.stored(setting.refine, store)
    asked = list(rows(setting))
    found = {row.spec: done for row in asked if (done := perplexity.stored(row.spec, store))}
    return MainResult(setting, recorded, refinement, table_of(asked, found), found)


def _prepared(setting: Setting, store: Store) -> MainResult:
    """The capture and the refinement, and no row."""
    return MainResult(setting, captures.capture(setting.capture, store), dfrot.refined(setting.refine, store))


def token_errors(setting: Setting, store: Store) -> pd.DataFrame:
    """Each token's squared error at every site, a column a rotation; NR, RO and RH's order (Fig. 2 and 3)."""
    table = _prepared(setting, store).errors()
    return table.assign(order=errors.orders(table))


def token_orders(setting: Setting, store: Store) -> pd.DataFrame:
    """How many tokens of each site have which order, and their mean errors: Fig. 2, 13 to 24 in numbers."""
    groups = token_errors(setting, store).groupby(["site", "order"], observed=True, sort=False)
    counts = groups[["NR", "RO", "RH", "DFRot"]].mean().assign(tokens=groups.size()).reset_index()
    return counts.astype({"site": str, "order": str}).assign(**named(setting))


def named(setting: Setting) -> dict[str, str]:
    """What a table says it is of: the model and the text, as `public` names them."""
    said = public(setting)
    return {"model": said.model.source, "corpus": said.corpus}


def massive_magnitudes(setting: Setting, store: Store) -> pd.DataFrame:
    """Sun et al., Fig. 1: |residual stream| of the first tokens, all channels, in the middle of the model."""
    layers = len(captures.capture(setting.capture, store).sites) // 2
    return residual.magnitudes(setting.capture, min(FIGURE_LAYER, layers // 2), store=store)


def massive_token(setting: Setting, store: Store) -> pd.DataFrame:
    """The most massive token's values before and after quantization, where it is massive (Fig. 4)."""
    prepared = _prepared(setting, store)
    recorded, made, quantizer = prepared.capture, prepared.matrices, setting.refine.quantizer
    token = int(recorded.residual_max.amax(0).argmax())
    first = recorded.sites[0].rsplit(".", 1)[-1]
    pairs = zip(recorded.sites, massive.find(recorded, "sun")[:, token].tolist(), strict=True)
    largest = recorded.sites[int(recorded.residual_max[:, token].argmax())]  # where no rule calls it massive
    sites = [site for site, heavy in pairs if heavy and site.endswith(first)] or [largest]
    values = [errors.massive_values(recorded, at, token, made, quantizer).assign(site=at) for at in sites]
    about = {"text": recorded.texts[token], **named(setting)}
    return pd.concat(values, ignore_index=True).assign(token=token, **about)
