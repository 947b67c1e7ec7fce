"""The teacher's kit and the glossary: their minutes are the notebooks', their numbers stand in the outputs of the
notebook that the same line links to, and every word is used where it is said to be.
"""

import functools
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ("teaching.md", "teaching-solutions.md", "glossary.md")
LINK = re.compile(r"\]\(([^)#\s]+)")
MEASURED = re.compile(r"(?<![\w.,-])\d+\.\d+|(?<![\w.,-])\d{3,}(?![\w.,-]*\d)")
"""A number that was measured: one with decimals, or of three digits. Sizes that one knows are KNOWN."""
KNOWN = {"576", "2048", "1000", "200", "214", "216", "428"}
WORDS = (
    "activation, asymmetric grid, attention sink, build, channel, clip, DFRot, full precision, fuse, gain, gamma, GPTQ, Hadamard matrix, "
    "KL divergence, Kronecker product, KV cache, massive activation, massive token, NR, offset, Offset, Offset+, ordinary token, "
    "orthogonal Procrustes, outlier channel, per-token quantization, perplexity, R1, R2, R3, R4, residual stream, RH, RO, rotation, "
    "RTN, rule, site, spike, step, symmetric grid, token error, window, zero point"
)
"""Words that a newcomer meets in notebooks 00 and 10, and those that the lab's tables use."""


@functools.cache
def notebook(name: str) -> str:
    """All a reader sees of a notebook: prose, code, outputs as text."""
    return "\n".join([*(cell.source for cell in cells(name)), outputs(name)])


@functools.cache
def cells(name: str) -> list[nbformat.NotebookNode]:
    """A notebook's cells."""
    return nbformat.read(ROOT / "notebooks" / name, as_version=4).cells


@functools.cache
def outputs(name: str) -> str:
    """A notebook's outputs as text."""
    held = [output.get("data", {}) for cell in cells(name) for output in cell.get("outputs", [])]
    return "\n".join(str(data.get(kind, "")) for data in held for kind in ("text/plain", "text/html"))


def linked(text: str) -> list[str]:
    return [target.split("/")[-1] for target in LINK.findall(text) if target.endswith(".ipynb")]


def rows(text: str) -> list[list[str]]:
    """The rows of all tables of a text, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines]


def between(text: str, mark: str) -> str:
    return re.search(f"(?s)<!-- {mark} -->\n(.*?)<!-- end of {mark} -->", text)[1]


def minutes(name: str) -> int:
    """What a notebook's first cell says that it takes."""
    first = cells(name)[0].source
    return int(re.search(r"\*\*Time:\*\* about (\d+) minutes", first)[1])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    targets = LINK.findall((DOCS / page).read_text())
    assert targets and all((DOCS / target).exists() for target in targets if "://" not in target)


def test_the_pages_are_linked_from_the_readme_and_the_first_notebook():
    readme, first = (ROOT / "README.md").read_text(), notebook("00-start-here.ipynb")
    assert all(
        f"docs/{page}" in readme and f"../docs/{page}" in first for page in ("teaching.md", "glossary.md")
    )
    assert "docs/glossary.md" in notebook("10-teach.ipynb")


# ---- numbers


def numbers_and_sources() -> list[tuple[str, str, list[str]]]:
    """Every measured number of the kit with the notebooks that its row or paragraph links to."""
    found = []
    kit = (DOCS / "teaching.md").read_text()
    kit = kit.replace(between(kit, "verdicts"), "").replace(between(kit, "plans"), "")
    parts = [line for line in kit.splitlines() if line.startswith("|")]
    parts += (DOCS / "teaching-solutions.md").read_text().split("\n\n")
    for part in parts:
        said = re.sub(r"\]\([^)]*\)|`[^`]*`", "", part)
        found += [(n, part, linked(part)) for n in MEASURED.findall(said) if n not in KNOWN]
    return found


def test_the_kit_tells_numbers():
    assert len(numbers_and_sources()) > 40


