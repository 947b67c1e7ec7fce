"""The explorers' shell: token text is shown and never run, the status is one sentence, a job pauses, resumes,
is cancelled and runs alone, controls and state are one, plots stay on the page and outlive a reload.
"""

import html
import io
import threading
import time
import types

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
import traitlets
from explorers import MALICIOUS, Page
from plotly.basedatatypes import Undefined

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.explore.page import Plot, Stage, beside
from dfrot_lab.explore.shell import Cancelled, Explorer, Job, Status, control
from dfrot_lab.explore.take import Take, said, together
from dfrot_lab.recipe.specs import CaptureSpec, CorpusSpec, QuantSpec
from dfrot_lab.show import theme

# ---- token text


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
    assert theme.visible(text) == shown


@pytest.mark.parametrize("text", MALICIOUS)
def test_safe_text_is_text_and_nothing_else(text):
    found = theme.safe(text)
    assert not set("<>\"'") & set(found)
    page = Page(found)
    assert not page.tags and page.text == theme.visible(text) == html.unescape(found)


@pytest.mark.parametrize("text", MALICIOUS)
def test_a_span_holds_the_text_its_colour_and_its_tooltip(text):
    page = Page(theme.span(text, "#CC2936", title=text))
    assert (
        page.tags == {"bdi"}
        and page.attributes == {"class", "title", "style"}
        and page.text == theme.visible(text)
    )
    assert "background:#CC2936" in theme.span(text, "#CC2936") and "background" not in theme.span(text)


# ---- status


def test_the_status_is_one_line_of_fixed_height_in_three_states():
    status = Status()
    assert "dfrot-status" in status.line._dom_classes
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
    status = Status()
    with status.doing("working", then="done"):
        assert status.state == "busy" and "working" in status.text
        raise error("no such thing 'a'")
    assert status.state == "error" and status.text.endswith(" no such thing 'a'")


def test_doing_ends_with_its_own_words_and_lets_a_defect_through():
    status = Status()
    with status.doing("working", then="done"):
        pass
    assert (status.state, status.text) == ("ready", "done")
    with pytest.raises(ZeroDivisionError), status.doing("working"):
        raise ZeroDivisionError


# ---- jobs


class Counting:
    """Work that counts its steps, and what it was told at its end."""

    def __init__(self, steps: int = 1_000_000) -> None:
        self.steps, self.count, self.ended = steps, 0, []
        self.job = Job(self.ended.append)
        self.first = threading.Event()

    def __call__(self, job: Job) -> None:
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
    assert len(work.ended) == 1 and isinstance(work.ended[0], Cancelled)
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

    def fail(_job: Job) -> None:
        raise ValueError("gamma must be > 0; got -3")

    job = Job(ended.append)
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


def held(seen: list[object]) -> tuple[Job, threading.Event]:
    """A job at work on 0, which goes on once the event is set; what is done, and how it ends, is put into
    `seen`.
    """
    started, go = threading.Event(), threading.Event()
    job = Job(lambda error: seen.append(error and str(error)))

    def zero(job: Job) -> None:
        started.set()
        assert go.wait(10)
        job.step()
        seen.append(0)

    job.instead(zero)
    assert started.wait(10)
    return job, go


def test_only_the_newest_work_is_done_after_the_one_that_runs_has_left():
    seen: list[object] = []
    job, go = held(seen)
    for wish in range(1, 6):
        job.instead(lambda _job, wish=wish: seen.append(wish))
    go.set()
    job.wait(10)
    assert seen == [5, None] and not job.running
    job.instead(lambda _job: seen.append(6))
    job.wait(10)
    assert seen == [5, None, 6, None]


def test_newer_work_follows_one_that_fails():
    seen: list[object] = []
    job, go = held(seen)

    def fail(_job: Job) -> None:
        raise ValueError("no such thing")

    job.instead(fail)
    go.set()
    job.wait(10)
    assert seen == ["no such thing"]
    job.instead(lambda _job: seen.append(1))
    job.wait(10)
    assert seen == ["no such thing", 1, None]


def test_cancel_leaves_what_runs_and_what_waits():
    seen: list[object] = []
    job, go = held(seen)
    job.instead(lambda _job: seen.append(1))
    job.cancel()
    go.set()
    job.wait(10)
    assert seen == ["cancelled"] and not job.running
    job.instead(lambda _job: seen.append(2))
    job.wait(10)
    assert seen == ["cancelled", 2, None]


# ---- figures


def test_a_figure_has_a_fixed_height_and_no_background():
    plot = Plot(height=300, dragmode="select", xaxis_title="x")
    assert (plot.layout.height, plot.layout.dragmode, plot.layout.hovermode) == (300, "select", "closest")
    assert plot.layout.xaxis.title.text == "x" and plot.layout.xaxis.automargin
    assert plot.layout.paper_bgcolor == plot.layout.plot_bgcolor == "rgba(0,0,0,0)"


