"""Text to blocks of token ids: WikiText-2 by the published protocol, a Wikipedia sample, or a text file."""

import functools
import hashlib
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dfrot_lab.disk.atomic import cache_dir, digest, write_text
from dfrot_lab.disk.downloads import WIKIPEDIA_XML, fetch
from dfrot_lab.disk.provenance import version_of
from dfrot_lab.model.wiki import read_dump, strip_markup
from dfrot_lab.recipe.base import hint_of_signed, require
from dfrot_lab.recipe.specs import WHOLE, WINDOW, CorpusSpec

log = logging.getLogger(__name__)
BREAKS = ("\n\n", "\n", " ")
SPAN, GOLDEN = 1 << 19, (math.sqrt(5) - 1) / 2  # tokens that samples are taken from; a walk's step
CHARACTERS, SPARE = 8, 64  # of a text read for each token wanted, at first; tokens read beyond those
WIKITEXT2 = "wikitext2"
SAMPLE = "wikipedia-sample"
NAMED = (WIKITEXT2, SAMPLE)  # texts that are no file of one's own
DATA_FOLDER = "DFROT_LAB_DATA"  # environment variable: a folder with wiki.*.raw, or its wikitext2 with them
_HALVES = {"calibration": "valid", "evaluation": "test"}
_WIKITEXT2_ROWS = {"train": 36718, "valid": 3760, "test": 4358}
_WIKITEXT2_SHA256 = {
    "valid": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
    "test": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
}
VERSION = 1  # raise it with any change to how markup is stripped or a text is cut: all numbers change
SAMPLE_SHA256 = {  # what mwparserfromhell 0.7.2 makes of the two halves
    "calibration": "f89786a34e873065e487a4db437695217296691e9f7b0dc3d378d114e878e467",
    "evaluation": "f920c560543cc5a1a43a1fc69254727ad41a02f910260c2dfc27aa3c140fd479",
}


def resolve(spec: CorpusSpec) -> CorpusSpec:
    """`spec` with `auto` replaced by what is here: WikiText-2 if its raw files are. ValueError: no text."""
    if spec.name == "auto":
        here = all(_raw_file(split) for split in {"valid", "test", _HALVES.get(spec.split, spec.split)})
        name, where = (WIKITEXT2, "in") if here else (SAMPLE, "not in")
        log.info("Corpus auto is %s: WikiText-2's raw files are %s $%s", name, where, DATA_FOLDER)
        return spec.with_(name=name)
    if spec.name not in NAMED and not Path(spec.name).is_file():
        rule = f"auto, {WIKITEXT2}, {SAMPLE} or the path of a text file"
        said = f"got {spec.name!r}, which is no file here."
        raise ValueError(f"CorpusSpec.name must be {rule}; {said}{hint_of_signed(spec.name)}")
    return spec


def load_text(spec: CorpusSpec) -> str:
    """The whole text that `spec` names. `wikitext2`: the split's rows joined by blank lines, as GPTQ, QuaRot
    and DFRot do. `wikipedia-sample`: articles at even (`calibration`) or odd places. A file (UTF-8): its part
    before or after the middle, or all of it. ValueError: no such split, a wrong file; ConnectionError."""
    spec = resolve(spec)
    parts = {WIKITEXT2: (*_HALVES, *_WIKITEXT2_ROWS), SAMPLE: (*_HALVES,)}.get(spec.name, (*_HALVES, WHOLE))
    require(
        "CorpusSpec.split", repr(spec.split), spec.split in parts, f"{' or '.join(parts)} for {spec.name}"
    )
    if spec.name == WIKITEXT2:
        return "\n\n".join(_wikitext2_rows(_HALVES.get(spec.split, spec.split)))
    return _sample_half(spec.split) if spec.name == SAMPLE else _file_half(Path(spec.name), spec.split)


def fingerprint(spec: CorpusSpec) -> str:
    """sha256 (hex) of `load_text(spec)` in UTF-8; an unchanged file is read once, whatever it is called."""
    spec = resolve(spec)
    path = _sample_file() if spec.name == SAMPLE else Path(spec.name)
    if spec.name == WIKITEXT2:
        path = _raw_file(_HALVES.get(spec.split, spec.split)) or path
    return _fingerprint(spec, VERSION, digest(path) if path.is_file() else "")


