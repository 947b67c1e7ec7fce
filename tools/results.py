"""Write the results that the README tells, and the tables of docs/measuring.md and docs/teaching.md, from data/results/: no number of
theirs is typed. `python tools/results.py`; a test holds the pages to it."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from dfrot_lab.disk import row_files
from dfrot_lab.maths import statistics, tables
from dfrot_lab.score.rows import percent
from dfrot_lab.show import gallery
from dfrot_lab.study import leaderboard

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "data" / "results"
VERDICTS = (statistics.BETTER, statistics.UNKNOWN, statistics.WORSE)
BOARD = "notebooks/12-leaderboard.ipynb"
TEXTS = {"wikitext2": "WikiText-2", "wikipedia-sample": "the Wikipedia sample"}


def is_there(name: str) -> bool:
    """Whether a table is committed."""
    return (RESULTS / f"{name}.jsonl").exists()


def load(name: str) -> pd.DataFrame:
    """A committed table."""
    return row_files.load(RESULTS / f"{name}.jsonl")


def cell(table: pd.DataFrame, metric: str, rotation: str, bits: str, *, kept_out: bool = False) -> str:
    """One row's number of a metric, with its interval and verdict."""
    rows = table[(table["metric"] == metric) & (table["rotation"] == rotation) & (table["bits"] == bits)]
    (row,) = rows[rows["keep_out"].eq(True) == kept_out].to_dict("records")
    return tables.cell(row)


def texts() -> dict[str, str]:
    """The texts whose main table is there, by name, in words."""
    return {name: text for name, text in TEXTS.items() if is_there(f"main-{name}")}


def compared(name: str, against: str, *, kept_out: bool = False, at: tuple[str, ...] = ()) -> str:
    """A row's change against another, at each of the bits, on each text, in perplexity and in KL divergence."""
    said = []
    for corpus, text in texts().items():
        table = load(f"main-{corpus}")
        cells = []
        for bits in at or [bits for bits in dict.fromkeys(table["bits"]) if bits != "16-16-16"]:
            metrics = tables.change(against), tables.further(against)
            both = [cell(table, metric, name, bits, kept_out=kept_out) for metric in metrics]
            cells.append(f"{both[0]} at {bits} (KL divergence {both[1]})")
        said.append(f"on {text} {', '.join(cells)}")
    return "; ".join(said)


def results() -> str:
    """The README's results."""
    table = load("main-wikitext2")
    builds, windows = (int(table[name].max()) for name in ("builds", "windows"))
    parts = [
        f"SmolLM2-135M-Instruct on WikiText-2's test text, the mean of {builds} builds with its 95% interval. A "
        f"*build* is one draw of all that is random: the rotation's seed, the\ncalibration sample, a change in "
        f"the last bit of the embedding, and {windows} windows of 2048 tokens, spread over the text. Bits are "
        "weights-activations-KV cache;\nweights are rounded to nearest. Every number is a row of "
        "[`data/results/`](data/README.md). Perplexity:",
        tables.markdown(tables.comparison(table)),
        "KL divergence of full precision's next-token distribution to the quantized model's, in nats:",
        tables.markdown(tables.comparison(table, tables.DIVERGENCE)),
        "Change of perplexity against RH, build by build on the same windows, with the verdict of its interval:",
        tables.markdown(tables.comparison(table, tables.change("RH"))),
        gallery.resolution(table),
        "What this says, and what it does not:\n" + "\n".join(claims()),
    ]
    if "wikipedia-sample" in texts():
        parts += [
            "The same job on the packaged Wikipedia sample, which is what `make run` gives where WikiText-2 is "
            "not at hand:",
            tables.markdown(tables.comparison(load("main-wikipedia-sample"))),
        ]
    return "\n\n".join(parts)


def claims() -> list[str]:
    """What the tables say, a line each."""
    kept = {"kept_out": True, "at": ("16-4-16",)}
    found = [
        f"- **RO against RH**: {compared('RO', 'RH')}. That is the paper's claim.",
        "- **Massive tokens make most of that gap.** Kept in full precision they change RO, against itself, by "
        f"{compared('RO', 'RO', **kept)}; and RH by {compared('RH', 'RH', **kept)}. In the paper's models they "
        "make all of it.",
        f"- **DFRot against RH**: {compared('DFRot', 'RH')}.{''.join(map(many, texts()))}",
    ]
    found += by_gptq()
    if is_there("offset-wikitext2"):
        table, said = load("offset-wikitext2"), []
        for name in ("Offset", "Offset+"):
            cells = [
                f"{cell(table, tables.change(against), name, bits)} against {against} at {bits}"
                for bits in dict.fromkeys(table["bits"]) for against in ("RH", "DFRot")
            ]  # fmt: skip
            said.append(f"{name} {', '.join(cells)}")
        found.append(f"- **Beyond DFRot**, on WikiText-2: {'; '.join(said)}.")
    return found + rivals()


