"""The explorers in a real JupyterLab, in Chromium, as a reader uses them: what only a browser shows. Pictures
of every step go to tests/artefacts.

One server and one page a notebook serve all tests, in the quick profile; after each, the console must be
clean and no request may have failed.
"""

import io
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import browser
import pandas as pd
import PIL.Image
import pytest
from browser import CHROMIUM, Explorer, Notebook, Watch, opened
from playwright.sync_api import Browser

from dfrot_lab.show import ranks

pytestmark = [
    pytest.mark.browser,
    pytest.mark.model,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]

EVIL = '<img src=x onerror="window.hacked=1">'
BAR = "bar: at most 2 clicks and 30 s with a warm cache"
FRAMES_A_S = 20
SCRUB = """slider => new Promise(done => {
    const film = slider.closest('[data-frames]'), frames = Number(film.dataset.frames), start = performance.now();
    const move = () => {
        const spent = performance.now() - start;
        slider.value = Math.round((1 + Math.sin(spent / 300)) / 2 * slider.max);
        slider.dispatchEvent(new Event('input'));
        if (spent < 1000) requestAnimationFrame(move); else done((film.dataset.frames - frames) * 1000 / spent);
    };
    move();
})"""
"""In the page: a hand that moves the slider to and fro for a second, as often as a browser tells of it; frames drawn a
second.
"""
IDLE = """() => new Promise(done => {
    const start = performance.now();
    let frames = 0;
    const next = () => { frames++; if (performance.now() < start + 1000) requestAnimationFrame(next); else done(frames); };
    next();
})"""
"""In the page: frames a second that the browser has when nothing is drawn."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with browser.jupyter_lab(tmp_path_factory.mktemp("lab")) as address:
        yield address


@pytest.fixture(scope="module")
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """A line of pytest's own output, for what is measured and not judged."""
    captured = request.config.pluginmanager.getplugin("capturemanager")

    def write(line: str) -> None:
        with captured.global_and_fixture_disabled():
            sys.stderr.write(f"\n  {line}\n")  # one of several processes has no terminal reporter, but this

    return write


@pytest.fixture(scope="module")
def book(chromium: Browser, server: str, say: Callable[[str], None]) -> Iterator[Notebook]:
    """09-explorer, all cells run. Says how long a reader waits for the first massive token."""
    start = time.perf_counter()
    book = opened(chromium, server, "09-explorer")
    book.start_all()
    book.page.locator(".dfrot-massive b", has_text="Token 0").first.wait_for(timeout=browser.CELLS_S * 1000)
    assert book.clicks <= 2
    say(
        f"first massive token on screen after {time.perf_counter() - start:.1f} s and {book.clicks} clicks ({BAR})"
    )
    book.wait_all()
    say(f"all cells of 09-explorer run after {time.perf_counter() - start:.1f} s")
    yield book
    book.page.context.close()


@pytest.fixture(scope="module")
def lesson(chromium: Browser, server: str) -> Iterator[Notebook]:
    """10-teach, all cells run."""
    book = opened(chromium, server, "10-teach")
    book.start_all()
    book.wait_all()
    yield book
    book.page.context.close()


@pytest.fixture(autouse=True)
def no_faults(request: pytest.FixtureRequest) -> Iterator[None]:
    """No console error, no exception, no failed request on the pages this test used."""
    yield
    for name in {"book", "lesson"} & set(request.fixturenames):
        page = request.getfixturevalue(name)
        faults, page.watch.faults = page.watch.faults, []
        assert not faults, "\n".join(faults)


def wait_until(
    true: Callable[[], bool], seconds: float = browser.STEP_S, seen: Callable[[], object] = str
) -> None:
    """Ask again and again; AssertionError after so many seconds, with what is `seen` then."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"still not so after {seconds} s: {seen()}"
        time.sleep(0.1)


def count(explorer: Explorer, plot: int = 0) -> int:
    """Points in a plot's first trace."""
    return int(explorer.plot(plot).evaluate("plot => plot._fullData[0].x.length"))


# ---- massive