@functools.lru_cache(maxsize=64)
def _fingerprint(spec: CorpusSpec, _version: int, _bytes: str) -> str:
    return hashlib.sha256(load_text(spec).encode()).hexdigest()


def token_ids(spec: CorpusSpec, tokenizer: Any, least: int | None = None) -> Tensor:
    """Ids (tokens,) int64 of the whole text, or of so much of it that they are `least` and the first of all;
    in front a BOS if the tokenizer itself adds one."""
    text = load_text(spec)
    text = text if least is None else _enough_text(text, least, tokenizer)
    ids, bos = _plain_ids(text, tokenizer), tokenizer.bos_token_id
    with_special, without = (tokenizer("a", add_special_tokens=add).input_ids for add in (True, False))
    adds_bos = bos is not None and with_special[:1] == [bos] and len(with_special) > len(without)
    return torch.tensor((bos, *ids) if adds_bos and ids[:1] != (bos,) else ids, dtype=torch.int64)


@functools.lru_cache(maxsize=4)
def _plain_ids(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Ids without special tokens, kept: every row of a table is scored on the same text."""
    # verbose=False: no warning about a text longer than the model's context, which is what we want here
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _enough_text(text: str, tokens: int, tokenizer: Any) -> str:
    """The start of a text, to one of BREAKS, that has SPARE more than `tokens` tokens; or all of it. What
    comes behind it changes its last few tokens at the most; a large text takes long."""
    size = CHARACTERS * tokens
    while size < len(text):
        cut = _break_after(text, size)
        if len(_plain_ids(text[:cut], tokenizer)) >= tokens + SPARE:
            return text[:cut]
        size = 2 * cut
    return text


def _break_after(text: str, size: int) -> int:
    """The first place behind `size` characters, but not twice as far, where a text may be cut: the end of a
    paragraph, else of a line, else of a word, else any."""
    marks = (text.find(mark, size, 2 * size) for mark in BREAKS)
    return next((cut for cut in marks if cut >= 0), 2 * size)


def token_blocks(spec: CorpusSpec, tokenizer: Any, *, blocks: int, window: int = WINDOW) -> Tensor:
    """The first `blocks` whole windows of the text tokenised whole, (blocks, window) int64: BOS in the first
    alone, as in the published perplexities. ValueError for more than there are."""
    return _whole_windows(spec, tokenizer, blocks, window, blocks * window)


def _whole_windows(spec: CorpusSpec, tokenizer: Any, blocks: int, window: int, least: int) -> Tensor:
    """The whole windows (count, window) of the first `least` tokens of a text; ValueError below `blocks`."""
    require("token_blocks.blocks and window", f"{blocks} and {window}", min(blocks, window) >= 1, ">= 1")
    ids = token_ids(spec, tokenizer, least)[:least]
    whole = len(ids) // window
    name = f"{spec.name} ({spec.split})"
    require(name, f"{len(ids)} tokens", whole, f"a text of at least one window of {window} tokens")
    there = f"{name} has {len(ids)} tokens, {whole} whole windows of {window}"
    require("windows", blocks, blocks <= whole, f"at most {whole}: {there}. Take a longer text, or fewer")
    return ids[: whole * window].view(whole, window)


def sampled_blocks(
    spec: CorpusSpec, tokenizer: Any, *, blocks: int, sample: int | None, window: int = WINDOW
) -> Tensor:
    """The windows (blocks, window) of a `sample`: of the text's whole windows (of a long text's first half a
    million tokens) those at `places`. Without a sample the first ones, as `token_blocks`. ValueError."""
    if sample is None:
        return token_blocks(spec, tokenizer, blocks=blocks, window=window)
    whole = _whole_windows(spec, tokenizer, blocks, window, max(SPAN, blocks * window))
    return whole[places(len(whole), blocks, sample)]


def places(count: int, windows: int, sample: int) -> list[int]:
    """Which `windows` of a text's `count` whole windows are a sample's: the next ones of a walk over the text
    in steps of the golden ratio of it. Any number of samples are spread evenly, none shares a window with
    another before all windows are used, and a sample hangs on no other."""
    step = max(1, round(GOLDEN * count))
    while math.gcd(step, count) > 1:
        step += 1
    return [(sample * windows + i) * step % count for i in range(windows)]


def _raw_file(split: str) -> Path | None:
    """The raw file of `valid`, `test` or `train` in $DFROT_LAB_DATA, if it is there."""
    if not os.environ.get(DATA_FOLDER):
        return None
    folder = Path(os.environ[DATA_FOLDER]).expanduser()
    paths = [place / f"wiki.{split}.raw" for place in (folder, folder / WIKITEXT2)]
    return next((path for path in paths if path.is_file()), None)


def _wikitext2_rows(split: str) -> list[str]:
    """The rows of the hub's `wikitext-2-raw-v1`: lines with their ends; a blank line is an empty row."""
    path, source = _raw_file(split), "the hub"
    if path is None:
        from datasets import load_dataset

        log.info("Loading the %s split of WikiText-2 from the Hugging Face hub", split)
        name = {"valid": "validation"}.get(split, split)
        try:
            rows = list(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=name)["text"])
        except (OSError, ValueError) as error:  # either, by how the network fails and what is cached
            said = f"WikiText-2 is not here and could not be loaded from the hub ({error})"
            advice = f"set ${DATA_FOLDER} to a folder with wiki.{split}.raw, or use the corpus {SAMPLE}"
            raise ConnectionError(f"{said}: {advice}") from error
    else:
        found, expected = digest(path, "sha256"), _WIKITEXT2_SHA256.get(split)
        if expected not in (None, found):
            rule = f"WikiText-2's raw {split} split, sha256 {expected}"
            advice = f"get the file again, or point ${DATA_FOLDER} elsewhere"
            raise ValueError(f"{path} must be {rule}; got {found}: {advice}")
        with path.open(encoding="utf-8", newline="\n") as file:
            rows, source = [line if line.strip() else "" for line in file], str(path)
    if len(rows) != (wanted := _WIKITEXT2_ROWS[split]):
        got = f"got {len(rows)} from {source}: get it again"
        raise ValueError(f"the {split} split of WikiText-2 must have {wanted} rows; {got}")
    return rows


