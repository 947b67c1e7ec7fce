"""Text and token ids: the published protocol, the stripped sample, text files; a byte-level tokenizer made
here stands for a model's.
"""

import bz2
import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dfrot_lab.disk.downloads import WIKIPEDIA_XML, fetch
from dfrot_lab.model import corpus
from dfrot_lab.model.corpus import fingerprint, load_text, resolve, token_blocks, token_ids
from dfrot_lab.model.wiki import strip_markup
from dfrot_lab.recipe.specs import WINDOW, CorpusSpec, calibration_of

BOS = 256
RAW_FILES = os.environ.get(corpus.DATA_FOLDER)
needs_wikitext2 = pytest.mark.skipif(
    not (corpus._raw_file("valid") and corpus._raw_file("test")),
    reason=f"WikiText-2's raw files are not in ${corpus.DATA_FOLDER}",
)


def byte_tokenizer(
    *, bos: bool = False, adds_bos: bool = False, max_length: int = 64
) -> PreTrainedTokenizerFast:
    """One token a byte, ids 0..255 in the byte-level alphabet's order, `<s>` is 256."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {
        "<s>": BOS
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, **({"bos_token": "<s>"} if bos else {})
    )


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Nothing cached and no data folder, unless the test is about what is really there."""
    monkeypatch.delenv(corpus.DATA_FOLDER, raising=False)
    if not request.node.get_closest_marker("model"):
        monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text_file(tmp_path: Path) -> CorpusSpec:
    path = tmp_path / "notes.txt"
    path.write_text(
        "First paragraph.\n\nSecond one,\nwith a line break.\n\nThird: naïve café.\n", encoding="utf-8"
    )
    return CorpusSpec(name=str(path), split="calibration")


def fake_raw_files(folder: Path, names: tuple[str, ...] = ("valid", "test")) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for name in names:
        (folder / f"wiki.{name}.raw").write_text(" \n = Title = \n \n Text .\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("subfolder", "files", "split", "taken"),
    [
        ("", ("valid", "test"), "evaluation", "wikitext2"),
        ("wikitext2", ("valid", "test"), "calibration", "wikitext2"),
        ("", ("valid",), "evaluation", "wikipedia-sample"),
        ("", (), "calibration", "wikipedia-sample"),
        ("", ("valid", "test"), "train", "wikipedia-sample"),  # no train file: auto never goes to the hub
    ],
)
def test_auto_takes_what_is_here(subfolder, files, split, taken, tmp_path, monkeypatch, caplog):
    fake_raw_files(tmp_path / subfolder, files)
    monkeypatch.setenv(corpus.DATA_FOLDER, str(tmp_path))
    with caplog.at_level(logging.INFO, logger="dfrot_lab"):
        assert resolve(CorpusSpec(split=split)) == CorpusSpec(name=taken, split=split)
    assert f"Corpus auto is {taken}: WikiText-2's raw files are " in caplog.text


def test_other_names_stay_and_an_unknown_one_lists_the_choices(text_file: CorpusSpec):
    for spec in (text_file, CorpusSpec(name="wikitext2"), CorpusSpec(name="wikipedia-sample")):
        assert resolve(spec) is spec
    with pytest.raises(
        ValueError,
        match=r"CorpusSpec.name must be auto, wikitext2, wikipedia-sample or the path of a text file; got 'wikitext-3'",
    ):
        resolve(CorpusSpec(name="wikitext-3"))


def test_rows_are_joined_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rare = " one\x0bline\x85still\u2028one \n"  # str.splitlines would make four of it
    data = (" \n = Title = \n \n" + rare).encode()
    (tmp_path / "wiki.test.raw").write_bytes(data)
    monkeypatch.setenv(corpus.DATA_FOLDER, str(tmp_path))
    monkeypatch.setitem(corpus._WIKITEXT2_SHA256, "test", hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(corpus._WIKITEXT2_ROWS, "test", 4)
    assert load_text(CorpusSpec(name="wikitext2")) == "\n\n".join(["", " = Title = \n", "", rare])


def test_wrong_raw_file_is_refused_with_both_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_raw_files(tmp_path)
    monkeypatch.setenv(corpus.DATA_FOLDER, str(tmp_path))
    found = hashlib.sha256((tmp_path / "wiki.test.raw").read_bytes()).hexdigest()
    with pytest.raises(
        ValueError,
        match=rf"wiki.test.raw must be WikiText-2's raw test split, sha256 173c87a5\w+; got {found}: get the file again",
    ):
        load_text(CorpusSpec(name="wikitext2"))
    fake_raw_files(tmp_path, ("train",))  # its hash is not known, its number of rows is
    with pytest.raises(ValueError, match=r"train split of WikiText-2 must have 36718 rows; got 4 from"):
        load_text(CorpusSpec(name="wikitext2", split="train"))


def test_offline_says_what_to_do(tmp_path: Path):
    script = "from dfrot_lab.model.corpus import load_text\nfrom dfrot_lab.recipe.specs import CorpusSpec\nload_text(CorpusSpec(name='wikitext2'))"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
    }  # both are read when the hub's client is imported
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: WikiText-2 is not here and could not be loaded from the hub")
    assert last.endswith(
        "set $DFROT_LAB_DATA to a folder with wiki.test.raw, or use the corpus wikipedia-sample"
    )


