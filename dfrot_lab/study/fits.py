"""What it takes to find a rotation: seconds, and the memory of a process that does nothing else. So that the
second can be told, each is found in a process of its own, into the store, where evaluations find it."""

import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.model import door
from dfrot_lab.recipe import keys, registry
from dfrot_lab.recipe.base import strict_json
from dfrot_lab.recipe.specs import Recipe
from dfrot_lab.rotate import transforms

log = logging.getLogger(__name__)
KIND = "fit"
CHILD = "from dfrot_lab.study import fits; fits.child()"
INTERRUPTED = 130


class Fit(NamedTuple):
    """Seconds in which a rotation was found once what it `needs` to look at was there; `peak` bytes of the
    process that found it, model and captures in it (of the GPU's memory there); NaN if not measured."""

    seconds: float
    peak: float
    needs: str


def costs(recipes: Sequence[Recipe], store: Store) -> dict[str, Fit]:
    """By name of the rotation what the fit of each recipe costs; those not stored are found now."""
    found = dict[str, Fit]()
    for number, recipe in enumerate(recipes, 1):
        log.info("[%d/%d] the fit of %s", number, len(recipes), recipe.rotation.name)
        found[recipe.rotation.name] = cost(recipe, store)
    return found


def cost(recipe: Recipe, store: Store) -> Fit:
    """What the fit of one recipe's rotation costs. Of one that lay in the store before anybody measured it
    the peak is NaN; what a method refuses is refused here, with its words."""
    recipe = door.resolved(recipe).canonical()
    needs = getattr(registry.load(registry.METHODS, recipe.rotation.method), "NEEDS", "not said")
    if needs == "nothing":
        return Fit(0.0, math.nan, needs)
    inputs = {name: keys.identity(getattr(recipe, name), door.prints) for name in ("model", "rotation")}
    if (made := store.open(KIND, inputs)) is not None:
        note = made.manifest["note"]
        return Fit(note["seconds"], note["peak"], needs)
    seconds, took, peak = _in_a_process(recipe, store)
    if not took >= seconds:  # it was read: a part of a search at most was done now
        return Fit(seconds, math.nan, needs)
    if took < math.inf:
        store.get_or_make(KIND, inputs, partial(_note, seconds=seconds, peak=peak))
        return Fit(seconds, peak, needs)
    return Fit(transforms.fit(recipe, transforms.Context(recipe, store)).seconds, math.nan, needs)


def _note(writer: Writer, **numbers: float) -> None:
    writer.note.update(numbers)


def _in_a_process(recipe: Recipe, store: Store) -> tuple[float, float, float]:
    """Of a fit in a process of its own the seconds as the method has them, as the clock has them (infinite:
    it failed), the peak."""
    said = strict_json({"recipe": recipe.plain(), "store": str(store.root)})
    done = subprocess.run([sys.executable, "-c", CHILD], input=said, stdout=subprocess.PIPE, text=True)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        return math.nan, math.inf, math.nan
    seconds, took, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, took, peak


def child() -> None:
    """Fit what stdin says, print seconds, seconds by the clock, peak: what the other process is to run."""
    said: dict[str, Any] = json.load(sys.stdin)
    recipe, store = Recipe.of(said["recipe"]), Store(Path(said["store"]))
    try:
        began = time.perf_counter()
        seconds = transforms.fit(recipe, transforms.Context(recipe, store)).seconds
        sys.stdout.write(strict_json([seconds, time.perf_counter() - began, _peak(recipe)], indent=None))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _peak(recipe: Recipe) -> float:
    """The most bytes this process has held so far: on the GPU, if the model is there."""
    if recipe.model.device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated())
    import psutil

    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most << 10)
