"""A real JupyterLab and a real Chromium for the browser tests: a server of its own, a page that watches for
errors, and a reader's few movements.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, Response

from dfrot_lab.disk.atomic import cache_dir

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ARTEFACTS = Path(__file__).parent / "artefacts"
"""Where the screenshots go; not committed, made again by every run."""
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
START_S, CELLS_S, STEP_S = 120.0, 400.0, 120.0
"""Seconds allowed for the server, for all cells of a notebook, for one movement: several times what a quiet
machine takes.
"""
SOFTWARE_GL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
"""WebGL without a graphics card, for plotly's Scattergl and 3-D plots."""
PLAIN_PAGES = ["--disable-gpu-compositing"]
"""The page itself is put together without the imagined card: 1 ms of work a frame in place of 22."""
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(each => each.textContent)"
"""In the page: the numbers before the code cells."""
HARMLESS: dict[str, str] = {
    "GPU stall due to ReadPixels": "how fast a WebGL plot comes into a page that has no graphics card"
}
"""Part of a console message or a failed address: why it is no fault of ours."""


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


@contextmanager
def chromium() -> Iterator[Browser]:
    """The machine's own Chromium, headless. Playwright is imported here, for its event loop must not outlive
    the block.
    """
    from playwright.sync_api import sync_playwright

    sandbox = ["--no-sandbox"] if is_root() else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*sandbox, *SOFTWARE_GL, *PLAIN_PAGES]
        )
        yield browser
        browser.close()


def lend_cache(own: Path, lent: Sequence[str]) -> None:
    """A cache of its own that shares with the user's these folders, and what is only read here: models,
    texts, captures, refined rotations.
    """
    (own / "store").mkdir(parents=True)
    for name in ("downloads", "corpora", "store/model", "store/capture", "store/refine", *lent):
        there = cache_dir() / name
        there.mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(there, target_is_directory=True)


def surroundings(root: Path, profile: str) -> dict[str, str]:
    """The environment of a server that changes nothing of the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    names = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
        "IPYTHONDIR",
    )
    own = {name: str(root / name.lower()) for name in names}
    own["DFROT_LAB_CACHE"] = str(root / "cache")
    return {
        **kept,
        **own,
        "HF_HUB_OFFLINE": "1",
        "DFROT_LAB_PROFILE": profile,
        "TOKENIZERS_PARALLELISM": "false",
    }


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server and its kernels; twice, for the first signal may ask."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        server.send_signal(sent)
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            continue
        return


@contextmanager
def jupyter_lab(root: Path, profile: str = "quick", lent: Sequence[str] = ()) -> Iterator[str]:
    """A notebook's address, its name to be filled in, in a JupyterLab on a copy of our notebooks below
    `root`, `lent` more of the user's cache; RuntimeError if it does not start.
    """
    folder, log = root / "notebooks", root / "server.log"
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    environment = surroundings(root, profile)
    lend_cache(root / "cache", lent)
    quiet = (
        Path(environment["JUPYTERLAB_SETTINGS_DIR"])
        / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    )
    quiet.parent.mkdir(parents=True)
    quiet.write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )  # else it asks for news in a box over the page
    own = [
        "--no-browser",
        "--ip=127.0.0.1",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.extension_manager=readonly",
    ]
    command = [sys.executable, "-m", "jupyterlab", *own, *(["--allow-root"] if is_root() else [])]
    with log.open("wb") as out:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    about = Path(environment["JUPYTER_RUNTIME_DIR"]) / f"jpserver-{server.pid}.json"
    try:
        until = time.monotonic() + START_S
        while not (about.exists() and about.read_text().endswith("}")):  # written once the port is open
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        found = json.loads(about.read_text())
        yield f"{found['url']}lab/tree/{{notebook}}?token={found['token']}&reset"
    finally:
        stop(server)


@dataclass
class Watch:
    """What went wrong on a page: errors of the console, exceptions, requests that failed or were refused. And
    `sent`, the widgets' messages to the kernel."""

    faults: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)

    def look_at(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self._add(f"exception: {error}"))
        page.on("requestfailed", self._failed)
        page.on("response", self._answer)
        page.on("websocket", lambda socket: socket.on("framesent", self._sent))

    def _sent(self, frame: str | bytes) -> None:
        text = frame if isinstance(frame, str) else bytes(frame).decode("latin1")
        if '"comm_msg"' in text:
            self.sent.append(text)

    def _add(self, fault: str) -> None:
        if not any(part in fault for part in HARMLESS):
            self.faults.append(fault)

    def _console(self, message: ConsoleMessage) -> None:
        lost = (
            "WebGL" in message.text and message.type == "warning"
        )  # plotly's points vanish without an error
        if message.type == "error" or lost:
            self._add(f"console: {message.text} ({message.location.get('url')})")

    def _failed(self, request: Request) -> None:
        self._add(f"request failed: {request.url} {request.failure}")

    def _answer(self, response: Response) -> None:
        if response.status >= 400:
            self._add(f"request refused: {response.status} {response.url}")


