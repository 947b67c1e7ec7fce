"""The notebooks: their form as committed (outputs of the full profile), and that each runs top to bottom in
the quick one.

To make the outputs again after a change, from the repository's root (record_timing keeps the clock out of
them). If anything had to be computed or fetched, run it once more: progress bars are outputs too, and a test
below refuses them.

    jupyter nbconvert --to notebook --execute --inplace \
        --ExecutePreprocessor.record_timing=False notebooks/*.ipynb
    python tests/strip_views.py notebooks/09-explorer.ipynb notebooks/10-teach.ipynb
"""

import ast
import json
import re
import sys
from pathlib import Path
from statistics import median

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from strip_views import VIEW, strip_views

from dfrot_lab.explore import lesson
from dfrot_lab.score import zeroshot

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MACHINE_PATH = re.compile(r"/(root|home|work|tmp|Users|mnt|opt|var)/|\b[A-Z]:\\")
CELL_TIMEOUT_S = 900
WITH_TASKS = {"06-w4a4-end-to-end", "07-paper-tables"}
"""Notebooks that score tasks, whose items are not in the package."""
EXPLORERS = {"09-explorer", "10-teach"}
"""Notebooks that show widgets, which only a running kernel can: they are committed without the views."""
LESSONS = {"10-teach"}
"""Notebooks in which a student repairs functions; the right ones are folded into the prose."""
MOST_CELLS, MEDIAN_LINES = 45, 6
LESSON_CELLS, LESSON_LINES = 65, 8
"""A lesson's are more: each function of the student's is a cell, and each prediction the first line of one."""
NARROW, COLUMNS = {"00-start-here", "10-teach"}, 88
"""Notebooks that a newcomer reads first, perhaps on a projected screen, and the columns of their code."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert cells, f"{path.name} has no code cell: nothing would be checked"
    return cells


def outputs(path: Path) -> list[nbformat.NotebookNode]:
    found = [output for cell in code_cells(path) for output in cell.outputs]
    assert found, f"{path.name} has no output: run it before it is committed"
    return found


def texts(path: Path) -> str:
    """All a reader can see but pictures, whose base64 may spell anything."""
    bundles = [
        {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/png")}
        for output in outputs(path)
    ]
    streams = [output.get("text", "") for output in outputs(path)]
    return json.dumps([[cell.source for cell in read(path).cells], bundles, streams, read(path).metadata])


def test_notebooks_are_there():
    numbers = [int(path.stem[:2]) for path in NOTEBOOKS]
    assert numbers == sorted(set(numbers)) and numbers[:12] == list(range(12))
    assert {path.stem for path in NOTEBOOKS} >= WITH_TASKS | EXPLORERS


@each_notebook
def test_is_valid_and_names_no_machine(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}, (
        "no widget state, no editor's own settings"
    )
    assert not any(cell.metadata for cell in notebook.cells), "no tags, no clock times"
    assert not MACHINE_PATH.search(texts(path)), MACHINE_PATH.search(texts(path))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /home/me/x", True),
        ("/tmp/cache", True),
        (r"C:\Users", True),
        ("data/results", False),
        ("https://arxiv.org/abs/2412.00648", False),
        ("w / work", False),
    ],
)
def test_the_pattern_for_machine_paths(text, found):
    assert bool(MACHINE_PATH.search(text)) is found


@each_notebook
def test_was_run_once_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_outputs_are_results_and_nothing_else(path):
    kinds = {output.output_type for output in outputs(path)}
    assert kinds <= {"execute_result", "display_data"}, "no error, no log line, no warning"
    assert not any(VIEW in output.data for output in outputs(path)), (
        "no progress bar; an explorer's view is stripped (the command is above)"
    )


@each_notebook
def test_only_explorers_notebooks_show_widgets(path):
    shows = any("explore." in cell.source for cell in code_cells(path))
    assert shows == (path.stem in EXPLORERS)


def test_strip_views_takes_views_and_state_and_nothing_else():
    outputs = [
        nbformat.v4.new_output("display_data", {VIEW: {"model_id": "1"}, "text/plain": "VBox()"}),
        nbformat.v4.new_output("stream", text="a"),
    ]
    cell = nbformat.v4.new_code_cell("explore.massive()", outputs=outputs, execution_count=1)
    notebook = strip_views(
        nbformat.v4.new_notebook(
            cells=[cell], metadata={"widgets": {}, "kernelspec": {"name": "python3", "display_name": "p"}}
        )
    )
    assert [output.output_type for output in notebook.cells[0].outputs] == ["stream"]
    assert notebook.cells[0].execution_count == 1
    assert set(notebook.metadata) == {"kernelspec"}


@each_notebook
def test_explains_as_much_as_it_computes(path):
    cells = read(path).cells
    prose = sum(cell.cell_type == "markdown" for cell in cells) / len(cells)
    assert 20 <= len(cells) <= (LESSON_CELLS if path.stem in LESSONS else MOST_CELLS)
    assert 0.40 <= prose <= 0.55, prose


@each_notebook
def test_cells_are_short_and_define_nothing_of_substance(path):
    lines = [len(cell.source.splitlines()) for cell in code_cells(path)]
    assert median(lines) <= (LESSON_LINES if path.stem in LESSONS else MEDIAN_LINES)
    assert max(lines) <= 20
    nodes = [
        node for cell in code_cells(path) for node in ast.walk(ast.parse(cell.source))
    ]  # parses, so there is no magic either
    if path.stem not in LESSONS:
        assert (
            sum(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for node in nodes)
            <= 1
        )
    assert not any("sys.path" in cell.source for cell in code_cells(path))


@pytest.mark.parametrize("name", sorted(NARROW))
def test_code_of_the_first_notebooks_fits_a_projected_screen(name):
    lines = [line for cell in code_cells(FOLDER / f"{name}.ipynb") for line in cell.source.splitlines()]
    assert not [line for line in lines if len(line) > COLUMNS]


@each_notebook
def test_the_first_cell_says_how_long_it_takes(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and re.search(r"\*\*Time:\*\* about \d+ minutes", first.source)


@each_notebook
def test_links_lead_to_files(path):
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    there = [target for target in re.findall(r"\]\(([^)#\s]+)", prose) if not target.startswith("http")]
    assert all((FOLDER / target).exists() for target in there), there


@each_notebook
def test_predicts_reads_checks_and_sums_up(path):
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert prose.count("**Prediction") >= 3
    assert prose.count("**Reading.**") >= 3
    assert re.findall(r"^## (.*)$", prose, re.MULTILINE)[-1] == "What we learned, what would change our mind"
    assert sum(cell.source.count("assert ") for cell in code_cells(path)) >= 3


@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem in LESSONS], ids=lambda path: path.stem
)
def test_folded_answers_are_right_and_the_attempts_are_not(path):
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    answers = "\n".join(re.findall(r"```python\n(.*?)```", prose, re.S))
    tasks = [
        cell.source for cell in code_cells(path) if cell.source.splitlines()[-1].startswith("lesson.check_")
    ]
    assert len(tasks) >= 9 and {
        "check_needs_rotation",
        "check_needs_hadamard",
        "check_next_rotation",
        "check_point",
    } <= {re.search(r"check_\w+", task.splitlines()[-1])[0] for task in tasks}, (
        "the four questions: why rotate, why RH, what DFRot changes, what the offset adds"
    )
    for attempt in tasks:
        grade, known = attempt.splitlines()[-1], {"lesson": lesson, "torch": torch}
        exec(attempt, known)
        assert not eval(grade, known), f"{grade} is passed by what the student finds there"
        exec(answers, known)
        assert eval(grade, known), eval(grade, known)


@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem in LESSONS], ids=lambda path: path.stem
)
def test_a_lesson_asks_before_it_measures_and_nothing_is_filled_in(path):
    """A prediction is the first line of its cell, and committed as ...; the last code cell shows all."""
    cells = [cell.source for cell in code_cells(path)]
    asked = [source for source in cells if "mine.reveal(" in source]
    assert len(asked) >= 8
    assert all(source.startswith("guess = ...  # ") and source.count("guess") == 2 for source in asked)
    questions = [re.search(r'reveal\(\s*"([^"]+)"', source)[1] for source in asked]
    assert len(set(questions)) == len(questions), "one question, one name: else the first answer stays"
    assert cells[-1] == "mine.table()"


@pytest.mark.notebook
@pytest.mark.model
@each_notebook
def test_runs_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("DFROT_LAB_PROFILE", "quick")
    if path.stem in WITH_TASKS and not zeroshot.local_file("piqa"):
        pytest.skip(
            "DFROT_LAB_DATA names no folder with the zero-shot tasks' items, and tests do not use the hub"
        )
    notebook = read(path)
    same_python = nbformat.v4.new_code_cell(
        f"import sys\n\nassert sys.executable == {sys.executable!r}, sys.executable"
    )
    notebook.cells.insert(0, same_python)
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # raises CellExecutionError with the cell and its traceback
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
