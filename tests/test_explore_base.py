"""The explorers' base: token text is shown and never run, the status is one sentence, a job pauses, resumes,
is cancelled and runs alone.
"""

import html
import threading
import time

import pytest
from explorers import MALICIOUS, Page

from dfrot_lab.explore import base

# ---- token text
# -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a b", "\u2423a\u2423b"),
        ("\n\t\r\u00a0", "\u21b5\u21e5\u240d\u237d"),
        ("\x00\x1b\u202e\ufeff", "<0x00><0x1B><0x202E><0xFEFF>"),
        ("\u05e9\u05dc\u05d5\u05dd \U0001f600", "\u05e9\u05dc\u05d5\u05dd\u2423\U0001f600"),
        ("<0x0A>", "<0x0A>"),
        ("", ""),
    ],
)
def test_white_space_and_controls_are_made_visible(text, shown):
    assert base.visible(text) == shown


@pytest.mark.parametrize("text", MALICIOUS)
def test_safe_text_is_text_and_nothing_else(text):
    found = base.safe(text)
    assert not set("<>\"'") & set(found)
    page = Page(found)
    assert not page.tags and page.text == base.visible(text) == html.unescape(found)


@pytest.mark.parametrize("text", MALICIOUS)
def test_a_span_holds_the_text_its_colour_and_its_tooltip(text):
    page = Page(base.span(text, "#CC2936", title=text))
    assert (
        page.tags == {"bdi"}
        and page.attributes == {"class", "title", "style"}
        and page.text == base.visible(text)
    )
    assert "background:#CC2936" in base.span(text, "#CC2936") and "background" not in base.span(text)


# ---- status
# -----------------------------------------------------------------------------------------------------------------------------


def test_the_status_is_one_line_of_fixed_height_in_three_states():
    status = base.Status()
    assert "dfrot-status" in status.widget._dom_classes
    height = status.line.layout.height
    for tell, state in ((status.say, "ready"), (status.busy, "busy"), (status.error, "error")):
        tell("what <b>happens</b>")
        assert status.state == state and "what <b>happens</b>" in status.text
        page = Page(status.line.value)
        assert (
            page.tags == {"span"}
            and status.text == page.text
            and f'class="dfrot-{state}"' in status.line.value
        )
    assert status.line.layout.height == height == "28px"


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, RuntimeError, OSError, ImportError])
def test_doing_shows_an_expected_error_as_its_sentence(error):
    status = base.Status()
    with status.doing("working", then="done"):
        assert status.state == "busy" and "working" in status.text
        raise error("no such thing 'a'")
    assert status.state == "error" and status.text.endswith(" no such thing 'a'")


def test_doing_ends_with_its_own_words_and_lets_a_defect_through():
    status = base.Status()
    with status.doing("working", then="done"):
        pass
    assert (status.state, status.text) == ("ready", "done")
    with pytest.raises(ZeroDivisionError), status.doing("working"):
        raise ZeroDivisionError


# ---- jobs
# -------------------------------------------------------------------------------------------------------------------------------


class Counting:
    """Work that counts its steps, and what it was told at its end."""

    def __init__(self, steps: int = 1_000_000) -> None:
        self.steps, self.count, self.ended = steps, 0, []
        self.job = base.Job(self.ended.append)
        self.first = threading.Event()

    def __call__(self, job: base.Job) -> None:
        for _ in range(self.steps):
            self.count += 1
            self.first.set()
            time.sleep(0.001)
            job.step()

    def start(self) -> None:
        self.job.start(self)
        assert self.first.wait(10)


def test_a_job_runs_off_the_thread_and_says_when_it_is_done():
    work = Counting(3)
    work.start()
    work.job.wait(10)
    assert (work.count, work.ended, work.job.running, work.job.paused) == (3, [None], False, False)


def test_a_paused_job_does_nothing_until_it_is_resumed():
    work = Counting()
    work.start()
    work.job.pause()
    assert work.job.paused and work.job.running
    time.sleep(0.05)  # the step that was under way
    count = work.count
    time.sleep(0.05)
    assert work.count == count and not work.ended
    work.job.resume()
    assert not work.job.paused
    until = time.monotonic() + 10
    while work.count == count and time.monotonic() < until:
        time.sleep(0.001)
    assert work.count > count
    work.job.cancel()
    work.job.wait(10)
    assert not work.job.running


@pytest.mark.parametrize("paused", [False, True])
def test_a_cancelled_job_stops_at_its_next_step_paused_or_not(paused):
    work = Counting()
    work.start()
    if paused:
        work.job.pause()
        time.sleep(0.02)
    work.job.cancel()
    work.job.wait(10)
    assert not work.job.running and not work.job.paused
    assert len(work.ended) == 1 and isinstance(work.ended[0], base.Cancelled)
    count = work.count
    time.sleep(0.02)
    assert work.count == count < work.steps


def test_a_job_can_be_started_again_after_it_was_cancelled():
    work = Counting()
    work.start()
    work.job.cancel()
    work.job.wait(10)
    work.steps, before = 2, work.count
    work.job.start(work)
    work.job.wait(10)
    assert work.count == before + 2 and work.ended[1] is None


def test_an_expected_error_is_handed_on():
    ended = []

    def fail(_job: base.Job) -> None:
        raise ValueError("gamma must be > 0; got -3")

    job = base.Job(ended.append)
    job.start(fail)
    job.wait(10)
    assert [str(error) for error in ended] == ["gamma must be > 0; got -3"] and isinstance(
        ended[0], ValueError
    )


def test_one_job_at_a_time():
    work = Counting()
    work.start()
    with pytest.raises(RuntimeError, match="one job at a time"):
        work.job.start(work)
    work.job.cancel()
    work.job.wait(10)
    assert len(work.ended) == 1


# ---- figures
# ----------------------------------------------------------------------------------------------------------------------------


def test_a_figure_has_a_fixed_height_and_no_background():
    plot = base.figure(300, dragmode="select")
    assert (plot.layout.height, plot.layout.dragmode, plot.layout.hovermode) == (300, "select", "closest")
    assert plot.layout.paper_bgcolor == plot.layout.plot_bgcolor == "rgba(0,0,0,0)"
