"""Makes docs/gallery/: pictures and short films of the explorers, in a real JupyterLab and Chromium.

    python tools/gallery.py

It needs what `make test` installs, and the store of a finished `make run`, whose rows the third picture shows; some
minutes. What the pictures show is said in docs/gallery.md.
"""

import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import browser  # noqa: E402 it lies with the tests

OUT, COLOURS = ROOT / "docs" / "gallery", 64
FRAME_MS, HOLD_MS = 130, 1200  # of a film: a frame, its ends


def save(name: str, picture: bytes) -> None:
    """Write a PNG of few colours, a third of the bytes."""
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(OUT / f"{name}.png", optimize=True)


def film(name: str, frames: list[bytes]) -> None:
    """Write frames as a GIF that goes on for ever, its first and last frame longer on view."""
    images = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in frames]
    width, height = min(image.width for image in images), min(image.height for image in images)
    cut = [image.crop((0, 0, width, height)).resize((width * 3 // 4, height * 3 // 4)) for image in images]
    few = [image.quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for image in cut]
    held = [HOLD_MS, *[FRAME_MS] * (len(few) - 2), HOLD_MS]
    few[0].save(
        OUT / f"{name}.gif", save_all=True, append_images=few[1:], duration=held, loop=0, optimize=True
    )


def plots(explorer: browser.Explorer, picture: bytes) -> bytes:
    """The part of an explorer's picture that its film and the plot beside it fill."""
    places = (explorer.root, explorer.root.locator("canvas.dfrot-film"), explorer.plot(1))
    root, *own = (place.bounding_box() for place in places)
    assert root and all(own)
    top = min(box["y"] for box in own) - root["y"]
    cut = Image.open(io.BytesIO(picture)).crop((0, top, root["width"], top + own[0]["height"]))
    cut.save(out := io.BytesIO(), format="PNG")
    return out.getvalue()


def moved(explorer: browser.Explorer, slider: str, keys: list[str], plot: int, now: str) -> Iterator[bytes]:
    """A picture after each key on a slider, once what `now` says of a plot is another."""
    for key in keys:
        before = explorer.plot(plot).evaluate(now)
        explorer.slider(slider).focus()
        explorer.page.keyboard.press(key)
        explorer.page.wait_for_function(
            f"([plot, before]) => JSON.stringify(({now})(plot)) !== JSON.stringify(before)",
            arg=[explorer.plot(plot).element_handle(), before],
            timeout=browser.STEP_S * 1000,
        )
        yield explorer.picture(150)


def pictures(book: browser.Notebook) -> None:
    """All of the gallery's, from 09-explorer with all its cells run."""
    massive = book.explorer("massive")
    save("massive", massive.picture())
    errors = book.explorer("errors")
    save("errors", errors.picture())
    dial = book.explorer("dial")
    start = [dial.picture()]
    turned = "plot => plot._fullData[2].x[0]"
    film("dial", start + list(moved(dial, "dial (%)", ["PageUp"] * 10, 1, turned)))
    save("worth", book.explorer("worth").picture())
    massive.slider("layer").focus()
    book.page.keyboard.press("Home")
    massive.status("layer 0,")
    layer = "plot => plot._fullData[0].x[0]"
    films = [massive.picture(), *moved(massive, "layer", ["ArrowRight"] * 29, 1, layer)]
    film("layers", [plots(massive, picture) for picture in films[1::2]])


def written(book: browser.Notebook) -> None:
    """Texts side by side: the prompt as it stands, written by every rotation that is picked."""
    generate = book.explorer("generate")
    generate.button("Write").click()
    generate.status("Done", 600)
    save("generate", generate.picture())


def lesson(book: browser.Notebook) -> None:
    """Those of 10-teach: a spike turned by hand, and a step that breaks the invariance."""
    save("playground", book.explorer("playground").picture())
    invariance = book.explorer("invariance")
    invariance.button("All steps, correctly").click()
    verdict = invariance.root.locator(".dfrot-verdict")
    verdict.filter(has_text="Unchanged:").wait_for(timeout=browser.STEP_S * 1000)
    invariance.root.get_by_label("Centre the embedding").click()
    verdict.filter(has_text="Broken:").wait_for(timeout=browser.STEP_S * 1000)
    invariance.ready()
    save("invariance", invariance.picture())


def run(chromium: Browser, server: str, name: str) -> browser.Notebook:
    """A notebook with all its cells run."""
    book = browser.opened(chromium, server, name)
    book.start_all()
    book.wait_all()
    return book


def main() -> None:
    """Write all pictures, or say what went wrong on the page."""
    OUT.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        browser.chromium() as chromium,
        browser.jupyter_lab(Path(folder), "full", ["store/evaluation"]) as server,
    ):
        book = run(chromium, server, "09-explorer")
        pictures(book)
        written(book)
        taught = run(chromium, server, "10-teach")
        lesson(taught)
        faults = book.watch.faults + taught.watch.faults  # before the server stops, which a page would miss
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
