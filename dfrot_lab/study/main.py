"""Rows of recipes in, a table of results out; the main job (`make run`); experiments on single tokens."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from dfrot_lab.score import build, perplexity, rows as score_rows, sweep
from dfrot_lab.study import cost, needs
from dfrot_lab.study.progress import Progress
from dfrot_lab.study.setting import FIGURE_LAYER, Setting

log = logging.getLogger(__name__)

BITS = ("16-4-16", "4-4-4")  # of the main job, weights rounded to nearest
Found = dict[Recipe, perplexity.EvalResult]  # evaluations by the recipe that was asked for
Evaluated = tuple[pd.DataFrame, Found]


@dataclass(frozen=True)
class Row:
    """One evaluation of an experiment in one build: its own columns; recipes, by name, to compare it with;
    `once`: the first build is enough."""

    spec: Recipe
    labels: Mapping[str, Any] = field(default_factory=dict)
    against: Mapping[str, Recipe] = field(default_factory=dict)
    once: bool = False


Asks = Callable[[Setting], Iterable[Row]]  # the rows of one build


def row_label(spec: Recipe, more: str = "") -> str:
    """A row's rotation in words, with `more` behind it: `RO`, `RO, kept out`, `full precision`."""
    if spec.bits == "16-16-16":
        return "full precision"
    return spec.rotation.name + more + (", kept out" if spec.keep_out else "")


def row_name(spec: Recipe) -> str:
    """A row in words: `RO (seed 0) 4-4-16, kept out`."""
    seed = spec.rotation.first_seed
    return row_label(spec, ("" if seed is None else f" (seed {seed})") + f" {spec.bits}")


def rows_by_build(asks: Asks, setting: Setting) -> list[list[Row]]:
    """What `asks` has for each build of a setting: the same rows in the same order, each once."""
    found = [list(asks(own)) for own in setting.each()]
    firsts = [n for n, row in enumerate(found[0]) if row not in found[0][:n]]
    return [[build[n] for n in firsts] for build in found]


def recipes(asked: Sequence[Sequence[Row]]) -> list[Recipe]:
    """The recipes of all builds' rows in the order in which they are evaluated, build by build."""
    chosen = (row for number, rows in enumerate(asked) for row in rows if number == 0 or not row.once)
    return list(dict.fromkeys(row.spec for row in chosen))


def evaluated(asks: Asks, setting: Setting, store: Store) -> Evaluated:
    """Evaluate the rows that `asks` has for each build of a setting: their table (`table_of`), evaluations.
    What is stored is reused. ValueError: a text that is too short, before any work."""
    return _evaluated(_checked(asks, setting, store), store, Progress())


def _checked(asks: Asks, setting: Setting, store: Store) -> list[list[Row]]:
    """`rows_by_build`, once their texts are long enough for what is not stored; ValueError."""
    asked = rows_by_build(asks, setting)
    for spec in recipes(asked):
        if not perplexity.stored(spec, store):
            build.require_texts(spec, store)
    return asked


def found_of(asked: Sequence[Sequence[Row]], store: Store) -> Found:
    """The evaluations that are stored of what is asked; computes nothing."""
    return {spec: done for spec in recipes(asked) if (done := perplexity.stored(spec, store))}


def _evaluated(asked: Sequence[Sequence[Row]], store: Store, progress: Progress) -> Evaluated:
    specs = recipes(asked)
    before = len(progress.costs)
    progress.costs += cost.seconds(specs, store)
    names = [row_name(spec) for spec in specs]
    if sweep.is_on():

        def finish(place: int, ran: bool) -> None:
            progress.finish(before + place, names[place], ran)

        done = sweep.evaluate_all(specs, store, finish)
    else:
        left = iter(names)

        def announce(_done: perplexity.EvalResult | None = None) -> None:
            if name := next(left, None):
                progress.begin(name)

        announce()
        done = perplexity.evaluate_all(specs, store, on_result=announce)
    found = dict(zip(specs, done, strict=True))
    return table_of(asked, found), found