def test_the_first_massive_token_is_named(book):
    massive = book.explorer("massive")
    massive.shoot("1-open")
    assert re.search(
        r"Token 0 .* reaches [\d,]+ in channel \d+ at layer \d+: [\d,]+ \u00d7 the median",
        massive.root.text_content(),
    )


def settle(book: Notebook) -> None:
    """Until the plots have reported all they have drawn."""
    wait_until(lambda: (book.watch.sent.clear(), book.page.wait_for_timeout(1000), not book.watch.sent)[2])


def film_rate(massive: Explorer) -> float:
    """Frames a second while the film plays."""
    film = massive.root.locator("[data-frames]")
    massive.slider("layer").focus()
    massive.page.keyboard.press("Home")
    massive.status("layer 0,")
    play = massive.root.locator(".dfrot-bar button")
    play.click()
    frames, start = int(film.get_attribute("data-frames")), time.perf_counter()
    massive.page.wait_for_timeout(1000)
    found = (int(film.get_attribute("data-frames")) - frames) / (time.perf_counter() - start)
    play.click()
    return found


@pytest.mark.parametrize("view", ["words", "heat map"])
def test_layers_move_without_the_kernel_which_is_told_once_they_rest(book, say, view):
    massive = book.explorer("massive")
    massive.button(view).click()
    slider, sent = massive.slider("layer"), book.watch.sent
    settle(book)
    rate = slider.evaluate(SCRUB)
    assert not sent
    slider.dispatch_event("change")
    layer = slider.input_value()
    massive.status(f"layer {layer},")
    book.page.wait_for_timeout(500)
    assert sum('"state":{"value":' in message for message in sent) == 1
    played = film_rate(massive)
    massive.ready()
    idle = book.page.evaluate(IDLE)
    drawn = f"{view}: {rate:.0f} frames a second under the hand, {played:.0f} as a film"
    say(f"{drawn}, of {idle} of an idle page (bar: {FRAMES_A_S})")
    assert min(rate, played) > 0  # how fast is printed: beside other work on the processors it is anything
    massive.shoot(f"0-{view.replace(' ', '-')}")


def test_a_word_under_the_hand_lights_up_and_a_click_picks_it_everywhere(book):
    massive = book.explorer("massive")
    massive.button("heat map").click()
    massive.button("words").click()
    massive.root.locator("canvas.dfrot-film").wait_for(timeout=browser.STEP_S * 1000)
    word, canvas = massive.root.locator(".dfrot-token").nth(3), massive.root.locator("canvas.dfrot-film")
    before, about = canvas.evaluate("canvas => canvas.toDataURL()"), massive.root.locator(".dfrot-about")
    word.hover()
    wait_until(lambda: word.text_content() in about.text_content())
    wait_until(lambda: canvas.evaluate("canvas => canvas.toDataURL()") != before)
    massive.shoot("0-word")
    word.click()
    wait_until(lambda: "Token 3 " in massive.root.locator(".dfrot-sentence").text_content())
    wait_until(lambda: massive.root.locator("tr[style*=outline]").count() <= 1)
    massive.button("heat map").click()
    wait_until(lambda: massive.plot().evaluate("plot => plot.layout.shapes?.[0]?.x0") == 2.5)
    assert "token=3" in massive.root.locator(".dfrot-line").text_content()
    wait_until(lambda: "Token 3 " in book.explorer("errors").root.locator(".dfrot-fig4").text_content())
    book.explorer("massive").root.locator(".dfrot-token").first.click()
    wait_until(lambda: "Token 3 " not in massive.root.locator(".dfrot-sentence").text_content())
    wait_until(lambda: "Token 0 " in book.explorer("errors").root.locator(".dfrot-fig4").text_content())


