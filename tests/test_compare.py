"""Models side by side: each number is the one that its own function gives, a second look costs nothing, a killed
comparison goes on at its site, and what a model does not have is left empty.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import LAYERS, TEXT
from test_cli import invoke
from test_evaluate import save_lively
from test_experiments import drawn

from dfrot_lab.disk import row_files
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.maths.quantizers import fake_quantize
from dfrot_lab.maths.statistics import Estimate, estimate
from dfrot_lab.model import hooks
from dfrot_lab.model.public import public
from dfrot_lab.observe import errors, massive
from dfrot_lab.observe.capture import capture
from dfrot_lab.recipe.specs import MASSIVE_RULES, ModelSpec
from dfrot_lab.score import build, perplexity
from dfrot_lab.study import compare
from dfrot_lab.study.setting import Setting


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Setting, Store]:
    """A Llama with massive newlines and a Qwen2 without, a text, and a store for all tests of this file."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text.txt").write_text(TEXT)
    llama = save_lively(folder / "llama")
    other = save_lively(folder / "qwen", "qwen2", seed=1, plant=False)
    sizes = {"windows": 3, "window": 64, "steps": 5, "builds": 3}
    setting = Setting(model=llama, corpus=str(folder / "text.txt"), **sizes)
    return [llama.source, other.source], setting, Store(folder / "store")


@pytest.fixture(scope="module")
def table(pair: tuple[list[str], Setting, Store]) -> pd.DataFrame:
    return compare.compare(*pair)


def shown_as(model: str) -> str:
    """The name a table gives a model's folder."""
    return public(ModelSpec(source=model)).source


def of(table: pd.DataFrame, model: str, part: str) -> pd.Series:
    """Values of one part by what they are."""
    return table[(table["model"] == shown_as(model)) & (table["part"] == part)].set_index("what")["value"]


def test_massive_tokens_are_counted_by_each_rule(pair, table):
    names, setting, store = pair
    for name in names:
        recorded = capture(setting.with_(model=setting.model.with_(source=name)).capture, store)
        token = int(of(table, name, compare.TOKEN)["its place"])
        found = of(table, name, compare.ROWS)
        for rule in MASSIVE_RULES:
            mask = massive.find(recorded, rule)
            assert found[rule] == int(mask.sum())
            assert found[f"{rule}, of that token"] == int(mask[:, token].sum())
    assert (of(table, names[0], compare.TOKEN)["times the median token's"] > 8) and found["ratio_8"] == 0


def test_errors_are_means_over_sites_of_the_evaluation_s_quantizer(pair, table):
    names, setting, store = pair
    recorded = capture(setting.capture, store)
    own = errors.token_errors(
        recorded, errors.default_rotations(recorded.channels), [setting.refine.quantizer], rule="ratio_8"
    )
    found = of(table, names[0], compare.ERROR)
    for (rotation, is_massive), part in own.groupby(["rotation", "massive"], observed=True):
        sites = [each["error"].mean() for _, each in part.groupby("site", observed=True)]
        assert found[f"{rotation}, {'massive' if is_massive else 'ordinary'} rows"] == pytest.approx(
            np.mean(sites)
        )
    assert found["RO, massive rows"] > 1.5 * found["RH, massive rows"], "what the spike is there for"
    assert not of(table, names[1], compare.ERROR).index.str.contains("massive").any()


def builds_of(setting: Setting, store: Store, name: str, kind: str, **kept: object) -> np.ndarray:
    """The builds' mean losses of RO or RH of a model."""
    each = [own.with_(model=own.model.with_(source=name)) for own in setting.each()]
    rows = [own.row("16-4-16", own.rotation(kind), weights="rtn").with_(**kept) for own in each]
    return np.array([perplexity.evaluate(row, store).losses.mean() for row in rows])


def test_perplexities_and_changes_are_those_of_evaluate(pair, table):
    names, setting, store = pair
    for name in names:
        ro, rh = (builds_of(setting, store, name, kind) for kind in ("RO", "RH"))
        assert of(table, name, compare.LEVEL)["RO"] == pytest.approx(np.exp(ro.mean()))
        change = 100 * np.expm1((ro - rh).mean())
        assert of(table, name, compare.CHANGE)["RO against RH"] == pytest.approx(change)
        further = of(table, name, compare.FURTHER)["RO against RH"]
        levels = of(table, name, compare.DIVERGENCE)
        assert further == pytest.approx(levels["RO"] - levels["RH"])
        gap = estimate(ro - rh)
        shares = of(table, name, compare.SHARE)
        told = abs(gap.mean) > gap.ci95[1] - gap.ci95[0]
        assert shares.empty != told, "of a gap that may be 0 there is no share"


def test_a_share_is_said_of_a_gap_that_is_one(pair, table, monkeypatch: pytest.MonkeyPatch):
    """Of the right losses: what kept tokens leave of the gap in nats, for each way to keep them out."""
    names, setting, store = pair
    monkeypatch.setattr(Estimate, "ci95", property(lambda found: (found.mean, found.mean)))
    found = compare.compare(names, setting, store)
    for name in names:
        shares = of(found, name, compare.SHARE)
        assert list(shares.index) == ["RO, kept out", "RO, kept out (most_massive 4)"]
        for share, kept in zip(shares, compare.KEPT, strict=True):
            four = [
                builds_of(setting, store, name, kind, **how).mean()
                for kind in ("RO", "RH")
                for how in ({}, kept)
            ]
            assert share == pytest.approx(1 - (four[1] - four[3]) / (four[0] - four[2]))