def sent(plot) -> list[dict]:
    """The batches that go to the page from now on."""
    batches: list[dict] = []
    plot.observe(lambda change: change["new"] and batches.append(change["new"]), "_py2js_update")
    return batches


def test_a_batch_says_what_it_does_not_change():
    plot = Plot([go.Heatmap(y=np.array([0.0, 3.0])), go.Scatter()])
    batches = sent(plot)
    with plot.batch_update():
        plot.data[0].z = [[1.0], [2.0]]
        plot.data[1].update(x=[5], y=[6])
    (batch,) = batches
    style = batch["style_data"]
    assert not any(value is Undefined for values in style.values() for value in values)
    assert style["y"][0].tolist() == [0.0, 3.0] and list(style["y"][1]) == [6]
    assert style["x"][0] is None and style["z"][1] is None
    assert plot.data[0].y.tolist() == [0.0, 3.0]


def test_figures_follow_the_page_and_keep_their_height():
    plot = Plot(height=300)
    assert plot._config["responsive"] is True and plot._config["displaylogo"] is False
    assert "sendChartToCloud" in plot._config["modeBarButtonsToRemove"]  # what is looked at stays here
    assert plot.layout.height == 300 and plot.layout.width is None


def test_a_stage_shows_one_plot_and_keeps_the_others_on_the_page():
    first, second = Plot(), Plot()
    stage = Stage(first)
    (box,) = stage.children
    stage.turn(second)
    assert stage.shown is second
    assert stage.children[0] is box and [part.layout.display for part in stage.children] == ["none", None]
    stage.turn(first)
    assert len(stage.children) == 2 and [part.layout.display for part in stage.children] == [None, "none"]


def test_a_page_that_is_opened_anew_gets_the_data_of_now():
    plot = Plot([go.Scatter(y=[1, 2])], xaxis_title="before")
    plot.data[0].y = [3, 4]
    plot.add_scatter(y=[5])
    plot.layout.xaxis.title.text = "now"
    state = plot.get_state()
    assert [trace["y"] for trace in state["_widget_data"]] == [[3, 4], [5]]
    assert state["_widget_layout"]["xaxis"]["title"]["text"] == "now"


# ---- the shell


class Standing(traitlets.HasTraits):
    size = control(traitlets.Int(3), widgets.IntSlider, "size", 220, min=2, max=8)
    kind = control(traitlets.Unicode("a"), widgets.Dropdown, "kind", options=["a", "b"])
    place = control(traitlets.Unicode(), widgets.Dropdown, "place", options=[])
    brushed = traitlets.Tuple()


class Counter(Explorer):
    ONE = "count"

    def __init__(self) -> None:
        super().__init__(Standing(), size={"max": 5}, place={"value": None})
        self.seen: list[int] = []
        self.button("count", "Count", lambda: self.work("counting", self._count))
        self.button("cancel", "Cancel", self.job.cancel)
        self.on("size kind", lambda: self.seen.append(self.state.size))
        self.go = threading.Event()

    def _count(self, job: Job) -> None:
        assert self.go.wait(10)
        job.step()

    def _at_end(self, error: BaseException | None) -> str:
        return "counted" if error is None else "stopped"


def test_controls_are_made_of_the_states_traits_and_the_two_are_one():
    counter = Counter()
    assert set(counter.controls) == {"size", "kind", "place", "count", "cancel"}
    slider = counter.controls["size"]
    assert (slider.description, slider.min, slider.max, slider.value) == ("size", 2, 5, 3)
    assert slider.layout.width == "220px" and slider.style.description_width == "initial"
    slider.value = 4
    counter.state.kind = "b"
    assert counter.state.size == 4 and counter.controls["kind"].value == "b" and counter.seen == [4, 4]
    counter.state.size = 99  # the slider goes to its end, and the state with it
    assert slider.value == counter.state.size == 5
    assert "dfrot-counter" in counter._dom_classes


def test_a_control_whose_options_are_replaced_moves_the_state_only_to_a_value():
    counter = Counter()
    counter.controls["place"].options = ["here", "there"]
    counter.controls["place"].index = 0
    assert counter.state.place == "here"
    counter.controls["place"].options = []
    assert counter.controls["place"].value is None and counter.state.place == "here"


@pytest.mark.parametrize("cancelled", [False, True])
def test_work_takes_the_buttons_and_gives_them_back_with_a_sentence(cancelled):
    counter = Counter()
    counter.controls["count"].click()
    assert counter.status.state == "busy" and "counting" in counter.status.text
    assert counter.controls["count"].disabled and not counter.controls["cancel"].disabled
    counter.work("counting again", counter._count)
    assert counter.status.state == "error" and "one count at a time: cancel" in counter.status.text
    if cancelled:
        counter.controls["cancel"].click()
    counter.go.set()
    counter.job.wait(10)
    assert (counter.status.state, counter.status.text) == ("ready", "stopped" if cancelled else "counted")
    assert not counter.controls["count"].disabled and counter.controls["cancel"].disabled