@needs_wikitext2
def test_real_wikitext2(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(corpus.DATA_FOLDER, str(RAW_FILES))
    text = load_text(CorpusSpec(name="wikitext2"))
    assert text.startswith(
        "\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film , television and theatre actor ."
    )
    assert text == load_text(CorpusSpec(name="wikitext2", split="test"))
    assert load_text(CorpusSpec(split="calibration")).startswith("\n\n = Homarus gammarus = \n")


MARKUP = """{{Infobox country|name=X}}{{use dmy dates}}<!-- a note -->
'''Anar''chy''''' ({{IPAc-en|a}}; {{lang|el|ἀναρχία}}) is a [[political philosophy|''way'' of thought]],<ref name="a">A. ''Book {{cite|x}}</ref> \
seen in [[London]]<ref name="b/c" /> over {{convert|5|to|9|km|mi}}&nbsp;of [http://example.org roads].{{citation needed}}
[[File:A.jpg|thumb|A [[nested]] caption]]
{| class="wikitable"
| cell || other
|}
== History ==
=== Empty ===
{{main|Other}}
=== Early ===
* one ({{unknown}})
* two H<sub>2</sub>O __NOTOC__
== Empty too ==
== See also ==
* [[Gone]]
=== Gone as well ===
Text.
== Legacy<ref>x</ref> ==
Kept.
== References and notes ==
{{reflist}}
[[Category:Gone]]
[[de:Weg]]
"""

PLAIN = """Anarchy (ἀναρχία) is a way of thought, seen in London over 5 to 9 km of roads.

 = = History = = 

 = = = Early = = = 

one
two H2O

 = = Legacy = = 

Kept.
"""


def test_markup_becomes_prose():
    assert strip_markup(MARKUP) == PLAIN


def test_markup_with_mistakes_leaves_no_markup():
    text = strip_markup(
        "Some ''text [[here.\n{| class=x\n|+ caption\n! head\n| cell\n\nMore text.<ref>''open</ref>"
    )
    assert text == "Some text here.\n\nMore text.\n"


def dump(folder: Path, titles: str = "ABCD") -> Path:
    """A MediaWiki dump with these articles, a redirect and a talk page."""
    page = (
        "<page><title>{}</title><ns>{}</ns>{}<revision><text>'''{}''' is a letter.</text></revision></page>"
    )
    pages = [page.format(t, 0, "", t) for t in titles] + [
        page.format("R", 0, '<redirect title="A"/>', "R"),
        page.format("Talk:A", 1, "", "T"),
    ]
    path = folder / "dump.xml.bz2"
    path.write_bytes(
        bz2.compress(
            f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'.encode()
        )
    )
    return path


@pytest.fixture
def small_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "fetch", lambda _: dump(tmp_path))


def sample(split: str = "calibration") -> CorpusSpec:
    return CorpusSpec(name="wikipedia-sample", split=split)


def test_sample_halves_are_every_other_article(small_sample: None):
    assert load_text(sample()) == " = A = \n\nA is a letter.\n\n\n = C = \n\nC is a letter.\n"
    assert load_text(sample("evaluation")) == " = B = \n\nB is a letter.\n\n\n = D = \n\nD is a letter.\n"


