"""Makes docs/site/: the notebooks with their outputs, the documents and the report as pages that open from disk.

    python tools/site.py                # or: make site
    python tools/site.py --no-report    # the report is left as it is: the one page that needs a model
                                        (of the committed evaluations, and of DFRot what `make run` has refined)

A page fetches nothing and runs no script: formulas are MathML, pictures lie beside it, and its Content-Security-Policy
refuses the rest (the report's names its own scripts by their hashes). Each says in `made-from` what it was made from;
`stale` compares, and a test asks it.
"""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
HERE, SITE, PICTURES = ROOT / "tools", Path("docs/site"), "pictures"
ORDER = re.compile(r"(?m)^\d+\. \[`([\w-]+)`\]\(notebooks/\1\.ipynb\): (.*)$")
MADE_FROM = re.compile(r'<meta name="made-from" content="(\w*)">')
EXPLORER = re.compile(r"\bexplore\.(\w+)\(")
FUNCTION = re.compile(r"(\\(?:ln|exp|max|tan)) ")  # and what it is of: MathML wants to be told of the space
STYLES = ("default", "github-dark")  # of code, on light and on dark
OPENING = (
    "A language model can be made to compute with numbers of 4 bits, a quarter of the usual size, but a few very large values spoil the rounding of all others.",
    "Turning the model's numbers in space beforehand, by a rotation that leaves what the model computes as it is, spreads those values out.",
    "These pages show which few words make one rotation better than another, why, and how a rotation is made better still.",
)
COVERS = {  # of notebooks whose first picture is not the one to remember, or that have none
    "07-paper-tables": "figures/wikitext2/main-table.png",
    "09-explorer": "docs/gallery/massive.png",
    "10-teach": "docs/gallery/dial.gif",
}


@dataclass(frozen=True)
class Page:
    """A page: what it is made from below the root, its file's name, title, a line about it, its picture."""

    source: str
    name: str
    title: str
    line: str
    picture: str = ""

    @property
    def is_notebook(self) -> bool:
        """Whether it is made from a notebook, and not from a document."""
        return self.source.endswith(".ipynb")


def relative(target: str) -> str:
    """The way from a page to a file or folder below the root."""
    return Path(os.path.relpath(target, SITE)).as_posix()