def table_of(asked: Sequence[Sequence[Row]], found: Found) -> pd.DataFrame:
    """The table of rows, build by build, that were found: lines for each row's levels and its comparisons,
    each over the builds in which all of it was found."""
    lines: list[dict[str, Any]] = []
    for builds in zip(*asked, strict=True):
        own = [row for row in builds if row.spec in found]
        labels = builds[0].labels
        lines += [labels | line for line in score_rows.rows([found[row.spec] for row in own])] if own else []
        for name in builds[0].against:
            both = [row for row in own if row.against[name] in found]
            pairs = [found[row.spec] for row in both], [found[row.against[name]] for row in both]
            lines += [labels | line for line in score_rows.compared(*pairs, name)] if both else []
    return whole(pd.DataFrame(lines, columns=None if lines else list(COLUMNS)))


def rows(setting: Setting) -> Iterator[Row]:
    """Full precision; the rotations at all BITS, weights to nearest, each against RH; at the first of them
    with massive tokens kept out, against themselves. Rows that share a built model stand side by side."""
    yield Row(setting.row("16-16-16", setting.rotation("NR")))
    for bits in BITS:
        for name in ("NR", "RO", "RH", "DFRot"):
            plain, rh = (setting.row(bits, setting.method(row), weights="rtn") for row in (name, "RH"))
            yield Row(plain, {}, {} if name == "RH" else {"RH": rh}, once=name == "NR")
            if name in ("RO", "RH") and bits == BITS[0]:
                yield Row(plain.with_(keep_out=RELEASED_KEEP_OUT), {}, {name: plain})


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


def prepared(setting: Setting, store: Store | None = None, progress: Progress | None = None) -> MainResult:
    """The first build's capture and refinement, and no row."""
    store, setting = store or Store(), setting.resolved().of_builds()
    progress = progress or Progress(cost.preparation(setting, store))
    progress.begin("capturing activations")
    recorded = captures.capture(setting.capture, store)
    progress.begin(f"refining R1 with gamma {setting.gamma:g}")
    return MainResult(setting, recorded, dfrot.refined(setting.refine, store))


def run(
    setting: Setting, store: Store | None = None, asks: Asks = rows,
    on_ready: Callable[[MainResult], None] | None = None,
) -> MainResult:  # fmt: skip
    """Capture, refine, evaluate every row of every build; what is stored is reused, a stopped run goes on.
    `on_ready` is told of what is `prepared`, before any row. ValueError: a text that is too short."""
    store, setting = store or Store(), setting.resolved().of_builds()
    said = public(setting)
    log.info("model %s, corpus %s, device %s", said.model.source, said.corpus, said.model.device)
    log.info("%s", needs.hadamards(shapes.shape(setting.model)))
    asked = _checked(asks, setting, store)
    progress = Progress(cost.preparation(setting, store))
    ready = prepared(setting, store, progress)
    if on_ready:
        on_ready(ready)
    table, found = _evaluated(asked, store, progress)
    return replace(ready, table=table, found=found)


def stored(setting: Setting, store: Store) -> MainResult:
    """As `run`, of what is stored; the capture alone is recorded if it is missing."""
    setting = setting.resolved().of_builds()
    recorded, refinement = captures.capture(setting.capture, store), dfrot.stored(setting.refine, store)
    asked = rows_by_build(rows, setting)
    found = found_of(asked, store)
    return MainResult(setting, recorded, refinement, table_of(asked, found), found)


def token_errors(setting: Setting, store: Store) -> pd.DataFrame:
    """Each token's squared error at every site, a column a rotation; NR, RO and RH's order (Fig. 2 and 3)."""
    table = prepared(setting, store).errors()
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
    ready = prepared(setting, store)
    recorded, made, quantizer = ready.capture, ready.matrices, setting.refine.quantizer
    token = int(recorded.residual_max.amax(0).argmax())
    first = recorded.sites[0].rsplit(".", 1)[-1]
    pairs = zip(recorded.sites, massive.find(recorded, "sun")[:, token].tolist(), strict=True)
    largest = recorded.sites[int(recorded.residual_max[:, token].argmax())]  # where no rule calls it massive
    sites = [site for site, heavy in pairs if heavy and site.endswith(first)] or [largest]
    values = [errors.massive_values(recorded, at, token, made, quantizer).assign(site=at) for at in sites]
    about = {"text": recorded.texts[token], **named(setting)}
    return pd.concat(values, ignore_index=True).assign(token=token, **about)