@pytest.mark.parametrize("name", ["massive", "errors", "dial"])
def test_a_view_is_taken_away_as_a_line_a_table_and_a_picture(book, name):
    explorer = book.explorer(name)
    assert explorer.root.locator(".dfrot-line").text_content().startswith(f"explore.{name}(")
    explorer.button("copy this view").click()
    assert book.page.evaluate("getSelection().toString()").startswith(f"explore.{name}(")
    table = pd.read_csv(io.BytesIO(explorer.saved("data (CSV)")))
    explorer.ready()
    assert len(table) > 40 and table.select_dtypes("number").shape[1] >= 3
    picture = PIL.Image.open(io.BytesIO(explorer.saved("picture (PNG)"))).convert("RGB")
    assert min(picture.size) > 700 and len(picture.getcolors(2**24)) > 50  # drawn, and not one colour


def test_plots_fill_their_place_and_hold_all_channels(book):
    massive = book.explorer("massive")
    massive.button("heat map").click()
    massive.root.locator(".heatmaplayer image").first.wait_for(timeout=browser.STEP_S * 1000)
    wait_until(lambda: len(found := massive.beside()) > 1 and max(found) <= 2, seen=massive.beside)
    assert massive.plot().evaluate("plot => plot._fullData[0].y.at(-1)") > 500


def test_the_layer_slider_moves_by_keyboard(book, say):
    massive = book.explorer("massive")
    handle = massive.slider("layer")
    handle.focus()
    book.page.keyboard.press("Home")
    massive.status("layer 0,")
    layer = 0
    waited = []
    for moved in (1, 2, 3):
        start = time.perf_counter()
        book.page.keyboard.press("ArrowRight")
        massive.status(f"layer {layer + moved},")
        waited.append(time.perf_counter() - start)
    say(f"layer slider to new numbers on the page: {sorted(waited)[1]:.2f} s")
    wait_until(lambda: massive.plot(1).evaluate("plot => plot._fullData[0].x[0]") == layer + 3)
    massive.shoot("2-three-layers-on")
    assert f"at layer {layer + 3}:" in massive.root.text_content()


def test_the_three_d_view_draws(book):
    massive = book.explorer("massive")
    massive.button("3-D").click()
    massive.root.locator("canvas.dfrot-film").wait_for(timeout=browser.STEP_S * 1000)
    massive.shoot("3-in-space")
    massive.button("heat map").click()
    massive.root.locator(".heatmaplayer image").first.wait_for(timeout=browser.STEP_S * 1000)


def test_a_malicious_text_is_shown_and_does_not_run(book):
    massive = book.explorer("massive")
    massive.root.get_by_label("your text").fill(EVIL)
    massive.button("look").click()
    shown = massive.root.locator(".dfrot-text")
    wait_until(lambda: "onerror" in shown.text_content())
    massive.ready()
    wait_until(
        lambda: (
            massive.plot().evaluate("plot => plot._fullData[0].z[0].length")
            == shown.locator(".dfrot-token").count()
        )
    )
    assert shown.text_content().replace("\u2423", " ") == EVIL
    box = massive.plot().locator(".nsewdrag").first.bounding_box()
    label = massive.hover(box["x"] + 3, box["y"] + box["height"] / 2)
    massive.shoot("4-malicious")
    assert label.startswith("0 \u2068<\u2069")
    assert massive.root.locator("img").count() == 0
    assert book.page.evaluate("window.hacked") is None


# ---- errors


def test_hovering_a_point_names_its_token(book):
    errors = book.explorer("errors")
    errors.shoot("1-open")
    about = errors.root.locator(".dfrot-fig4")
    token = int(re.search(r"Token (\d+)", about.text_content())[1])
    text = errors.hover(*errors.point(token))
    errors.shoot("2-hover")
    assert about.locator(".dfrot-token").text_content() in text
    assert f"token {token}" in text and "E(RO)" in text


