"""The report: one file that loads nothing, shows what is stored and names what is not, runs no token, and is
written whole or not at all.
"""

import base64
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import browser
import pandas as pd
import pytest
import torch
from conftest import save_tiny
from markupsafe import Markup
from test_evaluate import save_lively
from typer.testing import CliRunner

from dfrot_lab.cli.app import app
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.disk.atomic import write_text
from dfrot_lab.maths import dial, tables
from dfrot_lab.maths.quantizers import levels, squared_error
from dfrot_lab.model.public import public
from dfrot_lab.recipe.specs import ModelSpec, Recipe
from dfrot_lab.score import perplexity
from dfrot_lab.show import gallery, live, report
from dfrot_lab.study import main
from dfrot_lab.study.setting import Setting

CHROMIUM = Path("/usr/bin/chromium")
EVIL = "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script>"
ADDRESSES = ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "formaction")


@pytest.fixture
def setting(tmp_path: Path, text_file: Path) -> Setting:
    model = save_lively(tmp_path / "lively")
    return Setting(
        model=model,
        corpus=str(text_file),
        windows=2,
        window=64,
        gptq_windows=2,
        builds=2,
        weights="rtn",
        steps=3,
    )


class Page(HTMLParser):
    """Every tag with its attributes, every style, every script and the text a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.inside = ""
        self.styles, self.scripts, self.read = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        {"style": self.styles, "script": self.scripts}.get(self.inside, self.read).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.read).split())


def loads_nothing(page: Page) -> None:
    addresses = [
        value for _, attributes in page.tags for name, value in attributes.items() if name in ADDRESSES
    ]
    assert addresses and all(value.startswith("data:image/svg+xml;base64,") for value in addresses)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "video", "audio"}
    assert not any(word in style for style in page.styles for word in ("@import", "url(", "http"))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    data, script = page.scripts
    assert script == report.script() and "://" not in script
    assert {*json.loads(data)} == {"tokens", "turning", "board"}, "JSON, which no browser runs"
    policy = next(
        attributes["content"] for tag, attributes in page.tags if tag == "meta" and "content" in attributes
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.endswith(f"; script-src 'sha256-{digest}'"), "its own script alone"
    assert policy.startswith("default-src 'none'; ")


def specs_of(setting: Setting) -> list[Recipe]:
    """The rows of a main job, of all its builds."""
    return main.recipes(main.rows_by_build(main.rows, setting))


def test_nothing_but_the_capture_is_computed_and_every_row_is_named(setting, store):
    findings = report.collect(setting, store)
    assert {path.name for path in store.root.iterdir()} == {"capture"}
    assert findings.missing == specs_of(setting.resolved()) and not findings.result.found
    page = Page(report.page(report.values(findings)))
    loads_nothing(page)
    assert report.command(public(setting)) in page.text
    missing = report.values(findings)["missing"]
    assert dict(missing.itertuples(index=False)) == {
        **{f"{name} {bits}": 2 for name in ("RO", "RH", "DFRot") for bits in ("16-4-16", "4-4-4")},
        **{f"{name}, kept out 16-4-16": 2 for name in ("RO", "RH")},
        **{"full precision 16-16-16": 2, "NR 16-4-16": 1, "NR 4-4-4": 1},
    }
    for row in missing["row"]:
        assert row in page.text
    assert "DFRot's rotation is not refined yet" in page.text


def test_a_report_of_all_rows(setting, store):
    found = main.run(setting, store)
    before = sorted(store.root.glob("*/*"))
    findings = report.collect(setting, store)
    assert sorted(store.root.glob("*/*")) == before and not findings.missing
    text = report.page(report.values(findings))
    page = Page(text)
    loads_nothing(page)
    assert len(text.encode()) < 1_000_000
    for row in found.table.to_dict("records"):
        if row["metric"] != tables.AGREEMENT:
            assert tables.cell(row) in page.text
    assert len(found.table) > 40 and "2 builds of 2 windows" in page.text
    assert gallery.resolution(found.table) in page.text
    [gap] = tables.records(
        found.table[(found.table["rotation"] == "RO") & (found.table["bits"] == "16-4-16")],
        tables.change("RH"),
    )
    assert f"changes the perplexity of a random Hadamard one (RH) by {tables.cell(gap)}." in page.text
    assert "not stored" not in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 4
    for title in (
        "The words used here",
        "Which tokens are massive",
        "What rounding does to each token",
        "Turn it yourself",
        "What a rotation is worth",
        "The paper's numbers",
        "Limits",
        "How DFRot was refined",
        "What was measured",
    ):
        assert title in page.text
    ours = ["row", "ours", "bits"]  # the first two stay in sight
    assert [*report.values(findings)["paper"].columns[:3]] == ours and '<table class="ours">' in text
    about = dict(report.about(findings).itertuples(index=False))
    for name in about.keys() - {"report made"}:  # the minute may have turned
        assert " ".join(about[name].split()) in page.text
    assert (
        about["model's content hash"]
        and about["calibration text, sha256"] != about["evaluation text, sha256"]
    )


def test_a_report_tells_no_place_on_this_machine(setting, store, tmp_path):
    text = report.page(report.values(report.collect(setting, store)))
    assert str(tmp_path) not in text and "lively" in text


def test_the_massive_tokens_are_the_tables_own(setting, store):
    findings = report.collect(setting, store)
    tokens, own = report.massive_tokens(findings.massive), findings.massive
    assert set(tokens["token"]) == set(own["token"]) and tokens["text"][0] == "\u21b5"
    assert tokens["largest |value|"][0] == f"{own['residual_max'].max():,.0f}"
    first = own[own["token"] == tokens["token"][0]]
    assert tokens["sites by nr_error_8.5"][0] == first["nr_error_8.5"].sum()


def test_a_malicious_token_and_name_are_inert(setting, store):
    findings = report.collect(setting, store)
    evil = replace(
        findings, massive=findings.massive.assign(text=EVIL), errors=findings.errors.assign(text=EVIL)
    )
    text = report.page(report.values(evil))
    loads_nothing(page := Page(text))
    assert EVIL not in text and "<img src=x" not in text and text.count("</script>") == 2
    assert {*json.loads(page.scripts[0])["tokens"]["texts"]} == {EVIL}, (
        "as it is, in what the script shows as text"
    )


def test_every_value_of_the_page_is_escaped(setting, store):
    """Each text that goes into the template, in tables too, is malicious; the script is as it is."""

    def spoilt(value):
        if isinstance(value, Markup):
            return value
        if isinstance(value, str):
            return EVIL
        if isinstance(value, pd.DataFrame):
            return value.map(spoilt).rename(columns=lambda name: EVIL)
        if isinstance(value, dict):
            return {name: spoilt(part) for name, part in value.items()}
        return [spoilt(part) for part in value] if isinstance(value, list | tuple) else value

    main.run(setting, store)
    values = report.values(report.collect(setting, store))
    page = Page(report.page({name: spoilt(value) for name, value in values.items()}))
    assert len(page.scripts) == 2 and page.text.count(EVIL) > 50
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert [attributes for tag, attributes in page.tags if tag == "img" and attributes["src"] == "x"] == []


def test_a_path_with_markup_is_escaped(store, tmp_path, text_file):
    spec = save_tiny(tmp_path / "<b>model&")
    findings = report.collect(
        Setting(model=spec, corpus=str(text_file), windows=1, window=64, builds=1), store
    )
    text = report.page(report.values(findings))
    assert "<b>model" not in text and "&lt;b&gt;model&amp;" in text


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed: Debian's package chromium")
def test_chromium_draws_the_report_and_runs_no_token(setting, store, tmp_path):
    perplexity.evaluate(setting.row("16-4-16", setting.rotation("RH")), store)
    findings = report.collect(setting, store)
    path = tmp_path / "report.html"
    write_text(
        path,
        report.page(
            report.values(
                replace(
                    findings,
                    errors=findings.errors.assign(text=EVIL),
                    massive=findings.massive.assign(text=EVIL),
                )
            )
        ),
    )
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'chromium'}",
        "--virtual-time-budget=20000",
    ]
    options += [
        "--enable-logging=stderr",
        "--v=0",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--dump-dom",
        f"file://{path}",
    ]
    shown = subprocess.run([str(CHROMIUM), *options], capture_output=True, text=True, timeout=180, check=True)
    page = Page(shown.stdout)
    assert "CONSOLE" not in shown.stderr, "an error, or something the page's own policy refused"
    drawn = [(tag, attributes.get("class")) for tag, attributes in page.tags]
    assert sum(drawn.count(("circle", kind)) for kind in ("ordinary", "massive")) == 64 + 1, (
        "tokens, the dial"
    )
    assert sum(tag == "bdi" for tag, _ in drawn) == 64
    assert "<title>DFRot Lab: lively@" in shown.stdout
    assert not [attributes for tag, attributes in page.tags if tag == "img" and "onerror" in attributes]


def test_the_command_writes_the_file_and_the_command_it_names_completes_it(tmp_path, text_file, monkeypatch):
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DFROT_LAB_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    model = save_tiny(tmp_path / "a model")
    options = ["--model", model.source, "--corpus", str(text_file), "--windows", "1", "--window", "64"]
    options += ["--builds", "2", "--seed", "5"]
    shown = json.loads(CliRunner().invoke(app, ["report", *options, "--json"]).stdout)
    assert (
        shown["out"] == "report.html"
        and shown["bytes"] == (tmp_path / "report.html").stat().st_size < 10_000_000
    )
    sizes = {"windows": 1, "window": 64, "builds": 2, "seed": 5}
    setting = Setting(model=ModelSpec(source=model.source), corpus=str(text_file), **sizes)
    specs = specs_of(setting)
    assert shown["rows not stored"] == [main.row_name(spec) for spec in specs] and len(specs) == 11 + 9
    assert shown["which this computes"] == report.command(setting) and "--model '" in report.command(setting)
    asked: list[Setting] = []

    def enough(setting: Setting, *_others: object) -> None:
        asked.append(setting)
        raise ValueError("enough")

    program, *arguments = shlex.split(report.command(setting))
    with monkeypatch.context() as patch:
        patch.setattr(main, "prepared", enough)
        CliRunner().invoke(app, arguments)
    assert program == "dfrot-lab" and [specs_of(each) for each in asked] == [specs_of(setting.resolved())]
    chosen = [spec for spec in specs if spec.bits == "16-4-16" and spec.rotation.name == "RH"]
    perplexity.evaluate_all(chosen, Store())
    again = json.loads(CliRunner().invoke(app, ["report", *options, "--json"]).stdout)
    assert len(chosen) == 4 and len(again["rows not stored"]) == len(specs) - 4


@pytest.mark.parametrize(
    ("dtype", "device", "said"),
    [
        ("auto", "auto", ""),
        ("float32", "cpu", ""),
        ("float64", "cpu", "--dtype float64"),
        ("float32", "cuda", "--dtype float32"),
    ],
)
def test_the_commands_say_a_dtype_that_is_not_the_default(dtype, device, said):
    setting = Setting(model=ModelSpec(dtype=dtype, device=device))
    assert said in report.command(setting) and ("--dtype" in report.command(setting)) == bool(said)


@pytest.mark.parametrize(
    ("out", "sentence"), [(".", "is a folder"), ("not/there/report.html", "Make the folder not/there first")]
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, out, sentence):
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", "--model", "no such model", "--out", out])
    assert result.exit_code == 1 and sentence in result.stderr and "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_writing_replaces_a_file_whole(tmp_path):
    path = tmp_path / "report.html"
    write_text(path, "first")
    write_text(path, "second")
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    """The kernel kills the process in the middle of the file, at the size it may not pass."""
    path = tmp_path / "report.html"
    write_text(path, "the old report")
    code = f"""