def rivals() -> list[str]:
    """What the leaderboard says of each fused R1 beside RH, by verdict, the best first; none where it was not
    run."""
    if not is_there("leaderboard-wikitext2"):
        return []
    ranks = leaderboard.ranked(load("leaderboard-wikitext2"))
    own = ranks[ranks["verdict"].notna()].sort_values("change, %")
    fused = own[own["group"] == "fused R1"]
    by_verdict = {each: _changes(fused[fused["verdict"] == each]) for each in VERDICTS}
    said = "; ".join(f"{verdict}: {changes}" for verdict, changes in by_verdict.items() if changes)
    free = _changes(own[(own["group"] == "free extras") & (own["option"] == "all")])
    online = _changes(own[own["group"] == "online"])
    about = f"{fused['builds'].max()} builds on WikiText-2 at 16-4-16, perplexity against RH"
    return [
        f"- **Rivals, one fused R1 under one pipeline** ({about}): {said}. With clips, scales and a free range, "
        f"which cost nothing either: {free}. With matrices that act while the model runs, which do cost: "
        f"{online} ([notebook 12]({BOARD}))."
    ]


def _changes(rows: pd.DataFrame) -> str:
    """Each rotation and its change, as `DFRot -4.2%, RO +23.4%`."""
    return ", ".join(f"{row['rotation']} {row['change, %']:+.1f}%" for row in rows.to_dict("records"))


def by_gptq() -> list[str]:
    """What `main-table` and `keep-out` say of rows whose weights are GPTQ's, in a line; none where they were
    not run."""
    if not (is_there("main-table-wikitext2") and is_there("keep-out-wikitext2")):
        return []
    table, kept = load("main-table-wikitext2"), load("keep-out-wikitext2")
    own, at = table[table["weights"] == "gptq"], ("4-4-16", "4-4-4")
    said = list[str]()
    for name in ("RO", *leaderboard.FITTED):
        cells = [f"{cell(own, tables.change('RH'), name, bits)} at {bits}" for bits in at]
        said.append(f"{name} against RH {' and '.join(cells)}")
    shares = kept[kept["metric"] == tables.SHARE].set_index("bits")
    parts = [f"{tables.cell(shares.loc[bits].to_dict()).removeprefix('+')} at {bits}" for bits in at]
    size = f"{table['builds'].max()} builds on WikiText-2"
    return [
        f"- **Weights by GPTQ**, as in the paper, {size}: {'; '.join(said)}. Kept out, massive tokens take with them "
        f"{' and '.join(parts)} of the gap in loss between RO and RH (1 would be all of it)."
    ]


def many(corpus: str) -> str:
    """What `gain` says of DFRot, with its many builds, in a sentence; empty where it was not run."""
    if not is_there(f"gain-{corpus}"):
        return ""
    table = load(f"gain-{corpus}")
    metrics = tables.change("RH"), tables.further("RH")
    change, further = (cell(table, metric, "DFRot", "16-4-16") for metric in metrics)
    size = f"{table['builds'].max()} builds of {table['windows'].max()} windows"
    return f" In {size} on {TEXTS[corpus]} at 16-4-16: {change} (KL divergence {further})."


def lots(corpus: str, parts: int = 3) -> str:
    """The builds of `gain` in equal lots of their own, as if each were somebody else's run: a row a lot."""
    table = load(f"gain-{corpus}")
    levels = table[table["metric"] == tables.PERPLEXITY].set_index("rotation")["by_build"]
    differences = np.log(levels["DFRot"]) - np.log(levels["RH"])
    found = [statistics.estimate(lot) for lot in np.array_split(differences, parts)]
    cells = [
        {"metric": tables.change("RH"), "value": percent(each.mean), "ci95": [*map(percent, each.ci95)]}
        | {"verdict": each.verdict} for each in found
    ]  # fmt: skip
    rows = [
        (str(n), each.builds, tables.cell(row))
        for n, (each, row) in enumerate(zip(found, cells, strict=True), 1)
    ]
    return _markdown(pd.DataFrame(rows, columns=["lot", "builds", "DFRot against RH, 16-4-16"]))