def test_sample_is_stripped_once_unless_its_file_is_damaged(
    small_sample: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    text = load_text(sample())
    with monkeypatch.context() as no_fetch:
        no_fetch.setattr(corpus, "fetch", lambda _: pytest.fail("fetched twice"))
        assert load_text(sample()) == text
    next((tmp_path / "cache" / "corpora").iterdir()).write_text('[{"title": "A', encoding="utf-8")
    assert load_text(sample()) == text
    assert "is damaged" in caplog.text


def test_other_sample_is_said(small_sample: None, caplog: pytest.LogCaptureFixture):
    assert f"(sha256 {fingerprint(sample())}, must be {corpus.SAMPLE_SHA256['calibration']})" in caplog.text


@pytest.mark.model
def test_real_sample_is_the_recorded_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    path = fetch(WIKIPEDIA_XML)
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path))  # so that the markup is stripped now
    monkeypatch.setattr(corpus, "fetch", lambda _: path)
    halves = {split: load_text(sample(split)) for split in ("calibration", "evaluation")}
    assert {split: fingerprint(sample(split)) for split in halves} == corpus.SAMPLE_SHA256
    assert "not the text" not in caplog.text
    assert halves["calibration"].startswith(
        " = Anarchism = \n\nAnarchism is a political philosophy that advocates self-governed societies"
    )
    for text in halves.values():
        assert not [
            mark
            for mark in ("{{{", "[[", "]]", "<ref", "wikitable", "|thumb", "http://", "\n\n\n\n", "  ")
            if mark in text
        ]


def test_text_file_is_cut_at_a_paragraph(text_file: CorpusSpec):
    assert load_text(text_file) == "First paragraph.\n\nSecond one,\nwith a line break.\n\n"
    assert load_text(text_file.with_(split="evaluation")) == "Third: naïve café.\n"


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a b\ncc dd\n", "a b\n"),
        ("one two three", "one two "),
        ("abcdef", "abc"),
        ("one paragraph only\n\n", "one paragraph only\n"),
        ("\ufeffa b", "a "),
    ],
)
def test_text_file_without_paragraphs(text: str, first: str, tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text(text, encoding="utf-8")
    halves = [load_text(CorpusSpec(name=str(path), split=split)) for split in ("calibration", "evaluation")]
    assert halves[0] == first
    assert "".join(halves) == text.removeprefix("\ufeff")


def test_text_file_has_two_splits_and_is_utf8(text_file: CorpusSpec):
    with pytest.raises(
        ValueError,
        match=r"CorpusSpec.split must be calibration or evaluation or whole for .*notes.txt; got 'test'",
    ):
        load_text(text_file.with_(split="test"))
    Path(text_file.name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"CorpusSpec.name must be a text file in UTF-8; got .*notes.txt"):
        load_text(text_file)


def test_fingerprint_is_of_the_text_alone(text_file: CorpusSpec, tmp_path: Path):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text_file.name).read_bytes())
    assert (
        fingerprint(text_file)
        == fingerprint(text_file.with_(name=str(copy)))
        == hashlib.sha256(load_text(text_file).encode()).hexdigest()
    )
    assert fingerprint(text_file) != fingerprint(text_file.with_(split="evaluation"))


def test_ids_are_the_whole_text(text_file: CorpusSpec, caplog: pytest.LogCaptureFixture):
    tokenizer = byte_tokenizer(max_length=4)
    ids = token_ids(text_file.with_(split="evaluation"), tokenizer)
    assert ids.dtype == torch.int64 and ids.shape == (len("Third: naïve café.\n".encode()),)
    assert "longer than" not in caplog.text
    tokenizer("12345")
    assert "longer than" in caplog.text  # other uses of the tokenizer still warn


def test_bos_only_where_the_tokenizer_adds_it(text_file: CorpusSpec):
    plain = token_ids(text_file, byte_tokenizer())
    has_it = token_ids(text_file, byte_tokenizer(bos=True))
    adds_it = token_ids(text_file, byte_tokenizer(bos=True, adds_bos=True))
    torch.testing.assert_close(has_it, plain, rtol=0, atol=0)
    torch.testing.assert_close(adds_it, torch.cat([torch.tensor([BOS]), plain]), rtol=0, atol=0)
    Path(text_file.name).write_text("<s>ab\n\ncd", encoding="utf-8")
    assert (
        token_ids(text_file, byte_tokenizer(bos=True, adds_bos=True)).tolist().count(BOS) == 1
    )  # never doubled


def test_blocks_are_consecutive_windows(text_file: CorpusSpec):
    tokenizer = byte_tokenizer(bos=True, adds_bos=True)
    blocks = token_blocks(text_file, tokenizer, blocks=3, window=16)
    assert blocks.shape == (3, 16) and blocks.dtype == torch.int64
    torch.testing.assert_close(blocks.flatten(), token_ids(text_file, tokenizer)[:48], rtol=0, atol=0)