def test_brushing_lists_the_tokens(book):
    errors = book.explorer("errors")
    errors.plot().scroll_into_view_if_needed()
    box = errors.plot().locator(".nsewdrag").first.bounding_box()
    book.page.mouse.move(box["x"] + box["width"] * 0.35, box["y"] + 5)
    book.page.mouse.down()
    book.page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] * 0.75, steps=6)
    book.page.mouse.up()
    caption = errors.root.locator("text=/[0-9,]+ brushed tokens/")
    caption.wait_for(timeout=browser.STEP_S * 1000)
    listed = errors.root.locator("table").first.locator("tr")
    errors.shoot("3-brushed")
    brushed = int(re.search(r"([\d,]+) brushed", caption.text_content())[1].replace(",", ""))
    assert listed.count() - 1 == min(brushed, 200) > 0
    assert errors.plot().evaluate("plot => plot.data[0].selectedpoints.length") == brushed


def test_clicking_a_point_opens_its_values_also_in_a_brushed_region(book):
    errors = book.explorer("errors")
    about = errors.root.locator(".dfrot-fig4")
    token = errors.plot().evaluate(
        "plot => plot._fullData[0].x.reduce((best, x, i, all) => x > all[best] ? i : best, 0)"
    )  # nothing overlaps it
    before = errors.plot(1).evaluate("plot => plot._fullData[1].x[0]")
    book.page.mouse.click(*errors.point(token))
    wait_until(lambda: f"Token {token} " in about.text_content())
    wait_until(lambda: errors.plot(1).evaluate("plot => plot._fullData[1].x[0]") != before)
    errors.shoot("4-figure-4")


# ---- dial


def test_the_dial_turns_the_token(book):
    dial = book.explorer("dial")
    dial.shoot("1-open")
    error = "plot => plot._fullData[2].y[0]"
    start = dial.plot(1).evaluate(error)
    dial.slider("dial (%)").focus()
    book.page.keyboard.press("End")
    wait_until(lambda: dial.plot(1).evaluate("plot => plot._fullData[2].x[0]") == 100)
    dial.shoot("2-turned")
    assert dial.plot(1).evaluate(error) < 0.5 * start
    assert "under the whole of" in dial.root.text_content()
    dial.button("Offset").click()
    dial.status("to Offset", 90)
    dial.shoot("3-offset")


# ---- worth and generate


def test_an_evaluation_is_cancelled_and_the_kernel_stays_free(book):
    worth = book.explorer("worth")
    worth.shoot("1-open")
    windows = worth.root.get_by_label("Windows")
    windows.fill("97")  # more than are done before the hand is at Cancel
    windows.press("Enter")
    worth.status("0 of")
    worth.button("Compute missing rows").click()
    worth.status("reference 1 of 97", 90)
    worth.shoot("2-computing")
    massive = book.explorer("massive")
    massive.slider("layer").focus()
    book.page.keyboard.press("End")
    book.page.keyboard.press("Home")
    massive.status("layer 0,")
    book.page.locator(".dfrot-worth").scroll_into_view_if_needed()
    worth.button("Cancel").click()
    worth.status("Stopped", 60)
    worth.shoot("3-cancelled")
    assert worth.button("Compute missing rows").count() == 1


def test_texts_are_written_side_by_side(book):
    generate = book.explorer("generate")
    generate.root.get_by_label("Prompt").fill(EVIL)
    generate.root.get_by_label("Prompt").blur()
    generate.root.get_by_label("Rotations").select_option(["RH"])
    generate.slider("Tokens").focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight"):
        book.page.keyboard.press(key)
    generate.button("Write").click()
    generate.status("Done", 120)
    generate.shoot("1-written")
    assert count(generate) > 4
    assert generate.root.locator("img").count() == 0
    assert book.page.evaluate("window.hacked") is None


def test_the_dark_theme(book):
    book.menu("Settings", "Theme", "JupyterLab Dark")
    book.page.locator('body[data-jp-theme-light="false"]').wait_for(
        state="attached", timeout=browser.STEP_S * 1000
    )
    for name in ("massive", "errors", "dial", "worth", "generate"):
        explorer = book.explorer(name)
        explorer.shoot("dark")
        assert explorer.plot().evaluate("plot => plot._fullLayout.paper_bgcolor") == "rgba(0,0,0,0)"
    book.menu("Settings", "Theme", "JupyterLab Light")
    book.page.locator('body[data-jp-theme-light="true"]').wait_for(
        state="attached", timeout=browser.STEP_S * 1000
    )