@dataclass
class Notebook:
    """A notebook open in JupyterLab, and what a reader does with it."""

    page: Page
    watch: Watch
    clicks: int = 0

    def click(self, target: Locator) -> None:
        """One click of the reader's, counted."""
        target.click(timeout=STEP_S * 1000)
        self.clicks += 1

    def menu(self, *names: str) -> None:
        """Through the menu bar: the reader clicks on the first and the last, and rests on what is between."""
        self.click(self.page.locator(".lm-MenuBar-item", has_text=names[0]).first)
        for name in names[1:-1]:
            self.page.locator(".lm-Menu-item", has_text=name).first.hover()
        self.click(self.page.locator(".lm-Menu-itemLabel").get_by_text(names[-1], exact=True))

    def start_all(self) -> None:
        """Run > Run All Cells."""
        self.page.get_by_text("| Idle").wait_for(
            timeout=START_S * 1000
        )  # JupyterLab drops the order while the kernel starts
        self.menu("Run", "Run All Cells")
        self.page.wait_for_function(
            f"() => {PROMPTS}.some(each => each.includes('*'))", timeout=STEP_S * 1000
        )

    def wait_all(self) -> None:
        """Until every code cell has its number; AssertionError with the text of the first that raised."""
        self.page.wait_for_function(
            f"() => {PROMPTS}.every(each => /\\d/.test(each))", timeout=CELLS_S * 1000
        )
        raised = self.page.locator('[data-mime-type="application/vnd.jupyter.error"]')
        assert raised.count() == 0, raised.first.text_content()

    def explorer(self, name: str) -> "Explorer":
        """The explorer whose top widget has the class dfrot-`name`, scrolled to and ready."""
        found = Explorer(self.page, self.page.locator(f".dfrot-{name}").first, name)
        for _ in range(100):  # JupyterLab has only the cells about those on view in the page
            if found.root.count():
                break
            self.page.locator(".jp-WindowedPanel-outer").first.evaluate(
                "all => all.scrollTo(0, all.scrollTop + all.clientHeight < all.scrollHeight - 5 ? all.scrollTop + 400 : 0)"
            )
            self.page.wait_for_timeout(200)
        found.root.scroll_into_view_if_needed(timeout=STEP_S * 1000)
        found.ready()
        return found


def opened(chromium: Browser, server: str, name: str) -> Notebook:
    """A notebook's page in a browser of its own, nothing run yet."""
    page = chromium.new_context(viewport={"width": 1280, "height": 900}).new_page()
    watch = Watch()
    watch.look_at(page)
    page.goto(server.format(notebook=f"{name}.ipynb"))
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=START_S * 1000)
    return Notebook(page, watch)