def test_impossible_blocks_say_what_there_is(text_file: CorpusSpec):
    with pytest.raises(
        ValueError,
        match=r"windows must be at most 3: .*notes.txt \(calibration\) has 50 tokens, 3 whole windows of 16. Take",
    ):
        token_blocks(text_file, byte_tokenizer(), blocks=4, window=16)
    with pytest.raises(
        ValueError,
        match=rf"notes.txt \(calibration\) must be a text of at least one window of {WINDOW} tokens; got 50",
    ):
        token_blocks(text_file, byte_tokenizer(), blocks=1)
    for blocks, window in [(0, 16), (-1, 16), (1, 0)]:
        with pytest.raises(
            ValueError, match=rf"token_blocks.blocks and window must be >= 1; got {blocks} and {window}"
        ):
            token_blocks(text_file, byte_tokenizer(), blocks=blocks, window=window)


def test_a_text_is_read_once_for_all_keys_while_its_file_is_the_same(
    text_file: CorpusSpec, monkeypatch: pytest.MonkeyPatch
):
    loads: list[CorpusSpec] = []
    monkeypatch.setattr(corpus, "load_text", lambda spec: loads.append(spec) or load_text(spec))
    first = [fingerprint(text_file) for _ in range(3)]
    assert loads == [text_file] and len(set(first)) == 1
    assert fingerprint(text_file.with_(split="evaluation")) != first[0] and len(loads) == 2
    Path(text_file.name).write_text("Other words.\n\nAnd more.\n", encoding="utf-8")
    assert fingerprint(text_file) != first[0] and len(loads) == 3
    monkeypatch.setattr(corpus, "VERSION", 2)
    fingerprint(text_file)
    assert len(loads) == 4, "a text that is cut in another way has another key"


@pytest.mark.model
@pytest.mark.parametrize("blocks", [1, 3])
def test_of_a_large_text_so_much_is_tokenised_as_is_needed(blocks, default_model, monkeypatch):
    """And the ids are the first of those of the whole text."""
    tokenizer, spec = default_model.tokenizer, CorpusSpec(name="wikipedia-sample", split="calibration")
    read, plain = [], corpus._plain_ids
    monkeypatch.setattr(corpus, "_plain_ids", lambda text, own: read.append(len(text)) or plain(text, own))
    found = corpus.token_blocks(spec, tokenizer, blocks=blocks, window=2048)
    assert max(read) < 16 * (blocks * 2048 + 2048) and max(read) < len(corpus.load_text(spec)) / 4
    assert torch.equal(found.flatten(), corpus.token_ids(spec, tokenizer)[: blocks * 2048])


@pytest.mark.parametrize("between", ["\n\n", "\n", " ", ""])
def test_a_text_is_cut_where_it_can_be_so_that_none_is_tokenised_whole(between, tmp_path, monkeypatch):
    """And the ids are the first of the whole text's, whatever stands between its words."""
    path = tmp_path / "t.txt"
    path.write_text(between.join(f"word{i}" for i in range(40_000)))
    read, plain = [], corpus._plain_ids
    monkeypatch.setattr(corpus, "_plain_ids", lambda text, own: read.append(len(text)) or plain(text, own))
    tokenizer, spec = byte_tokenizer(), CorpusSpec(name=str(path), split="calibration")
    found = corpus.token_blocks(spec, tokenizer, blocks=3, window=16)
    assert max(read) < 2000
    assert torch.equal(found.flatten(), corpus.token_ids(spec, tokenizer)[:48])


def test_a_text_file_given_to_calibrate_on_is_taken_whole(tmp_path):
    own, scored = tmp_path / "own.txt", tmp_path / "scored.txt"
    own.write_text("one two\nthree four\n"), scored.write_text("five six\nseven\n")
    assert load_text(calibration_of(str(scored), str(own))) == own.read_text()
    for half in (calibration_of(str(scored), None), calibration_of(str(scored), str(scored))):
        assert load_text(half) == "five six\n", "never what is scored"
    assert calibration_of("wikitext2", "wikipedia-sample").split == "calibration"
    for name in ("wikitext2", "wikipedia-sample"):
        with pytest.raises(ValueError, match=rf"CorpusSpec.split must be .* for {name}; got 'whole'"):
            load_text(CorpusSpec(name=name, split="whole"))