def reloaded(book: Notebook, names: tuple[str, ...]) -> None:
    """Save, load the page again, and wait until each explorer has as many plots on view as before, as wide as
    their places."""
    before = {name: len(book.explorer(name).beside()) for name in names}
    book.menu("File", "Save Notebook")
    book.page.wait_for_timeout(3000)
    faults = book.watch.faults
    left = len(faults)
    book.page.reload()
    # what JupyterLab was asking for when the page is left is cut off
    faults[left:] = [fault for fault in faults[left:] if "net::ERR_ABORTED" not in fault]
    for name, plots in before.items():
        explorer = book.explorer(name)
        wait_until(
            lambda seen=explorer.beside, n=plots: len(found := seen()) == n and max(found) <= 2,
            60,
            explorer.beside,
        )
        assert plots and explorer.root.locator(".dfrot-line").text_content().startswith(f"explore.{name}(")
        explorer.shoot("5-reloaded")
    # the widget manager says so of an output drawn before the kernel has answered, and draws it again then
    faults[:] = [fault for fault in faults if "Error: widget model not found" not in fault]


def test_a_reloaded_page_shows_its_plots(book):
    massive, errors = book.explorer("massive"), book.explorer("errors")
    massive.button("heat map").click()
    points, words = count(massive), massive.root.locator(".dfrot-text").text_content()
    axis = "plot => plot._fullLayout.xaxis.title.text"
    title = errors.plot().evaluate(axis)
    reloaded(book, ("massive", "errors", "dial", "worth", "generate"))
    massive, errors = book.explorer("massive"), book.explorer("errors")
    wait_until(lambda: count(massive) == points, 60)
    assert massive.root.locator(".dfrot-text").text_content() == words
    massive.button("words").click()
    massive.root.locator("canvas.dfrot-film").wait_for(timeout=browser.STEP_S * 1000)
    assert count(errors) > 4 and errors.plot().evaluate(axis) == title


# ---- the lesson


def test_a_spike_is_turned_by_keyboard(lesson):
    playground = lesson.explorer("playground")
    playground.shoot("1-open")
    before = playground.plot().evaluate("plot => JSON.stringify(plot._fullData.map(trace => trace.y))")
    playground.slider("Angle 0-1").focus()
    for _ in range(5):
        lesson.page.keyboard.press("ArrowRight")
    wait_until(lambda: playground.slider("Angle 0-1").get_attribute("aria-valuenow") == "5.0")
    wait_until(
        lambda: (
            playground.plot().evaluate("plot => JSON.stringify(plot._fullData.map(trace => trace.y))")
            != before
        )
    )
    playground.shoot("2-turned")


def test_a_refinement_pauses_and_goes_on(lesson):
    refinement = lesson.explorer("refinement")
    refinement.shoot("1-open")
    before = count(refinement)
    refinement.button("Start").click()
    if before:  # the notebook ran one already
        wait_until(lambda: count(refinement) < before, 60)
    wait_until(lambda: count(refinement) >= 3, 90)
    refinement.button("Pause").click()
    refinement.status("paused after step")
    time.sleep(2)  # the step that ran when it was pressed ends
    paused = count(refinement)
    refinement.shoot("2-paused")
    time.sleep(3)
    assert count(refinement) == paused
    refinement.status("paused after step")
    refinement.button("Resume").click()
    wait_until(lambda: count(refinement) > paused, 60)
    refinement.button("Cancel").click()
    refinement.status("cancelled after step", 60)
    refinement.shoot("3-cancelled")


def test_a_wrong_step_is_red_and_says_why(lesson):
    invariance = lesson.explorer("invariance")
    invariance.shoot("1-open")
    verdict = invariance.root.locator(".dfrot-verdict")
    invariance.button("All steps, correctly").click()
    wait_until(lambda: "Unchanged:" in verdict.text_content(), 60)
    invariance.shoot("2-all-correct")
    invariance.root.get_by_label("Centre the embedding").click()
    wait_until(lambda: "Broken:" in verdict.text_content(), 60)
    invariance.ready()
    invariance.shoot("3-centred")
    assert "mean" in verdict.text_content()