@torch.inference_mode()
@pytest.mark.parametrize("kind", compare.SITES)
def test_a_site_s_cost_is_that_of_rounding_it_alone(pair, table, kind):
    """By hooks put on by hand, beside no quantizer at all."""
    names, setting, store = pair
    rises = []
    for own in setting.each():
        spec = own.row("16-4-4", own.rotation("RH")).canonical()
        built = build.build(spec, store)
        grid = {"k": spec.keys, "v": spec.values}.get(kind, spec.activations)
        full = perplexity.evaluate(own.row("16-16-16", own.rotation("NR")), store)
        exact = spec.with_(activations=spec.activations.with_(bits=16))
        with build.quantized(built, exact, only="none"):
            sites = hooks.sites_of(built.loaded, kind)
            with hooks.at_sites(built.loaded, lambda _site, x, grid=grid: fake_quantize(x, grid), sites):
                ids = build.windows(spec, built.loaded)
                losses = [perplexity.window_loss(built.loaded, window) for window in ids]
        rises.append(np.mean(losses) - full.losses.mean())
    expected = 100 * np.expm1(np.mean(rises))
    assert expected != pytest.approx(0, abs=1e-3)
    assert of(table, names[0], compare.COST)[kind] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert len(sites) == LAYERS


def test_a_second_look_computes_nothing(pair, table, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("built a model"))
    pd.testing.assert_frame_equal(compare.compare(*pair), table)


def test_side_by_side_has_a_column_a_model_and_every_number_once(pair, table):
    names, *_ = pair
    shown = compare.side_by_side(table)
    assert list(shown.columns) == [*map(shown_as, names)] and shown.index.is_unique
    assert list(dict.fromkeys(shown.index.get_level_values(0))) == [
        part for part in compare.PARTS if part in set(table["part"])
    ]
    assert (shown != "").sum().sum() == len(table)
    assert shown.loc[(compare.ERROR, "RO, massive rows"), shown_as(names[1])] == ""
    assert shown.loc[(compare.ROWS, "ratio_8"), shown_as(names[1])] == "0"


def test_the_figure_has_a_column_a_model_and_the_same_lines_in_both(pair, table):
    names, *_ = pair
    figure = drawn("compare", table)
    assert len(figure.axes) == 2 * (table["part"].nunique() - 1)
    for left, right in zip(figure.axes[::2], figure.axes[1::2], strict=True):
        assert left.get_xlim() == right.get_xlim()
        assert left.get_title().splitlines()[-1] == right.get_title().splitlines()[-1]
    assert [ax.get_title().splitlines()[0] for ax in figure.axes[:2]] == [*map(shown_as, names)]


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["a"], r"models must be at least two different ones; got \['a'\]"),
        (["smollm2-135m", "smollm2-135m"], "at least two different ones"),
        (["smollm2-135m", "nowhere"], "ModelSpec.source must be .*got 'nowhere'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(pair, models, said):
    with pytest.raises(ValueError, match=said):
        compare.compare(models, *pair[1:])


def test_the_command_prints_rows_and_keeps_table_recipes_and_figure(pair, tmp_path, monkeypatch):
    _names, setting, store = pair
    monkeypatch.setenv("DFROT_LAB_CACHE", str(store.root.parent))
    Path(setting.corpus).with_name("long.txt").write_text(TEXT * 20)
    text = str(Path(setting.corpus).with_name("long.txt"))
    models = [save_lively(tmp_path / name, name, context=4096).source for name in ("llama", "qwen2")]
    said = ["--models", ",".join(models), "--corpus", text, "--windows", "1", "--builds", "1"]
    said += ["--out", str(tmp_path / "o")]
    shown = json.loads(invoke("compare", *said, "--json").stdout)
    assert {row["model"] for row in shown["rows"]} == {shown_as(model) for model in models}
    kept = row_files.load(next((tmp_path / "o").glob("compare-*.jsonl")))
    assert len(kept) == len(shown["rows"])
    about = json.loads((tmp_path / "o" / "compare.json").read_text())
    [beside] = (tmp_path / "o").glob("compare-*.setting.yaml")
    said_beside = yaml.safe_load(beside.read_text())["setting"]
    assert said_beside["rule"] == "ratio_8" and said_beside["builds"] == 1, "as in the main job"
    assert (
        about["models"] == [shown_as(model) for model in models]
        and (tmp_path / "o" / "compare.png").stat().st_size > 10_000
    )
    plain = invoke("compare", *said).stdout
    assert "mean E(xR)" in plain and "one site costs" in plain and "compare.png" in plain


def test_a_comparison_killed_among_its_sites_goes_on_there(pair, tmp_path):
    _names, setting, _store = pair
    code = f"""
import sys
from pathlib import Path
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.study import compare
from dfrot_lab.study.setting import Setting
setting = Setting.of({setting.plain()!r})
recipe = setting.row("16-4-4", setting.rotation("RH"))
compare.site_losses(recipe, Store(Path({str(tmp_path)!r})))
"""
    environment = {**os.environ, "DFROT_LAB_DEVICE": "cpu"}
    running = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.glob("site-losses/*.partial/o_proj_in.json"))):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    first = found[0].stat().st_mtime_ns
    recipe = setting.row("16-4-4", setting.rotation("RH"))
    losses = compare.site_losses(recipe, Store(tmp_path))
    assert set(losses.names) == {*compare.SITES}
    done = next(tmp_path.glob("site-losses/*/o_proj_in.json"))
    assert done.stat().st_mtime_ns == first, "what was finished is not computed again"
    again = compare.site_losses(recipe, pair[2])
    assert all(losses.json(kind) == again.json(kind) for kind in compare.SITES)
