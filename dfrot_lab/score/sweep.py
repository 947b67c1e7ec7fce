"""Rows side by side in the processes of a Dask cluster, on this machine or behind any of Dask's schedulers: a
row is a task, which a worker computes into the store and the client reads there. Rows of one rotation follow
each other, for the later ones use what the first one found; a worker that is killed loses what its row had
not kept yet, and another goes on with it."""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import checkpoint
from dfrot_lab.model.malloc import keep_freed_memory
from dfrot_lab.recipe.base import content_key, require
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.score import perplexity
from dfrot_lab.score.build import Built

if TYPE_CHECKING:
    from distributed import Client

BARS = {"TQDM_DISABLE": "1"}  # of several processes on one line nobody could read
PATIENCE = 30  # seconds in which a scheduler must answer
_own = threading.local()  # of a worker's thread: the model it built last
_client: "Client | None" = None


@contextmanager
def side_by_side(workers: int = 1, scheduler: str | None = None) -> Iterator[None]:
    """While the block runs, rows are computed in `workers` processes that share this machine's cores and
    memory, or by the workers of the `scheduler` at an address, which must see the same store; with one worker
    and no scheduler one after the other, here. ValueError: no process, no scheduler there."""
    require("workers", workers, workers >= 1, "at least 1")
    if workers == 1 and scheduler is None:
        yield
        return
    import distributed

    global _client
    logging.getLogger("distributed").setLevel(logging.ERROR)  # it says each process that comes and goes
    with ExitStack() as stack:
        if scheduler is None:
            where: Any = stack.enter_context(distributed.LocalCluster(**_local(workers)))
        else:
            where = _reached(scheduler)
        client = stack.enter_context(distributed.Client(where, timeout=PATIENCE))
        before, _client = _client, client
        try:
            yield
        finally:
            _client = before


def _reached(scheduler: str) -> str:
    """The address of a scheduler, once something answers there; ValueError. A Client that finds nothing keeps
    a thread, which the next one may wait for."""
    from distributed.comm import get_address_host_port

    try:
        socket.create_connection(get_address_host_port(scheduler, strict=True), PATIENCE).close()
    except (OSError, ValueError) as error:
        rule = "the address of a running Dask scheduler such as tcp://host:8786"
        raise ValueError(f"scheduler must be {rule}; got {scheduler!r} ({error})") from None
    return scheduler


def _local(workers: int) -> dict[str, Any]:
    """A cluster of this machine: a share of its cores and memory for each process, no server of pages."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = {**BARS, "OMP_NUM_THREADS": str(max(1, cores // workers))}
    if checkpoint.MEMORY not in os.environ and (room := checkpoint.memory("cpu")):
        own[checkpoint.MEMORY] = f"{room / workers / 1e9:.3f}"
    more = {"memory_limit": 0, "dashboard_address": ":0", "silence_logs": logging.ERROR}
    return {"n_workers": workers, "threads_per_worker": 1, "env": own, **more}


def is_on() -> bool:
    """Whether rows are computed `side_by_side` now."""
    return _client is not None


def evaluate_all(
    specs: Sequence[Recipe], store: Store, on_done: Callable[[int, bool], None] = lambda _place, _ran: None
) -> list[perplexity.EvalResult]:
    """`perplexity.evaluate_all` on the current cluster; `on_done` is told of each place in `specs` once its
    row is there, as they come, and whether it was computed now. What a row raises is raised. RuntimeError: a
    row whose workers all ended; ValueError: workers with another store."""
    import distributed

    assert _client is not None
    places, last = {}, dict[str, Any]()
    for place, spec in enumerate(specs):
        if perplexity.stored(spec, store):
            on_done(place, False)
            continue
        chain = content_key({"model": spec.model.plain(), "rotation": spec.rotation.plain()})
        last[chain] = _client.submit(_row, spec, store.root, last.get(chain), pure=False, priority=-place)
        places[last[chain]] = place
    try:
        for future in distributed.as_completed(places):
            future.result()
            on_done(places[future], True)
    except distributed.KilledWorker:
        row = specs[places[future]]
        why = f"each worker that computed {row.rotation.name} {row.bits} ended"
        raise RuntimeError(f"{why}: is there memory for it? Fewer workers have more each") from None
    finally:
        _client.cancel(list(places))
    return [_found(spec, store) for spec in specs]


def _found(spec: Recipe, store: Store) -> perplexity.EvalResult:
    if (result := perplexity.stored(spec, store)) is None:
        rule = f"workers must share the store {store.root}, which has no {spec.rotation.name} {spec.bits} now"
        raise ValueError(f"{rule}: set DFROT_LAB_CACHE to a folder that all machines see")
    return result


def _row(spec: Recipe, root: Path, _before: None) -> None:
    """One task, in a worker: a row's evaluation into the store."""
    keep_freed_memory()
    kept: dict[str, Built] = _own.__dict__.setdefault("kept", {})
    perplexity.evaluate(spec, Store(root), kept=kept)