def test_a_reloaded_lesson_shows_its_plots_and_goes_on(lesson):
    verdict = lesson.explorer("invariance").root.locator(".dfrot-verdict").text_content()
    angle = lesson.explorer("playground").slider("Angle 0-1").get_attribute("aria-valuenow")
    reloaded(lesson, ("playground", "refinement", "invariance"))
    invariance, playground = lesson.explorer("invariance"), lesson.explorer("playground")
    assert invariance.root.locator(".dfrot-verdict").text_content() == verdict
    assert playground.slider("Angle 0-1").get_attribute("aria-valuenow") == angle
    invariance.button("All steps, correctly").click()
    wait_until(lambda: "Unchanged:" in invariance.root.locator(".dfrot-verdict").text_content(), 60)


# ---- the report


def test_the_report_opens_from_disk_with_the_network_off(chromium, tmp_path):
    path = tmp_path / "report.html"
    subprocess.run(
        [sys.executable, "-m", "dfrot_lab", "report", "--out", str(path)], check=True, capture_output=True
    )
    assert path.stat().st_size < 10 * 2**20
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page, watch, asked = context.new_page(), Watch(), []
    watch.look_at(page)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.locator("#tokens circle").first.wait_for(timeout=browser.STEP_S * 1000)
    pictures = page.evaluate("[...document.images].map(each => each.naturalWidth)")
    Path(browser.ARTEFACTS).mkdir(exist_ok=True)
    page.screenshot(path=browser.ARTEFACTS / "report.png", full_page=True)
    context.close()
    assert not watch.faults
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert pictures and all(pictures)


def test_the_leaderboard_sorts_filters_and_shows_a_recipe(chromium):
    columns = ["rotation", "option", "group", "bits", "KL divergence", "verdict", "recipe"]
    rows = [
        ["RO", "none", "fused", "16-4-16", 0.8, "worse", "a"],
        ["RH", "none", "fused", "16-4-16", 0.5, None, "b"],
        ["Offset", "none", "fused", "16-4-16", 0.4, "better", "c"],
        ["<b>DuQuant</b>", "none", "online", "16-4-16", 0.3, "better", "d"],
    ]
    data = {"columns": columns, "rows": rows, "recipes": {"a": "rotation: RO", "c": "rotation: Offset"}}
    page, watch = chromium.new_page(), Watch()
    watch.look_at(page)
    page.set_content("<div id=board></div>")
    page.add_script_tag(content=ranks.SCRIPT.read_text(encoding="utf-8"))
    page.evaluate("data => ranks(document.getElementById('board'), data)", data)

    def names() -> list[str]:
        return page.locator("tbody tr td:first-child").all_text_contents()

    heads = page.locator("thead button").all_text_contents()
    assert heads == ["rotation", "KL divergence \u2191", "verdict"], "what does not differ is left out"
    assert names() == ["Offset", "RH", "RO"] and "3 of 3 rows, 16-4-16" in page.text_content("output")
    page.locator("thead button").nth(1).click()
    assert names() == ["RO", "RH", "Offset"]
    assert page.locator("thead th").nth(1).get_attribute("aria-sort") == "descending"
    page.locator("thead button").nth(2).click()
    assert names() == ["Offset", "RO", "RH"], "what is not there comes last"
    page.locator("thead button").nth(2).click()
    assert names() == ["RO", "Offset", "RH"]
    page.fill("input", "off better")
    assert names() == ["Offset"] and "1 of 3 rows" in page.text_content("output")
    page.locator("tbody button").click()
    assert page.text_content("pre") == "rotation: Offset" and page.locator("pre").is_visible()
    page.fill("input", "")
    page.select_option("select", "online")
    assert names() == ["<b>DuQuant</b>"], "text, not markup"
    assert not page.locator("pre").is_visible(), "the recipe of a row that is out of sight"
    page.close()
    assert not watch.faults