def pages(root: Path) -> list[Page]:
    """All pages but the index and the report: notebooks in the README's order, then documents.
    ValueError: a notebook is not in that order, or one in it is not there."""
    lines = dict(ORDER.findall((root / "README.md").read_text(encoding="utf-8")))
    there = {path.stem for path in (root / "notebooks").glob("*.ipynb")}
    if there != {*lines}:
        wrong = ", ".join(sorted(there ^ {*lines}))
        raise ValueError(f"README.md's list must name each of notebooks/ once; not in both: {wrong}")
    found = []
    for stem, line in lines.items():
        source = f"notebooks/{stem}.ipynb"
        title = heading(nbformat.read(root / source, 4).cells[0].source)
        found.append(Page(source, f"{stem}.html", title, line, cover(root, stem)))
    for path in sorted((root / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        line = next(part for part in text.split("\n\n")[1:] if part[0].isalpha())
        first = (
            re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", line.split(". ")[0]).replace("\n", " ").rstrip(".:")
        )
        found.append(Page(f"docs/{path.name}", f"{path.stem}.html", heading(text), f"{first}."))
    return found


def heading(text: str) -> str:
    """The first line of a document, which is its title."""
    return text.splitlines()[0].removeprefix("# ")


def cover(root: Path, stem: str) -> str:
    """The picture of a notebook on the index: the one said above, else its first; empty: it has none."""
    if stem in COVERS:
        return relative(COVERS[stem])
    cells = enumerate(nbformat.read(root / f"notebooks/{stem}.ipynb", 4).cells)
    outputs = ((n, m, out) for n, cell in cells for m, out in enumerate(cell.get("outputs", ())))
    return next(
        (f"{PICTURES}/{stem}_{n}_{m}.png" for n, m, out in outputs if "image/png" in out.get("data", {})), ""
    )


def digest(root: Path, *sources: str) -> str:
    """What a page is made from, as one hash: its sources below `root`, and what makes pages."""
    own = [HERE / f"site.{ending}" for ending in ("py", "html.j2", "css")]
    parts = [path.read_bytes() for path in (*own, *(root / source for source in sources))]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def stale(root: Path) -> list[str]:
    """Pages of `root` that are not what their sources would give now: older, missing, or of what is gone."""
    asked = {page.name: digest(root, page.source) for page in pages(root)}
    asked["index.html"] = digest(root, "README.md", *(page.source for page in pages(root)))
    there = {path.name: path.read_text(encoding="utf-8") for path in (root / SITE).glob("*.html")}
    there.pop("report.html", None)  # says of itself what it was made from
    said = {name: (MADE_FROM.search(text) or [""] * 2)[1] for name, text in there.items()}
    return sorted(name for name in {*asked, *said} if asked.get(name) != said.get(name))


class Renderer(IPythonRenderer):
    """Markdown as HTML: formulas as MathML, links to pages where there is one, tables in a box that scrolls."""

    def __init__(self, root: Path, source: str) -> None:
        super().__init__(escape=False)
        self.root, self.source = root, source

    def inline_math(self, body: str) -> str:
        """A formula in a line."""
        return convert(FUNCTION.sub(r"\1\,", body))

    def block_math(self, body: str) -> str:
        """A formula on its own line."""
        return convert(FUNCTION.sub(r"\1\,", body), display="block")

    def heading(self, text: str, level: int, **_: Any) -> str:
        """A heading with the anchor that GitHub would give it."""
        words = re.sub(r"<[^>]*>", "", unescape(text)).lower()
        anchor = re.sub(r"[^\w -]", "", words).replace(" ", "-")
        return f'<h{level} id="{anchor}">{text}</h{level}>\n'

    def table(self, text: str) -> str:
        """A table in its box."""
        return f'<div class="scroll"><table>\n{text}</table></div>\n'

    def codespan(self, text: str) -> str:
        """Code; a notebook's name is a link to its page."""
        code = f"<code>{escape(text, quote=False)}</code>"
        is_page = (self.root / f"notebooks/{text}.ipynb").is_file()
        return f'<a href="{text}.html">{code}</a>' if is_page else code

    def link(self, text: str, url: str, title: str | None = None) -> str:
        """A link from page to page."""
        return super().link(text, self.moved(url), title)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        """A picture, where it lies."""
        return super().image(text, self.moved(url), title)

    def moved(self, url: str) -> str:
        """An address in the source as one in its page. ValueError: it leads to what is not there."""
        if url.startswith(("#", "http://", "https://")):
            return url
        place, _, anchor = url.partition("#")
        target = Path(os.path.normpath(Path(self.source).parent / place)).as_posix()
        if not (self.root / target).exists():
            raise ValueError(f"{self.source} links to {url}, which is not there")
        if target == "notebooks":
            return "index.html"
        is_page = target.endswith(".ipynb") or re.fullmatch(r"docs/[^/]*\.md", target)
        return (f"{Path(target).stem}.html" if is_page else relative(target)) + (anchor and f"#{anchor}")


class Pages(HTMLExporter):
    """A notebook's cells as HTML, its pictures apart, its Markdown by `renderer`, which is given for each."""

    renderer: Renderer

    def __init__(self) -> None:
        own = {"template_name": "basic", "exclude_input_prompt": True, "exclude_output_prompt": True}
        apart = {"enabled": True, "output_filename_template": "{unique_key}_{cell_index}_{index}{extension}"}
        super().__init__(config=Config(Pages=own, ExtractOutputPreprocessor=apart))

    @pass_context
    def markdown2html(self, _: Any, source: str) -> str:
        """What the templates call for a cell of Markdown."""
        return MarkdownWithMath(renderer=self.renderer).render(source)


def explorer(root: Path, name: str) -> str:
    """What stands on a page for an explorer: that it is live in JupyterLab, and a picture where there is one."""
    found = next((root / "docs/gallery").glob(f"{name}.*"), None)
    line = f"<p>Here is the explorer <code>explore.{name}</code>, live in JupyterLab (<code>make lab</code>){':' if found else '.'}</p>"
    picture = found and f'<img src="{relative(f"docs/gallery/{found.name}")}" alt="The explorer {name}">'
    return f'<div class="explorer">{line}{picture or ""}</div>'


def prepared(root: Path, book: nbformat.NotebookNode, stem: str) -> dict[str, bytes]:
    """Make a notebook one for its page: a word for each picture, a picture for each explorer, no style of
    pandas' own. What is drawn as SVG is taken out of it, by the names of its files."""
    drawings: dict[str, bytes] = {}
    section = heading(book.cells[0].source)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            section = [section, *re.findall(r"(?m)^#+ (.*)$", cell.source)][-1]
            continue
        if not cell.outputs and (found := EXPLORER.search(cell.source)):
            shown = {"text/html": explorer(root, found[1])}
            cell.outputs = [nbformat.v4.new_output("display_data", shown)]
        for output in cell.outputs:
            if "image/png" in (data := output.get("data", {})):
                output.metadata["image/png"] = {"alt": f"Figure, in: {section}"}
            if drawn := data.pop("image/svg+xml", ""):
                drawings[f"{stem}_{len(drawings)}.svg"] = drawn.encode()
                place = f"{PICTURES}/{[*drawings][-1]}"
                data["text/html"] = f'<img src="{place}" alt="Picture, in: {escape(section)}">'
            if "text/html" in data:
                data["text/html"] = re.sub(r"(?s)<style scoped>.*?</style>", "", data["text/html"])
    return drawings


def notebook(exporter: Pages, root: Path, source: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as HTML, and its pictures by their names."""
    asked = {"unique_key": Path(source).stem, "output_files_dir": PICTURES}
    drawings = prepared(root, book := nbformat.read(root / source, 4), Path(source).stem)
    exporter.renderer = Renderer(root, source)
    html, made = exporter.from_notebook_node(book, asked)
    return html, drawings | {Path(name).name: smaller(data) for name, data in made["outputs"].items()}


def smaller(picture: bytes) -> bytes:
    """A PNG of at most 256 colours, which for a figure is less than half the bytes; as it was, where it is not."""
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(out := io.BytesIO(), format="PNG", optimize=True)
    return min(picture, out.getvalue(), key=len)


def style() -> str:
    """The style of all pages, that of code with it."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in STYLES)
    own = (HERE / "site.css").read_text(encoding="utf-8")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{own}"


def bodies(root: Path, found: list[Page]) -> Iterator[tuple[Page, str]]:
    """Each page with its HTML; the pictures of notebooks are written."""
    exporter = Pages()
    for page in found:
        if page.is_notebook:
            body, pictures = notebook(exporter, root, page.source)
            for name, data in pictures.items():
                (root / SITE / PICTURES / name).write_bytes(data)
            yield page, body
        else:
            text = (root / page.source).read_text(encoding="utf-8")
            yield page, MarkdownWithMath(renderer=Renderer(root, page.source)).render(text)


def build(root: Path) -> None:
    """Write all pages of `root` but the report anew."""
    out, found = root / SITE, pages(root)
    shutil.rmtree(out / PICTURES, ignore_errors=True)
    (out / PICTURES).mkdir(parents=True)
    for path in out.glob("*.html"):
        if path.name != "report.html":
            path.unlink()
    templates = {"loader": FileSystemLoader(HERE), "undefined": StrictUndefined, "trim_blocks": True}
    template = Environment(autoescape=True, **templates).get_template("site.html.j2")
    books = [page for page in found if page.is_notebook]
    for page, body in bodies(root, found):
        at = books.index(page) if page in books else len(books)
        around = [("before", books[at - 1])] if 0 < at < len(books) else []
        around += [("next", each) for each in books[at + 1 : at + 2]]
        said = {"title": page.title, "source": page.source, "around": around, "body": Markup(body)}
        write(out / page.name, template.render(said, cards=[], digest=digest(root, page.source)))
    index = {"title": "DFRot Lab", "source": "", "around": [], "cards": books, "others": found[len(books) :]}
    own = digest(root, "README.md", *(page.source for page in found))
    write(out / "index.html", template.render(index, opening=OPENING, digest=own))
    write(out / "site.css", style())


def write(path: Path, text: str) -> None:
    """Write text with the same bytes on every system."""
    path.write_text(text.rstrip() + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    build(ROOT)
    if "--no-report" not in sys.argv:
        kept, report = ROOT / "data/results/evaluations", ROOT / SITE / "report.html"
        for words in (["cache", "import", str(kept)], ["report", "--out", str(report)]):
            subprocess.run([sys.executable, "-m", "dfrot_lab", *words], check=True)
