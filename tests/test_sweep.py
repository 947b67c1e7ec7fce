"""Rows side by side in processes of a real Dask cluster: the same numbers, a killed worker, wrong places."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import save_tiny

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, Recipe, RotationSpec, recipe_of
from dfrot_lab.score import perplexity, sweep
from dfrot_lab.study import main
from dfrot_lab.study.progress import Progress

WINDOW = 64


def rows_of(model: ModelSpec, text: Path, *, windows: int = 2, weights: str = "rtn") -> list[Recipe]:
    """Two rotations at two settings of bits: two chains of two rows."""
    of = {"model": model, "corpus": CorpusSpec(name=str(text)), "windows": windows, "window": WINDOW}
    pairs = [(kind, bits) for bits in ("16-4-16", "4-4-16") for kind in ("RH", "RO")]
    return [recipe_of(bits, rotation=RotationSpec(kind=kind), weights=weights, **of) for kind, bits in pairs]


def losses(results: list[perplexity.EvalResult]) -> torch.Tensor:
    return torch.tensor([list(each.losses) for each in results])


def test_a_scheduler_is_used_and_one_that_is_not_there_is_refused(
    tiny_spec, text_file, tmp_path, monkeypatch
):
    import distributed

    asked, store = rows_of(tiny_spec, text_file)[:1], Store(tmp_path / "store")
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0")
    with cluster, sweep.side_by_side(scheduler=cluster.scheduler_address):
        assert sweep.is_on() and len(sweep.evaluate_all(asked, store)) == 1
    assert not sweep.is_on()
    monkeypatch.setattr(sweep, "PATIENCE", 1)
    rule = "scheduler must be the address of a running Dask scheduler"
    for wrong in ("tcp://127.0.0.1:9", "nowhere", "tcp://"):
        with pytest.raises(ValueError, match=rule), sweep.side_by_side(scheduler=wrong):
            raise AssertionError("no such scheduler")
    with pytest.raises(ValueError, match="workers must be at least 1; got 0"), sweep.side_by_side(0):
        raise AssertionError("no process")


def test_one_worker_is_this_process(tmp_path):
    with sweep.side_by_side(1):
        assert not sweep.is_on()


@pytest.fixture(scope="module")
def two_workers():
    """On until the last test of this file: those before it have none."""
    with sweep.side_by_side(2):
        yield


def test_rows_side_by_side_are_those_of_one_after_the_other(two_workers, tiny_spec, text_file, tmp_path):
    asked, store = rows_of(tiny_spec, text_file), Store(tmp_path / "shared")
    kept = perplexity.evaluate(asked[1], store)
    told = []
    found = sweep.evaluate_all(asked, store, lambda place, ran: told.append((place, ran)))
    alone = perplexity.evaluate_all(asked, Store(tmp_path / "alone"))
    torch.testing.assert_close(losses(found), losses(alone), rtol=1e-6, atol=0)
    assert [each.spec for each in found] == [each.spec for each in alone], "in the order that was asked for"
    assert sorted(told) == [(0, True), (1, False), (2, True), (3, True)] and told[0] == (1, False)
    assert found[1].key == kept.key


def test_workers_have_a_share_of_the_cores_and_draw_no_bars(two_workers):
    import distributed

    def seen() -> tuple[int, int, str, str]:
        from dfrot_lab.model import checkpoint

        said = os.environ.get("TQDM_DISABLE", "")
        return os.getpid(), torch.get_num_threads(), said, os.environ[checkpoint.MEMORY]

    client = distributed.default_client()
    found = client.run(seen)
    cores = len(os.sched_getaffinity(0))
    assert len({pid for pid, *_ in found.values()} - {os.getpid()}) == 2
    assert {threads for _, threads, *_ in found.values()} == {max(1, cores // 2)}
    assert {said for *_, said, _ in found.values()} == {"1"}
    assert all(float(room) > 0 for *_, room in found.values())


def test_a_table_is_the_same_and_tells_its_progress(two_workers, tiny_spec, text_file, tmp_path, caplog):
    caplog.set_level("INFO", logger="dfrot_lab")
    asked = [[main.Row(spec) for spec in rows_of(tiny_spec, text_file)]]
    progress = Progress([5.0])
    progress.begin("capturing")
    table, found = main._evaluated(asked, Store(tmp_path / "shared"), progress)
    alone = perplexity.evaluate_all(list(found), Store(tmp_path / "alone"))
    torch.testing.assert_close(losses(list(found.values())), losses(alone), rtol=1e-6, atol=0)
    assert len(table[table["metric"] == "perplexity"]) == 4
    said = [record.message for record in caplog.records if " is done; " in record.message]
    assert [line.split("]")[0] for line in said] == ["[2/ 5", "[3/ 5", "[4/ 5", "[5/ 5"] or said[0][
        :5
    ] == "[ 2/5"


def test_what_a_row_raises_is_raised_and_the_rest_is_not_left_running(two_workers, tiny_spec, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short a text")
    with pytest.raises(ValueError, match=r"short\.txt"):
        sweep.evaluate_all(rows_of(tiny_spec, short), Store(tmp_path / "store"))


def test_a_killed_worker_loses_only_what_its_row_had_not_kept(tmp_path, text_file):
    """One of two is killed while both have a row: that row and all others come out as ever."""
    import distributed

    store, asked = Store(tmp_path / "shared"), rows_of(save_tiny(tmp_path / "tiny"), text_file, windows=12)
    killed: list[int] = []

    def kill_one() -> None:
        client = distributed.default_client()
        pids = set(client.run(os.getpid).values()) - {os.getpid()}
        while not list(store.root.glob("evaluation/*.partial/manifest.json")):
            time.sleep(0.01)
        killed.append(pids.pop())
        os.kill(killed[0], signal.SIGKILL)

    with sweep.side_by_side(2):
        killer = threading.Thread(target=kill_one)
        killer.start()
        found = sweep.evaluate_all(asked, store)
        killer.join()
    assert killed, "no worker was killed"
    alone = perplexity.evaluate_all(asked, Store(tmp_path / "alone"))
    torch.testing.assert_close(losses(found), losses(alone), rtol=1e-6, atol=0)
    assert not list(store.root.glob("evaluation/*.partial"))


def test_workers_with_another_store_are_told_of(two_workers, tiny_spec, text_file, tmp_path, monkeypatch):
    """A machine behind a scheduler that does not see the client's folder keeps its rows for itself."""

    def elsewhere(_spec: Recipe, _root: Path, _before: None) -> None:
        """What a worker does that keeps its rows somewhere else."""

    monkeypatch.setattr(sweep, "_row", elsewhere)
    with pytest.raises(ValueError, match=r"workers must share the store .*DFROT_LAB_CACHE"):
        sweep.evaluate_all(rows_of(tiny_spec, text_file)[:1], Store(tmp_path / "store"))