def _sample_half(split: str) -> str:
    half = _sample_articles()[list(_HALVES).index(split) :: 2]
    text = "\n\n".join(f" = {a['title']} = \n\n{a['text']}" for a in half)
    if (found := hashlib.sha256(text.encode()).hexdigest()) != SAMPLE_SHA256[split]:
        fault = f"is not the text this package knows (sha256 {found}, must be {SAMPLE_SHA256[split]})"
        advice = f"install mwparserfromhell 0.7.2, or delete {_sample_file()}"
        log.warning("The %s half of %s %s: %s", split, SAMPLE, fault, advice)
    return text


def _sample_file() -> Path:
    return cache_dir() / "corpora" / f"{SAMPLE}-{VERSION}-{version_of('mwparserfromhell')}.json"


def _sample_articles() -> list[dict[str, str]]:
    """Title and text of each article, in the dump's order; kept, since stripping the markup takes seconds."""
    path = _sample_file()
    if path.is_file():
        try:
            return list(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            log.warning("%s is damaged (%s): making it again", path, error)
    bar = tqdm(read_dump(fetch(WIKIPEDIA_XML)), desc="Reading Wikipedia articles", delay=2)
    articles = [{"title": title, "text": strip_markup(text)} for title, text in bar]
    write_text(path, json.dumps(articles, ensure_ascii=False, indent=0))
    return articles


def _file_half(path: Path, split: str) -> str:
    """All of it (`whole`), or what is before or after the paragraph's, else line's, else word's end nearest
    the middle."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        said = f"CorpusSpec.name must be a text file in UTF-8; got {path} ({error}): convert it"
        raise ValueError(said) from error
    require("CorpusSpec.name", path, text.strip(), "a file with a text in it")
    if split == WHOLE:
        return text
    places = next(filter(None, (_ends_near(text, mark) for mark in BREAKS)), [len(text) // 2])
    middle = min(places, key=lambda place: abs(place - len(text) / 2))
    return text[:middle] if split == "calibration" else text[middle:]


def _ends_near(text: str, mark: str) -> list[int]:
    """Where breaks end, of all those the two nearest the middle among them; none at the end of the text."""
    if len(mark) > 1:  # three newlines are one paragraph's break, not two
        return [m.end() for m in re.finditer(mark, text) if m.end() < len(text)]
    half = len(text) // 2
    found = text.rfind(mark, 0, half), text.find(mark, half, len(text) - 1)
    return [place + 1 for place in found if place >= 0]
