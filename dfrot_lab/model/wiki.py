"""Wikipedia's markup to plain paragraphs, and the articles of a MediaWiki dump."""

import bz2
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_DROPPED_TAGS = re.compile("ref|references|table|tr|td|th|caption|gallery|imagemap|timeline|score|source|hr")
_DROPPED_LINKS = re.compile(  # short ones lead to other languages
    r"\s*(file|image|category|media|template|[a-z]{2,3}|be-x-old)\s*:", re.IGNORECASE
)
_APPENDIX = re.compile(
    r"(see also|(foot)?notes|(primary |secondary )?sources|citations|works cited|references|gallery"
    r"|(further|additional) reading|external links|(selected )?(bibliography|publications|works)"
    r"|published works|filmography|discography)( and (notes|references|further reading|sources))?",
    re.IGNORECASE,
)
_PROSE = {"lang": 1, "transl": 1} | dict.fromkeys(
    ["nowrap", "small", "smaller", "angbr", "quote", "val", "nihongo", "vanchor", "sc", "keypress"], 0
)
"""Templates that stand for words of the sentence around them: which parameter those are. Others go."""
_RANGES = {"to", "-", "\u2013", "and", "or", "by", "x"}
_HEADING = "\x00"  # marks a heading's line until the sections are sorted out; no XML text has this character
_REFERENCES = re.compile(r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref>", re.DOTALL | re.IGNORECASE)
_HOLES = (  # what the dropped things, and markup with a mistake in it, leave behind: pattern, replacement
    (r"__[A-Z]+__|'{2,}|\[\[|\]\]", ""),
    (r"^ *(\{\||[|!]).*$|^.*\|thumb.*$", ""),
    (r"[^\S\n]+", " "),
    (r" ?\( ?(?:[,;:/\u2013-] ?)*\)", ""),
    (r"\( ?[,;:]? ?", "("),
    (r" ?[,;:]? \)", ")"),
    (r" ([,.;:])(?=\s|$)", r"\1"),
    (r"^[^\w\n]+$|^ +| +$", ""),
    (r"\n{3,}", "\n\n"),
)


def read_dump(path: Path) -> list[tuple[str, str]]:
    """Title and markup of each article of a bz2 MediaWiki XML dump: namespace 0, no redirects."""
    articles = []
    with bz2.open(path) as stream:
        for _, page in ElementTree.iterparse(stream):
            if page.tag.endswith("}page"):
                ns = page.tag.removesuffix("page")
                if page.findtext(f"{ns}ns") == "0" and page.find(f"{ns}redirect") is None:
                    title, text = (page.findtext(ns + name, "") for name in ("title", f"revision/{ns}text"))
                    articles.append((title, text))
                page.clear()  # the tree would keep every page read so far
    return articles


def strip_markup(markup: str) -> str:
    """Markup as plain paragraphs, headings as ` = = So = = `: no tables, references, files or appendices."""
    import mwparserfromhell

    text = _plain(mwparserfromhell.parse(_REFERENCES.sub("", markup)))
    for pattern, replacement in _HOLES:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    lead, *rest = re.split(rf"^{_HEADING}(\d) (.*)$", text, flags=re.MULTILINE)
    found = zip(rest[::3], rest[1::3], rest[2::3], strict=True)
    sections = _without_appendices([(int(level), title, body.strip()) for level, title, body in found])
    parts = [f" {'= ' * n}{title}{' =' * n} \n\n{body}".rstrip("\n") for n, title, body in sections]
    return "\n\n".join(filter(None, [lead.strip(), *parts])) + "\n"


def _without_appendices(sections: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """The (level, title, body) that hold prose: no reference lists and what is under them, no empty ones."""
    prose, hidden = list[tuple[int, str, str]](), math.inf
    for level, title, body in sections:
        if level <= hidden:
            hidden = level if _APPENDIX.fullmatch(title) else math.inf
            if hidden == math.inf:
                prose.append((level, title, body))
    kept = list[tuple[int, str, str]]()
    for section in reversed(prose):  # a heading stays with text, or before a deeper one that stays
        if section[2] or (kept and kept[0][0] > section[0]):
            kept.insert(0, section)
    return kept


def _plain(code: Any) -> str:
    return "".join(_node_text(node) for node in code.nodes)


def _node_text(node: Any) -> str:
    """The words a reader of the page sees for one node of mwparserfromhell's tree."""
    match type(node).__name__:
        case "Text":
            return str(node)
        case "Heading":
            return f"\n\n{_HEADING}{node.level} {_plain(node.title).strip()}\n\n"
        case "Tag":
            tag = str(node.tag).strip().lower()
            if _DROPPED_TAGS.fullmatch(tag) or not node.contents:
                return "\n" if tag == "br" else ""
            return _plain(node.contents)
        case "Wikilink":
            shown = node.title if node.text is None else node.text
            return "" if _DROPPED_LINKS.match(str(node.title)) else _plain(shown).lstrip(":")
        case "ExternalLink":
            return _plain(node.title) if node.brackets and node.title is not None else ""
        case "HTMLEntity":
            return str(node.normalize())
        case "Template":
            return _template_text(node)
    return ""


def _template_text(node: Any) -> str:
    name = str(node.name).strip().lower()
    words = [_plain(param.value).strip() for param in node.params if not param.showkey]
    if name == "convert":  # {{convert|5|km|mi}}, {{convert|5|to|9|km|mi}}
        return " ".join(words[: 4 if words[1:2] and words[1] in _RANGES else 2])
    return "".join(words[_PROSE[name] :][:1]) if name in _PROSE else ""
