"""Takes what only a running kernel can show out of explorers' notebooks, after they were executed: `python
tests/strip_views.py NOTEBOOK...`.
"""

import sys
from pathlib import Path

import nbformat

VIEW = "application/vnd.jupyter.widget-view+json"


def strip_views(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same notebook without views of widgets and their state; all other outputs stay."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if VIEW not in output.get("data", {})]
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(strip_views(nbformat.read(name, as_version=4)), Path(name))
