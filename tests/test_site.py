"""The pages that `make site` writes: nothing is fetched, no script runs, links lead somewhere, formulas read; and
whether the committed ones are those of what they were made from.
"""

import base64
import importlib.util
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import browser
import nbformat
import pytest
from nbformat import v4
from PIL import Image, ImageChops

ROOT = Path(__file__).parents[1]
COMMITTED = (ROOT / "docs/site/index.html").is_file()
MEGABYTES = 6
FETCHED = ("src", "srcset", "data", "poster", "background", "action", "formaction")
EVIL = """<style scoped>.pandas { color: red }</style><table><tr><td>shown</td></tr></table>
<script>document.title = 'run'</script><img src="x.png" onerror="document.title='run'" alt="">
<img src="https://example.org/a.png" alt=""><link rel="stylesheet" href="https://example.org/a.css">"""


def loaded() -> ModuleType:
    """tools/site.py under a name of its own: `site` is Python's."""
    about = importlib.util.spec_from_file_location("site_pages", ROOT / "tools/site.py")
    module = sys.modules["site_pages"] = importlib.util.module_from_spec(about)
    about.loader.exec_module(module)
    return module


site = loaded()


class Tags(HTMLParser):
    """Every tag with its attributes, and the text that is read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str, *tags: str) -> list[str]:
        """An attribute's values, of all tags or of these."""
        return [own[name] for tag, own in self.tags if name in own and (not tags or tag in tags)]


