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
from dfrot_lab.model.corpus import (
    fingerprint,
    load_text,
    places,
    resolve,
    sampled_blocks,
    token_blocks,
    token_ids,
)
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
    with pytest.raises(ValueError, match=r"no file here\. A name with @ and a hash .* say where it lies\.$"):
        resolve(CorpusSpec(name="mine.txt@f96e104cfc96"))


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


# ---- samples of windows
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [1, 3, 16])
@pytest.mark.parametrize("count", [16, 17, 21, 24, 60, 89, 148, 256, 1000])
def test_samples_share_no_window_before_all_are_used(count, windows):
    """And after that once more, in the same order: no window is scored twice as often as another."""
    walk = [place for sample in range(3 * count // windows + 1) for place in places(count, windows, sample)]
    assert set(walk) == set(range(count))
    assert all(sorted(walk[i : i + count]) == [*range(count)] for i in (0, 1, count, 2 * count))
    assert walk[count : 2 * count] == walk[:count]


@pytest.mark.parametrize("count", [60, 89, 100, 148, 256, 1000])
@pytest.mark.parametrize("windows", [6, 18, 48])
def test_samples_are_spread_evenly_over_the_text(count, windows):
    """Of the gaps between the windows that are used so far none is much larger than the even one."""
    used = sorted(places(count, windows, 0))
    gaps = [after - before for before, after in zip(used, [*used[1:], used[0] + count], strict=True)]
    assert max(gaps) <= 2.7 * count / windows + 1
    for half in (range(count // 2), range(count // 2, count)):
        assert abs(sum(place in half for place in used) - windows / 2) <= 1


def test_a_sample_hangs_on_no_other_and_the_next_goes_on_where_it_ends():
    assert places(148, 12, 0) == [place for sample in range(4) for place in places(148, 3, sample)]
    assert places(148, 3, 1000) == places(148, 1, 3000) + places(148, 1, 3001) + places(148, 1, 3002)
    assert places(1, 1, 5) == [0] and places(2, 1, 3) == [1] and places(2, 3, 1) == [1, 0, 1]


def windows_text(folder: Path, count: int, window: int = 16) -> CorpusSpec:
    """A text of `count` whole windows of bytes and half a one, each of its own letter."""
    path = folder / "windows.txt"
    letters = "".join(chr(ord("A") + i) * window for i in range(count))
    path.write_text(letters + "." * (window // 2), encoding="utf-8")
    return CorpusSpec(name=str(path), split="whole")


def letters_of(blocks: torch.Tensor) -> list[int]:
    """Which window of `windows_text` each block is; it must be whole."""
    assert all(len(set(block.tolist())) == 1 for block in blocks)
    return [ord(byte_tokenizer().decode(block[:1])) - ord("A") for block in blocks]


def test_a_sample_s_blocks_are_the_windows_at_its_places(tmp_path):
    spec = windows_text(tmp_path, 23)
    for sample in (0, 1, 5, 9):
        found = sampled_blocks(spec, byte_tokenizer(), blocks=3, sample=sample, window=16)
        assert found.shape == (3, 16) and found.dtype == torch.int64
        assert letters_of(found) == places(23, 3, sample)


def test_without_a_sample_the_first_windows_are_taken(tmp_path):
    spec, of = windows_text(tmp_path, 23), {"blocks": 3, "window": 16}
    plain = sampled_blocks(spec, byte_tokenizer(), sample=None, **of)
    assert torch.equal(plain, token_blocks(spec, byte_tokenizer(), **of))
    assert letters_of(plain) == [0, 1, 2]
    assert letters_of(sampled_blocks(spec, byte_tokenizer(), sample=0, **of)) == [0, 14, 5]


def test_a_bos_is_before_the_first_window_of_the_text_alone(tmp_path):
    """As in the published protocol, whichever windows are taken."""
    spec, tokenizer = windows_text(tmp_path, 7), byte_tokenizer(bos=True, adds_bos=True)
    found = [sampled_blocks(spec, tokenizer, blocks=1, sample=i, window=16) for i in range(7)]
    assert sorted(int((block == BOS).sum()) for block in found) == [0] * 6 + [1]
    assert int(found[0][0, 0]) == BOS


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_short_text_s_windows_are_taken_again(count, tmp_path):
    spec = windows_text(tmp_path, count)
    found = [
        letters_of(sampled_blocks(spec, byte_tokenizer(), blocks=count, sample=i, window=16))
        for i in range(5)
    ]
    assert all(sorted(each) == [*range(count)] for each in found)
    one = [
        letters_of(sampled_blocks(spec, byte_tokenizer(), blocks=1, sample=i, window=16)) for i in range(9)
    ]
    assert {each[0] for each in one} == set(range(count))


@pytest.mark.parametrize("sample", [None, 0, 1])
def test_a_sample_of_more_than_there_is_is_refused_as_without(sample, tmp_path):
    spec = windows_text(tmp_path, 3)
    with pytest.raises(
        ValueError, match=r"windows must be at most 3: .* has 56 tokens, 3 whole windows of 16"
    ):
        sampled_blocks(spec, byte_tokenizer(), blocks=4, sample=sample, window=16)
    with pytest.raises(ValueError, match=r"must be a text of at least one window of 2048 tokens; got 56"):
        sampled_blocks(spec, byte_tokenizer(), blocks=1, sample=sample)


def test_samples_of_a_long_text_are_of_its_beginning(tmp_path, monkeypatch):
    """So that not all of it is tokenised; a sample that needs more takes as much as it needs."""
    spec = windows_text(tmp_path, 50)
    monkeypatch.setattr(corpus, "SPAN", 16 * 10)
    used = [sampled_blocks(spec, byte_tokenizer(), blocks=2, sample=i, window=16) for i in range(5)]
    assert sorted(letters_of(torch.cat(used))) == [*range(10)]
    many = letters_of(sampled_blocks(spec, byte_tokenizer(), blocks=20, sample=1, window=16))
    assert sorted(many) == [*range(20)]