def test_an_error_of_the_work_is_the_last_word():
    counter = Counter()

    def fail(_job: Job) -> None:
        raise ValueError("size must be < 3; got 4")

    counter.work("failing", fail)
    counter.job.wait(10)
    assert (counter.status.state, counter.status.text[2:]) == ("error", "size must be < 3; got 4")


def test_a_row_is_of_controls_and_columns_and_plots_have_their_shares():
    counter = Counter()
    row = counter.row("size", ["kind", "place"])
    assert row.children[0] is counter.controls["size"]
    assert row.children[1].children == (counter.controls["kind"], counter.controls["place"])
    placed = beside(Plot(), Plot(), shares=(60, 40), height=300)
    assert [(box.layout.width, box.layout.height) for box in placed.children] == [
        ("60%", "300px"),
        ("40%", "300px"),
    ]


# ---- what is taken away


class Named(Standing):
    token = traitlets.Int(0)


class Reader(Explorer):
    def __init__(self, spec: QuantSpec | None = None, store: Store | None = None, *, texts=()) -> None:
        super().__init__(Named(), place={"value": None})
        self.texts, self.children = list(texts), [widgets.Label("plots")]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"text": [" a", "\n", '"=1"'], "value": [1.5, float("nan"), 3.0]})


def test_the_line_makes_the_view_again():
    reader = Reader()
    assert reader.take.line == reader.line() == "explore.reader()"
    reader.state.size, reader.state.brushed = 5, (1, 2)
    assert reader.take.line == reader.line() == "explore.reader().at(brushed=(1, 2), size=5)"
    again = eval(reader.line(), {"explore": types.SimpleNamespace(reader=Reader)})
    assert again.state.trait_values() == reader.state.trait_values() and again.line() == reader.line()


def test_the_line_says_what_the_explorer_was_made_of(tmp_path):
    spec, store = QuantSpec(bits=3, clip_ratio=0.9), Store(tmp_path)
    line = Reader(spec, store, texts={"a": torch.eye(2)}).line()
    assert (
        line
        == f"explore.reader(spec=QuantSpec(bits=3, clip_ratio=0.9), store=Store({str(tmp_path)!r}), texts=texts)"
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        Reader(size=3)


@pytest.mark.parametrize(
    "value",
    [
        3,
        -1.5,
        "a\n\u202e'b\"",
        ("a", 2),
        None,
        True,
        float("inf"),
        CaptureSpec(tokens=5, corpus=CorpusSpec(name="x")),
        Store(),
    ],
)
def test_what_is_said_is_python_of_one_line(value):
    text = said(value, "value")
    names = {"CaptureSpec": CaptureSpec, "CorpusSpec": CorpusSpec, "Store": Store}
    found = eval(text, names)
    assert (found.root == value.root if isinstance(value, Store) else found == value) and "\n" not in text
    assert said(CaptureSpec()) == "CaptureSpec()" and said([value], "value") == "value"


def test_a_view_that_cannot_be_is_refused_with_the_name():
    with pytest.raises(ValueError, match="'colour' must be one of brushed, kind, place, size, token"):
        Reader().at(colour="red")
    with pytest.raises(ValueError, match="kind cannot be 'c' here: "):
        Reader().at(kind="c")


def test_the_foot_is_last_whatever_the_children_are():
    reader = Reader()
    (plots, foot), more = reader.children, widgets.Label("more")
    assert foot is reader.take and isinstance(foot, Take)
    reader.children = [plots, foot, more]
    assert reader.children == (plots, more, foot)


@pytest.mark.parametrize("said_before", ["as it was", ""])
def test_the_table_goes_to_the_page_as_csv(monkeypatch, said_before):
    reader, given = Reader(), []
    reader.status.say(said_before)
    monkeypatch.setattr(reader.take, "send", given.append)
    reader.take._handle_custom_msg("csv", [])
    back = pd.read_csv(io.StringIO(given[0]), keep_default_na=False, na_values={"value": ""})
    pd.testing.assert_frame_equal(back, reader.table())
    assert (reader.status.state, reader.status.text) == ("ready", said_before)
    monkeypatch.setattr(reader, "table", lambda: {}["nothing is shown yet"])
    reader.take._handle_custom_msg("csv", [])
    assert reader.status.state == "error" and "nothing is shown yet" in reader.status.text and len(given) == 1


def test_a_token_is_picked_together_where_the_texts_are_the_same():
    long, short, other = Reader(texts="abcdef"), Reader(texts="abc"), Reader(texts="xyz")
    together(long, short, other)
    long.state.token = 2
    assert (short.state.token, other.state.token) == (2, 0)
    short.state.token = 1
    assert (long.state.token, other.state.token) == (1, 0)
    long.state.token = 5  # beyond the short one, which stays
    assert (short.state.token, other.state.token) == (1, 0)
    other.texts = list("abcd")
    long.state.token = 3
    assert (short.state.token, other.state.token) == (1, 3)
