"""Text to blocks of token ids: WikiText-2 by the published protocol, a packaged Wikipedia sample, or any text
file.
"""

import bz2
import functools
import hashlib
import json
import logging
import math
import os
import re
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from tqdm.auto import tqdm

from dfrot_lab.disk.artefacts import cache_dir
from dfrot_lab.disk.downloads import WIKIPEDIA_XML, fetch
from dfrot_lab.recipe.specs import WINDOW, CorpusSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

WIKITEXT2 = "wikitext2"
SAMPLE = "wikipedia-sample"
DATA_FOLDER = "DFROT_LAB_DATA"
"""Environment variable: the folder that holds wiki.valid.raw and wiki.test.raw, itself or in its subfolder
wikitext2.
"""

_HALVES = {"calibration": "valid", "evaluation": "test"}
_WIKITEXT2_ROWS = {"train": 36718, "valid": 3760, "test": 4358}
_WIKITEXT2_SHA256 = {
    "valid": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
    "test": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
}
SAMPLE_VERSION = 1
"""Raise it with any change to how the sample's markup is stripped: the text changes, and with it every number
computed from it.
"""

SAMPLE_ARTICLES = 106
SAMPLE_SHA256 = {  # what mwparserfromhell 0.7.2 makes of the two halves
    "calibration": "f89786a34e873065e487a4db437695217296691e9f7b0dc3d378d114e878e467",
    "evaluation": "f920c560543cc5a1a43a1fc69254727ad41a02f910260c2dfc27aa3c140fd479",
}

_DROPPED_TAGS = {
    "ref",
    "references",
    "table",
    "tr",
    "td",
    "th",
    "caption",
    "gallery",
    "imagemap",
    "timeline",
    "score",
    "source",
    "hr",
}
_DROPPED_LINKS = re.compile(
    r"\s*(file|image|category|media|template|[a-z]{2,3}|be-x-old)\s*:", re.IGNORECASE
)  # short ones lead to other languages
_APPENDIX = re.compile(
    r"(see also|(foot)?notes|(primary |secondary )?sources|citations|works cited|references|gallery|(further|additional) reading|external links|"
    r"(selected )?(bibliography|publications|works)|published works|filmography|discography)( and (notes|references|further reading|sources))?",
    re.IGNORECASE,
)
# Templates that stand for words of the sentence around them, and which of their parameters those words are;
# all others go.
_PROSE = {
    "lang": 1,
    "transl": 1,
    **dict.fromkeys(
        ("nowrap", "small", "smaller", "angbr", "quote", "val", "nihongo", "vanchor", "sc", "keypress"), 0
    ),
}
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


def resolve(spec: CorpusSpec) -> CorpusSpec:
    """`spec` with `auto` replaced by what is here: `wikitext2` if the raw files are in $DFROT_LAB_DATA, else
    `wikipedia-sample`; no network.

    Other names come back unchanged. ValueError if the name is neither a corpus nor a text file.
    """
    if spec.name == "auto":
        here = all(_raw_file(split) for split in {"valid", "test", _HALVES.get(spec.split, spec.split)})
        spec = spec.with_(name=WIKITEXT2 if here else SAMPLE)
        _log.info(
            "Corpus auto is %s: WikiText-2's raw files are %sin $%s",
            spec.name,
            "" if here else "not ",
            DATA_FOLDER,
        )
    elif spec.name not in (WIKITEXT2, SAMPLE) and not Path(spec.name).is_file():
        raise ValueError(
            f"CorpusSpec.name must be auto, {WIKITEXT2}, {SAMPLE} or the path of a text file; got {spec.name!r}, which is no file here"
        )
    return spec


def load_text(spec: CorpusSpec) -> str:
    """The text that `spec` names, whole.

    `wikitext2`: the split's rows joined by blank lines, as GPTQ, QuaRot, SpinQuant and DFRot do.
    `wikipedia-sample`: the articles at even (`calibration`) or odd (`evaluation`) places of the dump. A text
    file (UTF-8): what is before or after the paragraph break nearest its middle. ValueError if the corpus has
    no such split, or a file is not the one it should be; ConnectionError if WikiText-2 is neither here nor at
    the hub.
    """
    spec = resolve(spec)
    if spec.name == WIKITEXT2:
        return "\n\n".join(_wikitext2_rows(_HALVES.get(spec.split, spec.split)))
    if spec.split not in _HALVES:
        raise ValueError(
            f"CorpusSpec.split must be calibration or evaluation for {spec.name} (only {WIKITEXT2} has more); got {spec.split!r}"
        )
    if spec.name == SAMPLE:
        return _sample_half(spec.split)
    return _file_half(Path(spec.name), spec.split)


def fingerprint(spec: CorpusSpec) -> str:
    """sha256 (hex) of `load_text(spec)` in UTF-8: equal if and only if the text is the same, whatever it is
    called.
    """
    return _sha256(load_text(spec))