def test_every_number_stands_in_the_outputs_of_a_notebook_of_its_line():
    for number, part, sources in numbers_and_sources():
        assert sources, f"{number} has no notebook beside it: {part}"
        seen = re.compile(rf"(?<![\d.]){re.escape(number)}(?!\d)")
        where = [name for name in sources if seen.search(outputs(name)) or seen.search(rounded(name))]
        assert where, f"{number} is in no output of {sources}: {part}"


@functools.cache
def rounded(name: str) -> str:
    """The numbers of a notebook's outputs to two and to one decimals, trailing zeros left out."""
    values = [float(n) for n in re.findall(r"(?<![\w.])\d+\.\d{3,}(?![\w.])", outputs(name))]
    return " ".join(f"{value:.{digits}f}" for value in values for digits in (1, 2))


def test_a_made_up_number_would_be_found():
    seen = outputs("10-teach.ipynb") + rounded("10-teach.ipynb")
    assert "10.685" in seen and "10.68" in seen and "10.684" not in seen and "7.777" not in seen


# ---- minutes


def plans() -> dict[str, list[list[str]]]:
    """By heading, the rows of each plan."""
    parts = between((DOCS / "teaching.md").read_text(), "plans").split("**")[1:]
    return {head: rows(body)[1:] for head, body in zip(parts[::2], parts[1::2], strict=True)}


def test_each_plan_takes_the_time_it_says():
    said = {head: sum(int(row[1]) for row in found) for head, found in plans().items()}
    assert list(said.values()) == [45, 90, 240]
    assert [re.match(r"\d+ minutes|Half a day", head)[0] for head in said] == [
        "45 minutes",
        "90 minutes",
        "Half a day",
    ]


def test_the_minutes_of_a_notebook_are_those_of_its_first_cell():
    parts = rows(cells("10-teach.ipynb")[0].source)
    part = {row[0][0]: int(row[1]) for row in parts[1:]}
    assert sum(part.values()) == minutes("10-teach.ipynb")
    starred = {row[0][0] for row in parts[1:] if row[0].endswith("*")}
    for row in (row for found in plans().values() for row in found if linked(row[0])):
        chosen = re.search(r"part (\d)", row[0])
        (name,) = linked(row[0])
        assert int(row[1]) == (part[chosen[1]] if chosen else minutes(name)), row
    short = {
        re.search(r"part (\d)", row[0])[1] for row in plans()["45 minutes: one lesson"] if "part " in row[0]
    }
    assert short == set(part) - starred


def test_the_order_of_the_argument_has_every_notebook_once_and_the_theory_after_its_question():
    kit = (DOCS / "teaching.md").read_text()
    order = re.findall(r"^\d+\. \[(\d\d)\]", kit, re.MULTILINE)
    there = sorted(path.stem[:2] for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert sorted([*order, "09", "10"]) == there
    assert order.index("08") == order.index("02") + 1


def test_every_question_has_its_solution():
    kit, solved = ((DOCS / page).read_text() for page in ("teaching.md", "teaching-solutions.md"))
    asked = re.findall(r"^(\d+)\. ", kit.split("## To discuss")[1], re.MULTILINE)
    assert len(asked) >= 8 and asked == re.findall(r"^## (\d+)\. ", solved, re.MULTILINE)


# ---- words


ENTRIES = rows((DOCS / "glossary.md").read_text())[1:]


def test_the_glossary_is_in_order_and_says_each_word_once():
    words = [row[0] for row in ENTRIES]
    assert len(set(words)) == len(words)
    assert [word.lower() for word in words] == sorted(word.lower() for word in words)
    missing = {word.strip() for word in WORDS.split(",")} - {
        part.strip() for word in words for part in word.split(",")
    }
    assert not missing


@pytest.mark.parametrize("row", ENTRIES, ids=lambda row: row[0])
def test_a_word_is_short_and_used_in_the_notebooks_it_names(row):
    word, meaning, where = row
    assert meaning.endswith(".") and 5 <= len(meaning.split()) <= 32
    names = linked(where)
    assert names
    forms = [part.strip() for part in word.split(",")]
    for name in names:
        text = " ".join(notebook(name).replace("*", "").split()).lower()
        said = [form for form in forms if form.lower().removeprefix("such as ") in text]
        assert said, f"{name} does not say {word}"
