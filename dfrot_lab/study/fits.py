"""What it takes to find a rotation: seconds, and the memory of a process that does nothing else. So that the
second can be told, each is found in a process of its own, into the store, where evaluations find it."""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dfrot_lab.disk.artefacts import Artefact, Store, Writer
from dfrot_lab.disk.atomic import Inputs
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
    if (known := stored(recipe, store)) is not None:
        return known
    recipe = door.resolved(recipe).canonical()
    done = _in_a_process(recipe, store)
    if done is None:
        found = transforms.fit(recipe, transforms.Context(recipe, store))
        return Fit(found.seconds, math.nan, needs_of(recipe))
    numbers = [done.seconds, None if math.isnan(done.peak) else done.peak]
    store.get_or_make(KIND, _inputs(recipe), lambda writer: writer.save_json("numbers", numbers))
    return done


def stored(recipe: Recipe, store: Store) -> Fit | None:
    """What the fit costs where it needs nothing or was measured; else None."""
    recipe = door.resolved(recipe).canonical()
    needs = needs_of(recipe)
    if needs == "nothing":
        return Fit(0.0, math.nan, needs)
    made = store.open(KIND, _inputs(recipe))
    if made is None:
        return None
    seconds, peak = made.json("numbers")
    return Fit(seconds, math.nan if peak is None else peak, needs)


def _inputs(recipe: Recipe) -> dict[str, Any]:
    return {name: keys.identity(getattr(recipe, name), door.prints) for name in ("model", "rotation")}


def needs_of(recipe: Recipe) -> str:
    """What a recipe's method looks at."""
    return str(getattr(registry.load(registry.METHODS, recipe.rotation.method), "NEEDS", "not said"))


def _in_a_process(recipe: Recipe, store: Store) -> Fit | None:
    """A fit in a process of its own; None where that failed."""
    said = strict_json({"recipe": recipe.plain(), "store": str(store.root)})
    done = subprocess.run([sys.executable, "-c", CHILD], input=said, stdout=subprocess.PIPE, text=True)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    return None if done.returncode else Fit(**json.loads(done.stdout.splitlines()[-1]))


class _Watched(Store):
    """A store that notes the kinds of all that is made and not found in it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.made = set[str]()

    def get_or_make(self, kind: str, inputs: Inputs, make: Callable[[Writer], None]) -> Artefact:
        def noted(writer: Writer) -> None:
            self.made.add(kind)
            make(writer)

        return super().get_or_make(kind, inputs, noted)


def child() -> None:
    """Fit what stdin says and print the Fit as JSON: what the other process is to run."""
    said: dict[str, Any] = json.load(sys.stdin)
    recipe, store = Recipe.of(said["recipe"]), _Watched(Path(said["store"]))
    method = registry.load(registry.METHODS, recipe.rotation.method)
    try:
        seconds = transforms.fit(recipe, transforms.Context(recipe, store)).seconds
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    was_found = not hasattr(method, "KIND") or method.KIND in store.made  # else it was read
    found = Fit(seconds, _peak(recipe) if was_found else math.nan, needs_of(recipe))
    sys.stdout.write(json.dumps(found._asdict()))


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
