"""Zero-shot accuracy through lm-eval's own tasks: the paper's six, from local files where they are, else from
the hub.

Local files are `<task>.jsonl` in `zero_shot/` of the folder DFROT_LAB_DATA names, in the field names
lm-eval's task files read. Each task's result is kept as it is finished; accuracies come with lm-eval's
standard error, task version and number of items."""

import json
import logging
import os
import tempfile
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.model import door, loading
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.specs import ModelSpec, Recipe
from dfrot_lab.score import build

log = logging.getLogger(__name__)

TASKS = {
    "piqa": ("piqa/piqa.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test"),
}
"""lm-eval's own task file, and the split it is scored on."""
METRICS = ("acc", "acc_norm")
AVERAGE = "average of six"
BATCH = 16
KIND = "zero-shot"


def local_file(task: str) -> Path | None:
    """The task's items on this machine, or None."""
    folder = os.environ.get("DFROT_LAB_DATA")
    path = Path(folder) / "zero_shot" / f"{task}.jsonl" if folder else None
    return path if path and path.is_file() else None


def table(
    name: str, spec: Recipe | None, model: ModelSpec, limit: int | None, store: Store | None = None
) -> pd.DataFrame:
    """Accuracy on each task, and the average, of one row called `name`: `spec`'s model, or with None the
    plain transformers model as loaded.

    Columns: row, task, metric (acc, acc_norm), value, stderr, items, version (of the task), source, then what
    a results row says of the model. Only the first `limit` items of a task are scored; None takes all. Where
    some tasks have local files, those are scored and the others left out, with a line that says so; where
    none has, all come from the hub, and without it this is a ConnectionError."""
    store, model = store or Store(), door.resolved(model)
    # how much text a perplexity takes is nothing to tasks
    recipe = door.resolved(spec.with_(windows=1)).canonical() if spec else None
    local = {task: path for task in TASKS if (path := local_file(task))}
    if local and len(local) < len(TASKS):
        absent = ", ".join(task for task in TASKS if task not in local)
        log.info("tasks without a file in $DFROT_LAB_DATA/zero_shot are left out: %s", absent)
    tasks: dict[str, Path | None] = {**local} or dict.fromkeys(TASKS)
    digests = {task: door.prints(str(path)) if path else "hub" for task, path in tasks.items()}
    inputs = keys.tasks(recipe or model, door.prints, digests, limit, metadata.version("lm-eval"))

    def make(writer: Writer) -> None:
        with ExitStack() as stack:
            if recipe:
                built = build.build(recipe, store)
                stack.enter_context(build.quantized(built, recipe))
                loaded = built.loaded
            else:
                loaded = loading.load_model(model, store)
            for task, path in tasks.items():
                if not writer.has(task):
                    log.info("zero-shot, %s: %s", name, task)
                    writer.save_json(task, _score(loaded, task, path, limit))

    artefact = store.get_or_make(KIND, inputs, make)
    about = {"model": model.source, "device": model.device}
    about |= {"bits": spec.bits, "rotation": spec.rotation.name} if spec else {}
    lines = [{"row": name, "task": task, **line, **about} for task in tasks for line in artefact.json(task)]
    return pd.DataFrame([*lines, *_averages(lines)])


def _averages(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plain mean over tasks of acc, and of acc_norm where a task has it and acc where not; nothing where
    a task is missing."""
    if {line["task"] for line in lines} != set(TASKS):
        return []
    found = {(line["task"], line["metric"]): line for line in lines}
    averages = []
    for metric in METRICS:
        chosen = [found.get((task, metric), found[task, "acc"]) for task in TASKS]
        stderr = sum(line["stderr"] ** 2 for line in chosen) ** 0.5 / len(chosen)
        value = sum(line["value"] for line in chosen) / len(chosen)
        about = {"version": None, "source": None}
        averages.append(
            {
                **chosen[0],
                "task": AVERAGE,
                "metric": metric,
                "value": value,
                "stderr": stderr,
                **about,
                "items": sum(c["items"] for c in chosen),
            }
        )
    return averages


def _score(
    loaded: loading.LoadedModel, task: str, path: Path | None, limit: int | None
) -> list[dict[str, Any]]:
    """One task's accuracies by lm-eval: metric, value, stderr, items, version, source."""
    found = _simple_evaluate(loaded, task, path, limit)
    scores, items = found["results"][task], int(found["n-samples"][task]["effective"])
    source = "local file" if path else "hub"
    about = {"items": items, "version": str(found["versions"][task]), "source": source}
    lines = []
    for metric in METRICS:
        if f"{metric},none" in scores:
            value = float(scores[f"{metric},none"])
            # what lm-eval's own formula gives for a mean of zeros and ones
            stderr = (value * (1 - value) / max(items - 1, 1)) ** 0.5
            lines.append({"metric": metric, "value": value, "stderr": stderr, **about})
    return lines


def _simple_evaluate(
    loaded: loading.LoadedModel, task: str, path: Path | None, limit: int | None
) -> dict[str, Any]:
    """What lm-eval itself returns for one task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # it warns that a model is no name, and that it cannot check a device it does not choose
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own: dict[str, Any] = {"pretrained": loaded.model, "tokenizer": loaded.tokenizer, "batch_size": BATCH}
    model = HFLM(**own, device=str(loaded.device), max_length=loaded.context)
    with tempfile.TemporaryDirectory() as folder:
        manager = _local_task(task, path, Path(folder)) if path else TaskManager()
        options: dict[str, Any] = {"task_manager": manager, "bootstrap_iters": 0, "log_samples": False}
        try:
            found = simple_evaluate(model, tasks=[task], limit=limit, **options)
        except OSError as error:
            raise ConnectionError(
                f"task {task} is not here and could not be loaded from the hub ({error}). Put {task}.jsonl "
                "into zero_shot/ of a folder and name the folder in DFROT_LAB_DATA, or go online."
            ) from error
    if found is None:
        raise RuntimeError(f"lm-eval returned nothing for task {task}")
    return dict(found)


def _local_task(task: str, path: Path, folder: Path) -> Any:
    """A TaskManager that knows `task` alone: lm-eval's own file, its data taken from `path`."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    own, split = TASKS[task]
    unwanted = {
        f"{name}_split": None for name in ("training", "validation", "test", "fewshot") if name != split
    }
    override = {
        "include": str(Path(lm_eval.tasks.__file__).parent / own),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path)}},
        f"{split}_split": split,
        **unwanted,
    }
    (folder / f"{task}.yaml").write_text(json.dumps(override), encoding="utf-8")  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False)