import resource, signal
from pathlib import Path
from dfrot_lab.disk.atomic import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
write_text(Path({str(path)!r}), "new" * 1_000_000)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr.decode()
    assert path.read_text() == "the old report"
    [left] = tmp_path.glob(".report.html.*.tmp")
    assert left.stat().st_size == 100_000, "it was killed half-way"
    os.utime(left, (0, 0))  # what is younger may be another process's, at work
    write_text(path, "the new report")
    assert path.read_text() == "the new report" and list(tmp_path.iterdir()) == [path]


def test_the_scatter_has_every_token_under_each_pair(setting, store):
    errors = report.collect(setting, store).errors
    shown = live.tokens(errors.assign(RO=[float("inf"), *errors["RO"][1:]]))
    assert shown["pairs"] == [("RO", "RH"), ("NR", "RO"), ("NR", "RH")], "DFRot is not refined here"
    assert shown["errors"]["RH"] == pytest.approx(errors["RH"].tolist(), rel=1e-3)
    assert shown["errors"]["RO"][0] is None and all(
        isinstance(each, float) for each in shown["errors"]["RO"][1:]
    )
    assert shown["massive"] == errors["massive"].tolist()
    assert [word.strip() for word in shown["texts"][:2]] == [
        gallery.visible(text).strip("\u2423") for text in errors["text"][:2]
    ]
    refined = errors.assign(DFRot=errors["RH"])
    assert live.tokens(refined)["pairs"][-1] == ("RH", "DFRot") and [*live.tokens(refined)["errors"]] == [
        *live.ROTATIONS
    ]