def faults(folder: Path) -> list[str]:
    """What a page of `folder` would fetch from elsewhere, run, or lead to that is not there."""
    found = []
    pages = {path.name: Tags(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.html"))}
    for name, page in pages.items():
        if name != "report.html":  # which names its scripts by their hashes: tests/test_report.py
            found += [
                f"{name}: <{tag}>"
                for tag, _ in page.tags
                if tag in ("script", "iframe", "object", "embed", "base")
            ]
            found += [f"{name}: no policy"] * (
                not page.values("content", "meta")[0].startswith("default-src 'none';")
            )
        found += [
            f"{name}: {own} of <{tag}>"
            for tag, attributes in page.tags
            for own in attributes
            if own.startswith("on")
        ]
        asked = [value for kind in FETCHED for value in page.values(kind)] + page.values("href", "link")
        asked = [value for value in asked if not value.startswith("data:")]
        for address in asked + page.values("href", "a"):
            place, _, anchor = address.partition("#")
            if re.match(r"\w+:|//", place):
                found += [f"{name}: fetches {address}"] * (address in asked)
            elif not (folder / place).exists() and place != "report.html":
                found.append(f"{name}: {address} is not there")
            elif anchor and (place or name) in pages and anchor not in pages[place or name].values("id"):
                found.append(f"{name}: {address} has no such place")
    styles = (folder / "site.css").read_text(encoding="utf-8")
    return found + [f"site.css: {word}" for word in ("@import", "url(", "http") if word in styles]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two notebooks, two documents and a picture: a little of everything."""
    for folder in ("notebooks", "docs/gallery"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        "1. [`01-b`](notebooks/01-b.ipynb): second by number\n2. [`00-a`](notebooks/00-a.ipynb): first by number\n"
    )
    (tmp_path / "docs/measuring.md").write_text(
        "# Measuring\n\nHow it is done. And more.\n\n## A finer one\n\n| a | b |\n|---|---|\n| `x` | [all](../notebooks) |\n"
    )
    (tmp_path / "docs/gallery.md").write_text("# Gallery\n\nWhat there is.\n\n![seen](gallery/dial.png)\n")
    (tmp_path / "docs/gallery/dial.png").write_bytes(png(8, 8))
    first = [
        v4.new_markdown_cell("# A title\n\nSee `01-b`, [how](../docs/measuring.md#a-finer-one), [there](https://example.org/x)."),
        v4.new_markdown_cell("## Seen\n\nOf $\\lVert R - R_0 \\rVert_F / \\sqrt{C}$ and\n$\\ln C$:\n\n$$\\frac{X_a}{Y_b} < 1$$"),
        v4.new_code_cell("figure", outputs=[v4.new_output("display_data", {"image/png": base64.b64encode(png(640, 400)).decode()})]),
        v4.new_code_cell("dial = explore.dial()\ndial"),
        v4.new_code_cell("writer = explore.generate()\nwriter"),
        v4.new_code_cell("frame", outputs=[v4.new_output("display_data", {"text/html": EVIL})]),
    ]  # fmt: skip
    written = {"00-a": first, "01-b": [v4.new_markdown_cell("# Another\n\n[back](00-a.ipynb#seen)")]}
    for name, cells in written.items():
        nbformat.write(v4.new_notebook(cells=cells), tmp_path / f"notebooks/{name}.ipynb")
    return tmp_path


def png(width: int, height: int) -> bytes:
    """A picture of a gradient with more colours than a palette holds."""
    image = Image.linear_gradient("L").resize((width, height))
    Image.merge("RGB", (image, image.rotate(180), image.transpose(1))).save(out := io.BytesIO(), format="PNG")
    return out.getvalue()


@pytest.fixture
def built(root: Path) -> Path:
    site.build(root)
    return root


def page(root: Path, name: str) -> str:
    return (root / f"docs/site/{name}.html").read_text(encoding="utf-8")


def test_a_notebook_is_a_page_with_its_pictures_formulas_links_and_explorers(built: Path):
    text, shown = page(built, "00-a"), Tags(page(built, "00-a"))
    assert "$" not in shown.text and "<mfrac>" in text and text.count("<math ") == 3
    assert "<msqrt>" in text and '<mi>ln</mi><mspace width="0.167em"' in text.replace(
        "<mo>ln</mo>", "<mi>ln</mi>"
    )
    links = shown.values("href", "a")
    assert {"01-b.html", "measuring.html#a-finer-one", "https://example.org/x", "index.html"} <= {*links}
    [picture] = [value for value in shown.values("src") if "pictures/" in value]
    assert "Figure, in: Seen" in shown.values("alt")
    was, now = Image.open(io.BytesIO(png(640, 400))), Image.open(built / "docs/site" / picture).convert("RGB")
    assert max(high for _, high in ImageChops.difference(was, now).getextrema()) < 40
    assert (built / "docs/site" / picture).stat().st_size <= len(png(640, 400))
    assert "../gallery/dial.png" in shown.values("src") and text.count("live in JupyterLab") == 2
    assert "style scoped" not in text and "shown" in shown.text
    assert 'href="00-a.html#seen"' in page(built, "01-b")
    assert '<div class="scroll"><table>' in page(built, "measuring") and 'href="index.html"' in page(
        built, "measuring"
    )


def test_the_index_has_the_readmes_order_and_lines_and_a_picture_where_there_is_one(built: Path):
    text = page(built, "index")
    assert text.index("1. Another") < text.index("second by number") < text.index("2. A title")
    assert text.count("<img ") == 1 and "pictures/00-a_2_0.png" in text and "How it is done." in text
    assert 'href="00-a.html">next: A title' in page(built, "01-b")
    assert 'href="01-b.html">before: Another' in page(built, "00-a")


def test_what_is_fetched_run_or_lost_is_found(built: Path):
    """The one evil output alone; without it there is nothing to find."""
    found = faults(built / "docs/site")
    wrong = ["<script>", "onerror of <img>", "fetches https://example.org/a.png", "fetches https://example.org/a.css", "x.png is not there"]  # fmt: skip
    assert sorted(fault.removeprefix("00-a.html: ") for fault in found) == sorted(wrong)


def test_a_page_older_than_its_notebook_is_named(built: Path):
    assert site.stale(built) == []
    path = built / "notebooks/00-a.ipynb"
    path.write_text(path.read_text().replace("A title", "Another title"))
    assert site.stale(built) == ["00-a.html", "index.html"]
    (built / "docs/measuring.md").unlink()
    assert site.stale(built) == ["00-a.html", "index.html", "measuring.html"]
    path.write_text(path.read_text().replace("../docs/measuring.md#a-finer-one", "../docs/gallery.md"))
    site.build(built)
    assert site.stale(built) == [] and not (built / "docs/site/measuring.html").exists()
    (built / "docs/site/01-b.html").unlink()
    assert site.stale(built) == ["01-b.html"]


@pytest.mark.parametrize(
    ("file", "was", "now", "said"),
    [
        (
            "notebooks/01-b.ipynb",
            "00-a.ipynb",
            "09-z.ipynb",
            "01-b.ipynb links to 09-z.ipynb#seen, which is not there",
        ),
        ("README.md", "2. [`00-a`]", "- [`00-a`]", "not in both: 00-a"),
    ],
)
def test_a_lost_link_and_a_notebook_the_reader_is_not_led_to_are_refused(
    root: Path, file: str, was: str, now: str, said: str
):
    (root / file).write_text((root / file).read_text().replace(was, now))
    with pytest.raises(ValueError, match=re.escape(said)):
        site.build(root)


@pytest.mark.skipif(not COMMITTED, reason="docs/site is not there: make site")
def test_the_committed_pages_are_those_of_their_sources_and_small():
    old = site.stale(ROOT)
    assert not old, f"older than what they are made from: {', '.join(old)}. Run `make site`"
    assert not (found := faults(ROOT / "docs/site")), "\n".join(found)
    size = sum(path.stat().st_size for path in (ROOT / "docs/site").rglob("*") if path.is_file())
    assert size < MEGABYTES * 1e6


@pytest.mark.browser
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_in_chromium_pages_read_on_a_phone_and_nothing_leaves_the_disk(built: Path):
    """The evil output's script does not run and its addresses are not asked for; of ours, all is there."""
    asked, blocked, refused = [], [], []
    with browser.chromium() as opened:
        view = opened.new_context(viewport={"width": 360, "height": 800}).new_page()
        view.context.on("request", lambda request: asked.append(request.url))
        view.context.on("requestfailed", lambda request: blocked.append((request.url, request.failure)))
        view.on("console", lambda message: refused.append(message.text))
        pages = [
            path
            for folder in (built, *[ROOT] * COMMITTED)
            for path in sorted((folder / "docs/site").glob("*.html"))
        ]
        for path in (path for path in pages if path.name != "report.html"):
            view.goto(path.as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") == 360, (
                f"{path} is wider than a phone"
            )
            assert (
                view.title().endswith("DFRot Lab")
                and view.evaluate("getComputedStyle(document.body).maxWidth") == "880px"
            )
            lost = view.evaluate(
                "[...document.images].filter(e => e.complete && !e.naturalWidth).map(e => e.src)"
            )
            assert all(address.endswith(("x.png", "example.org/a.png")) for address in lost), lost
            sizes = view.evaluate(
                "[...document.querySelectorAll('math')].map(e => e.getBoundingClientRect().height)"
            )
            assert all(5 < height < 80 for height in sizes)
            assert refused == [] or path == built / "docs/site/00-a.html", refused
            assert path != built / "docs/site/00-a.html" or (len(sizes) == 3 and len(refused) >= 4)
            refused.clear()
    out = [url for url in asked if not url.startswith("file:")]
    assert len(out) == 2 and all((url, "csp") in blocked for url in out), "kept in by the policy, not by luck"