def token_ids(spec: CorpusSpec, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """Ids (tokens,) int64 of the whole text, with one BOS in front if the tokenizer itself begins a text with
    it, and no other special token.
    """
    import torch

    ids = _plain_ids(load_text(spec), tokenizer)
    if _adds_bos(tokenizer) and ids[:1] != (tokenizer.bos_token_id,):
        ids = (tokenizer.bos_token_id, *ids)
    return torch.tensor(ids, dtype=torch.int64)


@functools.lru_cache(maxsize=2)
def _plain_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Ids without special tokens, kept: every row of a table is scored on the same text, and tokenising
    WikiText-2 takes a second.
    """
    # verbose=False: a text longer than the model's context is what we want here, and the warning about it is
    # not.
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def token_blocks(
    spec: CorpusSpec, tokenizer: "PreTrainedTokenizerBase", *, blocks: int, window: int = WINDOW
) -> "Tensor":
    """The first `blocks` whole windows of the text, (blocks, window) int64: the text is tokenised whole, then
    cut.

    BOS is thus in the first window only, as in the published perplexities. ValueError if the text has fewer
    whole windows.
    """
    if min(blocks, window) < 1:
        raise ValueError(f"token_blocks.blocks and window must be >= 1; got {blocks} and {window}")
    ids = token_ids(spec, tokenizer)
    whole = len(ids) // window
    if blocks > whole:
        name = f"{spec.name} ({spec.split})"
        raise ValueError(
            f"token_blocks.blocks must be <= {whole}: {name} has {len(ids)} tokens, {whole} whole windows of {window}; got {blocks}"
        )
    return ids[: blocks * window].view(blocks, window)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    bos = tokenizer.bos_token_id
    with_special, without = (tokenizer("a", add_special_tokens=add).input_ids for add in (True, False))
    return bos is not None and with_special[:1] == [bos] and len(with_special) > len(without)


def _raw_file(split: str) -> Path | None:
    """The raw file of `valid`, `test` or `train` in $DFROT_LAB_DATA, if it is there."""
    folder = os.environ.get(DATA_FOLDER)
    if not folder:
        return None
    paths = [
        place / f"wiki.{split}.raw"
        for place in (Path(folder).expanduser(), Path(folder).expanduser() / WIKITEXT2)
    ]
    return next((path for path in paths if path.is_file()), None)


def _wikitext2_rows(split: str) -> list[str]:
    """The rows as in the hub's `wikitext-2-raw-v1`: one a line of the raw file, with its line end; a blank
    line is an empty row.
    """
    path = _raw_file(split)
    if path is None:
        rows, source = _hub_rows(split), "the hub"
    else:
        rows, source = [line if line.strip() else "" for line in _raw_lines(path, split)], str(path)
    if len(rows) != _WIKITEXT2_ROWS[split]:
        raise ValueError(
            f"the {split} split of WikiText-2 must have {_WIKITEXT2_ROWS[split]} rows; got {len(rows)} from {source}: get it again"
        )
    return rows


def _raw_lines(path: Path, split: str) -> list[str]:
    data = path.read_bytes()
    found, expected = hashlib.sha256(data).hexdigest(), _WIKITEXT2_SHA256.get(split)
    if expected not in (None, found):
        raise ValueError(
            f"{path} must be WikiText-2's raw {split} split, sha256 {expected}; got {found}: get the file again, or point ${DATA_FOLDER} elsewhere"
        )
    return list(
        StringIO(data.decode("utf-8"))
    )  # splits at \n alone: str.splitlines would cut at rarer characters inside a line too


def _hub_rows(split: str) -> list[str]:
    from datasets import load_dataset

    _log.info("Loading the %s split of WikiText-2 from the Hugging Face hub", split)
    try:
        return list(
            load_dataset(
                "Salesforce/wikitext", "wikitext-2-raw-v1", split={"valid": "validation"}.get(split, split)
            )["text"]
        )
    except (
        OSError,
        ValueError,
    ) as error:  # datasets raises either, by how the network fails and what is cached
        raise ConnectionError(
            f"WikiText-2 is not here and could not be loaded from the hub ({error}): set ${DATA_FOLDER} to a folder with wiki.{split}.raw, "
            f"or use the corpus {SAMPLE}"
        ) from error


def _sample_half(split: str) -> str:
    articles = _sample_articles()
    text = "\n\n".join(
        f" = {a['title']} = \n\n{a['text']}" for a in articles[list(_HALVES).index(split) :: 2]
    )
    if _sha256(text) != SAMPLE_SHA256[split]:
        said = "The %s half of %s is not the text this package knows (sha256 %s, must be %s): install mwparserfromhell 0.7.2, or delete %s"
        _log.warning(said, split, SAMPLE, _sha256(text), SAMPLE_SHA256[split], cache_dir() / "corpora")
    return text


def _sample_articles() -> list[dict[str, str]]:
    """Title and text of each article, in the dump's order; stripping the markup takes seconds, so the result
    is kept.
    """
    path = cache_dir() / "corpora" / f"{SAMPLE}-{SAMPLE_VERSION}-{version('mwparserfromhell')}.json"
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            _log.warning("%s is damaged (%s): making it again", path, error)
    raw = _read_dump(fetch(WIKIPEDIA_XML))
    if len(raw) != SAMPLE_ARTICLES:
        raise ValueError(
            f"{SAMPLE} must have {SAMPLE_ARTICLES} articles; got {len(raw)}: report it, the dump is not the one this package knows"
        )
    articles = [
        {"title": title, "text": strip_markup(text)}
        for title, text in tqdm(raw, desc="Reading Wikipedia articles", delay=2)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(articles, ensure_ascii=False, indent=0), encoding="utf-8")
    partial.replace(path)
    return articles


def _read_dump(path: Path) -> list[tuple[str, str]]:
    """Title and wiki markup of each article of a bz2 MediaWiki XML dump: namespace 0, no redirects."""
    articles = []
    with bz2.open(path) as stream:
        for _, page in ElementTree.iterparse(stream):
            if page.tag.endswith("}page"):
                ns = page.tag.removesuffix("page")
                if page.findtext(f"{ns}ns") == "0" and page.find(f"{ns}redirect") is None:
                    articles.append(
                        (page.findtext(f"{ns}title", ""), page.findtext(f"{ns}revision/{ns}text", ""))
                    )
                page.clear()  # the tree would keep every page read so far
    return articles


def strip_markup(markup: str) -> str:
    """MediaWiki markup as plain paragraphs: no tables, references, files, templates or appendices; headings
    as ` = = History = = `.
    """
    import mwparserfromhell

    text = _plain(mwparserfromhell.parse(_REFERENCES.sub("", markup)))
    for pattern, replacement in _HOLES:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    lead, *rest = re.split(rf"^{_HEADING}(\d) (.*)$", text, flags=re.MULTILINE)
    sections = _without_appendices(
        [
            (int(level), title, body.strip())
            for level, title, body in zip(rest[::3], rest[1::3], rest[2::3], strict=True)
        ]
    )
    parts = [
        lead.strip(),
        *(f" {'= ' * level}{title}{' =' * level} \n\n{body}".rstrip("\n") for level, title, body in sections),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _without_appendices(sections: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """The (level, title, body) sections that hold prose: no reference lists with what is under them, then
    none left with nothing in it.
    """
    prose, hidden = [], math.inf
    for level, title, body in sections:
        if level <= hidden:
            hidden = level if _APPENDIX.fullmatch(title) else math.inf
            if hidden == math.inf:
                prose.append((level, title, body))
    kept: list[tuple[int, str, str]] = []
    for section in reversed(
        prose
    ):  # from the end: a heading stays if it has text, or a deeper heading that stays follows it
        if section[2] or (kept and kept[0][0] > section[0]):
            kept.insert(0, section)
    return kept


def _plain(code: Any) -> str:
    return "".join(_node_text(node) for node in code.nodes)


def _node_text(node: Any) -> str:
    """The words a reader of the page sees for one node of mwparserfromhell's tree; `strip_code` would keep
    tables, captions and categories.
    """
    kind = type(node).__name__
    if kind == "Text":
        return str(node)
    if kind == "Heading":
        return f"\n\n{_HEADING}{node.level} {_plain(node.title).strip()}\n\n"
    if kind == "Tag":
        tag = str(node.tag).strip().lower()
        if tag in _DROPPED_TAGS or not node.contents:
            return "\n" if tag == "br" else ""
        return _plain(node.contents)
    if kind == "Wikilink":
        return (
            ""
            if _DROPPED_LINKS.match(str(node.title))
            else _plain(node.title if node.text is None else node.text).lstrip(":")
        )
    if kind == "ExternalLink":
        return _plain(node.title) if node.brackets and node.title is not None else ""
    if kind == "HTMLEntity":
        return node.normalize()
    return _template_text(node) if kind == "Template" else ""


def _template_text(node: Any) -> str:
    name = str(node.name).strip().lower()
    words = [_plain(param.value).strip() for param in node.params if not param.showkey]
    if name == "convert":  # {{convert|5|km|mi}}, {{convert|5|to|9|km|mi}}
        return " ".join(words[: 4 if words[1:2] and words[1] in _RANGES else 2])
    return "".join(words[_PROSE[name] :][:1]) if name in _PROSE else ""


def _file_half(path: Path, split: str) -> str:
    """What is before (`calibration`) or after the paragraph break nearest the middle; in a text without one,
    the line break or the space.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"CorpusSpec.name must be a text file in UTF-8; got {path} ({error}): convert it"
        ) from error
    inner = (
        [m.end() for m in re.finditer(mark, text) if m.end() < len(text)] for mark in ("\n\n", "\n", " ")
    )
    cut = min(
        next((places for places in inner if places), [len(text) // 2]),
        key=lambda place: abs(place - len(text) / 2),
    )
    return text[:cut] if split == "calibration" else text[cut:]