def measuring() -> str:
    """The tables of docs/measuring.md."""
    parts = []
    for corpus, text in TEXTS.items():
        if is_there(f"gain-{corpus}"):
            parts.append(
                f"The same question asked three times on {text}, with seeds, calibration samples, jitters and windows "
                f"that no two lots share:\n\n{lots(corpus)}"
            )
        if not is_there(f"measuring-{corpus}"):
            continue
        table = load(f"measuring-{corpus}")
        losses = table[table["measure"].eq("loss") & table["target"].notna()]
        index = ["bits", "weights", "pair", "sd between builds", "sd between windows"]
        wide = losses.assign(
            cell=[_design(row) for row in losses.to_dict("records")], at=losses["target"].map("{:g}%".format)
        )
        wide = wide.pivot(index=index, columns="at", values="cell")[["2%", "1%", "0.5%"]].reset_index()
        wide[index[3:]] = wide[index[3:]].map("{:.3f}".format)
        parts.append(f"On {text}:\n\n" + _markdown(wide))
        alone = table[table["pair"].str.endswith("jitter alone")]
        shown = alone[["pair", "measure", "mean", "sd between builds", "sd of a window"]].copy()
        shown[["mean", "sd between builds", "sd of a window"]] = shown[
            ["mean", "sd between builds", "sd of a window"]
        ].map("{:.4f}".format)
        parts.append(
            f"Jitter alone, on {text}, {int(alone['builds'].max())} jitters of one build:\n\n"
            + _markdown(shown)
        )
    return "\n\n".join(parts)


def _design(row: dict) -> str:
    minutes = row["minutes on 2 cores"]
    took = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    return f"{row['builds needed']:.0f} builds x {row['windows in each']:.0f}, {took}"


def _markdown(table: pd.DataFrame) -> str:
    return tables.markdown(table.set_index(table.columns[0]))


def teaching() -> str:
    """The verdicts of docs/teaching.md: for each sentence that people say, the row that answers it."""
    main, gain, offset = load("main-wikitext2"), load("gain-wikitext2"), load("offset-wikitext2")
    rh, ro, at = tables.change("RH"), tables.change("RO"), "16-4-16"
    kept, sweep = load("intervene-wikitext2"), load("gamma-sweep-wikitext2")
    kept = kept[kept["rotation"].eq("RO") & kept["metric"].eq(ro)].set_index(["chosen", "k"])
    alone = (
        sweep["line"].eq("DFRot") & sweep["init"].eq("RH") & sweep["gamma"].eq(np.inf) & sweep["bits"].eq(at)
    )
    (spoilt,) = sweep[alone & sweep["metric"].eq(tables.change("QuaRot"))].to_dict("records")
    few, many_ = (f"{t['builds'].max()} builds of {t['windows'].max()} windows" for t in (main, gain))
    four, worst = (tables.cell(kept.loc[each].to_dict()) for each in (("most_massive", 4), ("worst", 64)))
    rows = [
        ("RO is worse than RH", f"at {at} {cell(main, rh, 'RO', at)}, README"),
        ("massive tokens make most of that gap", f"kept out, RO {cell(main, ro, 'RO', at, kept_out=True)}, README"),
        ("the four largest values of a window are enough", f"RO {four}, notebook 04"),
        ("the tokens of largest error do the damage", f"the worst 64 kept out, RO {worst}, notebook 04"),
        ("a lower error is a lower perplexity", f"massive rows alone refined {tables.cell(spoilt)}, notebook 05"),
        ("DFRot is better than RH", f"at {at} {cell(main, rh, 'DFRot', at)} in {few}, README"),
        ("more builds tell it more finely", f"{cell(gain, rh, 'DFRot', at)} in {many_}, README"),
        ("and so at 4-4-4", f"{cell(main, rh, 'DFRot', '4-4-4')}, README"),
        ("the offset adds more", f"Offset at {at} {cell(offset, rh, 'Offset', at)}, notebook 11"),
    ]  # fmt: skip
    return _markdown(pd.DataFrame(rows, columns=["what is said", "perplexity, in percent, and the verdict"]))


def put(page: str, name: str, text: str) -> str:
    """A page with `text` between its marks."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if not all(mark in page for mark in marks):
        raise ValueError(f"the page must have the marks {' and '.join(marks)}")
    return re.sub(f"(?s){marks[0]}.*{marks[1]}", lambda _: f"{marks[0]}\n{text}\n{marks[1]}", page)


PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "README.md": ("results", results), "docs/measuring.md": ("measuring", measuring),
    "docs/teaching.md": ("verdicts", teaching),
}  # fmt: skip


def main() -> None:
    """Write the pages."""
    for name, (mark, made) in PAGES.items():
        path = ROOT / name
        path.write_text(put(path.read_text(encoding="utf-8"), mark, made()), encoding="utf-8")


if __name__ == "__main__":
    main()