def test_the_dial_is_the_quantizers(setting, store, monkeypatch):
    """Its ends are no rotation and the whole one; each channel is in a bin; the grid is the turned token's."""
    result = report.collect(setting, store).result
    site, quantizer = result.capture.sites[0], setting.resolved().refine.quantizer
    shown, x = live.turning(result, site, 5), result.capture.rows(site)[5].double()
    assert [*shown["ways"]] == ["RH", "RO"] and shown["channels"] == len(x)
    for name, way in shown["ways"].items():
        R = result.matrices[name]
        assert way["token"][-1] == pytest.approx(float(squared_error(x[None] @ R, quantizer)), rel=1e-3)
        assert [len(way["frames"]), len(way["ordinary"])] == [live.STEPS + 1] * 2
        assert all(sum(frame["counts"]) == len(x) for frame in way["frames"])
        half = dial.turned(x[None], dial.way(R), [0.5])[0, 0]
        frame, grid = way["frames"][live.STEPS // 2], levels(half, quantizer)
        low, step, count = frame["levels"]
        assert [low, low + (count - 1) * step] == pytest.approx([float(grid[0]), float(grid[-1])], rel=2e-2)
        reach = frame["low"] + frame["width"] * len(frame["counts"])
        assert reach == pytest.approx(max(float(half.max()), float(grid[-1])), rel=2e-2)
    monkeypatch.setattr(live, "LARGEST", len(x) - 1)
    assert live.turning(result, site, 5) == {"ways": {}}


def test_a_histogram_reaches_over_values_and_levels():
    y, grid = torch.tensor([0.0, 1, 1, 5]), torch.tensor([-5.0, 0, 4])
    counts, edges = dial.histogram(y, grid, 10)
    assert (edges[0], edges[-1]) == (-5, 5) and counts.tolist() == [0, 0, 0, 0, 0, 1, 2, 0, 0, 1]
    counts, edges = dial.histogram(-y, -grid, 10)
    assert (edges[0], edges[-1]) == (-5, 5) and counts.tolist() == [1, 0, 0, 0, 2, 1, 0, 0, 0, 0]


def test_it_begins_with_three_sentences_for_a_stranger_and_ends_with_what_was_measured(setting, store):
    text = report.page(report.values(report.collect(setting, store)))
    opening = re.findall(r'(?s)<p class="opening">(.*?)</p>', text)
    assert len(opening) == 3 and not re.search(
        r"\b(NR|RO|RH|DFRot|token|channel|perplexity)\b|\d-\d", " ".join(opening)
    )
    head, words = text.index("<figure>"), text.index("The words used here")
    assert text.index(opening[-1]) < head < words < text.index("Which tokens are massive")
    explained = re.findall(r"<dt>(.*?)</dt>", text)
    assert {"token", "channel", "massive token", "NR, RO, RH", "4-4-16", "perplexity"} <= {*explained}
    assert text.index("<summary>What was measured") > text.index("<h2>Limits") and "<details open" not in text


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed: Debian's package chromium")
def test_in_chromium_a_word_marks_its_dot_and_a_dot_its_word_on_a_phone_too(setting, store, tmp_path):

    write_text(tmp_path / "report.html", report.page(report.values(report.collect(setting, store))))
    with browser.chromium() as opened:
        page, watch = (
            opened.new_context(viewport={"width": 360, "height": 800}, offline=True).new_page(),
            browser.Watch(),
        )
        watch.look_at(page)
        page.goto((tmp_path / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        ring, said, word = (
            page.locator("#tokens .ring"),
            page.locator("#token"),
            page.locator("#text bdi").nth(7),
        )
        word.hover()
        assert (said.text_content() or "").startswith("token 7,") and "marked" in (
            word.get_attribute("class") or ""
        )
        place = [float(ring.get_attribute(name) or 0) for name in ("cx", "cy")]
        dots = page.locator("#tokens circle.ordinary, #tokens circle.massive")
        all_at = dots.evaluate_all("all => all.map(e => [+e.getAttribute('cx'), +e.getAttribute('cy')])")
        assert any(place == pytest.approx(at, abs=0.1) for at in all_at)
        page.locator("#text").press("ArrowRight")
        assert (said.text_content() or "").startswith("token 8,")
        page.mouse.move(0, 0)
        dot = page.locator("#tokens circle.massive").first
        dot.scroll_into_view_if_needed()
        dot.click(force=True)  # another dot, or its ring, may lie over it
        held = said.text_content() or ""
        assert (
            ", massive:" in held and page.locator("#text .marked").get_attribute("class") == "massive marked"
        )
        word.hover()
        assert said.text_content() == held, "a click holds it"
        word.click()
        assert (said.text_content() or "").startswith("token 7,")
        page.locator("#pair").select_option(label="RO against NR")
        assert "error under NR" in (page.locator("#tokens").text_content() or "")
        turned = page.locator("#turned")
        start = turned.text_content() or ""
        page.locator("#turn").press("End")
        assert start.startswith("0% of the way to RH") and (turned.text_content() or "").startswith("100%")
        page.locator("#to").select_option("RO")
        assert "way to RO" in (turned.text_content() or "") and page.locator("#values rect").count() > 3
        assert watch.faults == []