@dataclass
class Explorer:
    """One explorer on the page."""

    page: Page
    root: Locator
    name: str

    def status(self, text: str, seconds: float = STEP_S) -> str:
        """The status line once it holds `text`."""
        line = self.root.locator(".dfrot-status span", has_text=text).first
        line.wait_for(timeout=seconds * 1000)
        return line.text_content() or ""

    def ready(self, seconds: float = CELLS_S) -> str:
        """What the status line says once it is no longer busy; AssertionError if that is an error."""
        done = self.root.locator(".dfrot-status .dfrot-ready, .dfrot-status .dfrot-error").first
        done.wait_for(state="attached", timeout=seconds * 1000)
        assert self.root.locator(".dfrot-error").count() == 0, done.text_content()
        return done.text_content() or ""

    def plot(self, number: int = 0) -> Locator:
        """Its nth plot, once it is drawn."""
        found = self.root.locator(".js-plotly-plot").nth(number)
        found.locator(".main-svg").first.wait_for(timeout=STEP_S * 1000)
        return found

    def beside(self) -> list[int]:
        """By how many pixels each plot on view is wider or narrower than its place; 9999 before it is drawn."""
        found: list[int] = self.root.locator(".js-plotly-plot:visible").evaluate_all(
            """plots => plots.map(plot => plot._fullLayout
                ? Math.round(Math.abs(plot._fullLayout.width - plot.parentElement.clientWidth)) : 9999)"""
        )
        return found

    def point(self, index: int, plot: int = 0) -> tuple[float, float]:
        """Where on the page a point of a plot's first trace is, in pixels."""
        self.plot(plot).scroll_into_view_if_needed()
        x, y = self.plot(plot).evaluate(
            """(plot, index) => {
                const trace = plot._fullData[0], layout = plot._fullLayout, box = plot.getBoundingClientRect();
                const place = (axis, value) => axis._offset + axis.d2p(value);
                return [box.x + place(layout.xaxis, trace.x[index]), box.y + place(layout.yaxis, trace.y[index])];
            }""",
            index,
        )
        return x, y

    def hover(self, x: float, y: float) -> str:
        """Rest the mouse on a place of the page: what the label says."""
        self.page.mouse.move(x - 4, y)
        self.page.mouse.move(x, y)
        label = self.root.locator(".hoverlayer .hovertext").first
        label.wait_for(timeout=STEP_S * 1000)
        return label.text_content() or ""

    def slider(self, description: str) -> Locator:
        """The handle of a slider; the layer's is the page's own."""
        if description == "layer":
            return self.root.locator(".dfrot-bar input").first
        label = self.page.locator(".widget-label").get_by_text(description, exact=True)
        return (
            self.root.locator(".widget-slider, .widget-hslider")
            .filter(has=label)
            .locator(".noUi-handle")
            .first
        )

    def button(self, description: str) -> Locator:
        """A button that can be pressed."""
        return self.root.locator("button:enabled").get_by_text(description, exact=True).first

    def saved(self, label: str) -> bytes:
        """What a button of the foot gives to save."""
        with self.page.expect_download(timeout=STEP_S * 1000) as given:
            self.button(label).click()
        assert given.value.suggested_filename.startswith(f"{self.name}.")
        return Path(given.value.path()).read_bytes()

    def shoot(self, step: str) -> None:
        """A picture of it for people to look at."""
        ARTEFACTS.mkdir(exist_ok=True)
        (ARTEFACTS / f"{self.name}-{step}.png").write_bytes(self.picture())

    def picture(self, wait_ms: int = 300) -> bytes:
        """It as PNG, after a while for plotly's own animation."""
        box, usual = self.root.bounding_box(), self.page.viewport_size
        assert box and usual
        if (
            box["height"] > usual["height"] - 200
        ):  # a notebook scrolls inside the page: what is out of sight would be grey
            self.page.set_viewport_size({"width": usual["width"], "height": int(box["height"]) + 300})
        self.root.scroll_into_view_if_needed()
        self.page.wait_for_timeout(wait_ms)
        picture = self.root.screenshot()
        self.page.set_viewport_size(usual)
        return picture
