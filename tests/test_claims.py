"""What the pages claim is what the tables say: every number of the results told is put together from them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[str, str]]:
    """By page, the name of its part, and what the tables make of it."""
    run = "import results as r, json; print(json.dumps({n: [m, f()] for n, (m, f) in r.PAGES.items()}))"
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=ROOT / "tools", capture_output=True, text=True, check=True
    )
    return {name: tuple(part) for name, part in json.loads(done.stdout).items()}


@pytest.mark.parametrize("page", ["README.md", "docs/measuring.md", "docs/teaching.md"])
def test_a_page_says_what_the_tables_say(page, made):
    mark, text = made[page]
    said = (ROOT / page).read_text()
    assert f"<!-- {mark} -->\n{text}\n<!-- end of {mark} -->" in said, "run `python tools/results.py`"


def test_the_readmes_results_hold_no_number_that_is_typed():
    """Between its headings, what is not made from the tables: no number but those of names and links."""
    section = re.search(r"(?s)## Results\n(.*?)\n## ", (ROOT / "README.md").read_text())[1]
    typed = re.sub(r"(?s)<!-- results -->.*<!-- end of results -->", "", section)
    left = re.sub(r"\[[^\]]*\]\([^)]*\)|`[^`]*`", "", typed)
    assert not re.findall(r"\d", left), left


def test_the_claims_name_the_verdicts_of_the_instrument(made):
    text = made["README.md"][1]
    claims = [line for line in text.splitlines() if line.startswith("- **")]
    assert len(claims) >= 3
    assert all(re.search(r"better|worse|cannot tell", line) for line in claims)
