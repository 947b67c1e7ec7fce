"""Zero-shot accuracy through lm-eval's own tasks, from the hub or from local files, with the fields lm-eval's
task files read: `<task>.jsonl` in `zero_shot/` of the folder DFROT_LAB_DATA names. Where nothing else is said
the six of the authors' README; DFROT_LAB_TASKS names others of `TASKS`."""

import json
import logging
import os
import tempfile
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.disk.provenance import version_of
from dfrot_lab.model import door, loading, stream
from dfrot_lab.model.checkpoint import HEAD
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.public import public
from dfrot_lab.recipe import keys
from dfrot_lab.recipe.base import require
from dfrot_lab.recipe.specs import ModelSpec, Recipe
from dfrot_lab.score import build

log = logging.getLogger(__name__)
SIX = {
    "piqa": ("piqa/piqa.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test"),
}
NINE = SIX | {
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "social_iqa": ("siqa/siqa.yaml", "validation"),
}
TASKS = NINE | {"mmlu": ("mmlu/default/_default_template_yaml", "test")}
"""lm-eval's own task file, and the split it is scored on."""
CHOSEN = "DFROT_LAB_TASKS"  # environment variable: names of TASKS with commas between
SUBJECTS = (
    "The following are multiple choice questions (with answers) about {{subject|replace('_', ' ')}}.\n\n"
)
"""What lm-eval says before a question of each of MMLU's 57 subjects, which are one task here."""
METRICS = ("acc", "acc_norm")
AVERAGE = "average of six"
AVERAGES = {AVERAGE: SIX, "average of nine": NINE}
KIND = "zero-shot"


def local_file(task: str) -> Path | None:
    """The task's items on this machine, or None."""
    path = Path(os.environ.get("DFROT_LAB_DATA", ""), "zero_shot", f"{task}.jsonl")
    return path if os.environ.get("DFROT_LAB_DATA") and path.is_file() else None


def chosen() -> dict[str, Path | None]:
    """The tasks to score, each with its local file or None (the hub): those CHOSEN names; else those with a
    file; else the six, from the hub. ValueError: a name that is none, MMLU without a file."""
    local = {task: path for task in TASKS if (path := local_file(task))}
    if said := os.environ.get(CHOSEN, ""):
        names = [name.strip() for name in said.split(",") if name.strip()]
        if wrong := [name for name in names if name not in TASKS]:
            raise ValueError(f"{CHOSEN} must name tasks of {', '.join(TASKS)}; got {', '.join(wrong)}")
    else:
        names = list(local or SIX)
        if absent := [task for task in SIX if task not in names]:
            log.info("tasks without a file in $DFROT_LAB_DATA/zero_shot are left out: %s", ", ".join(absent))
    if "mmlu" in names and "mmlu" not in local:
        made = 'datasets.load_dataset("cais/mmlu", "all", split="test").to_json("mmlu.jsonl")'
        raise ValueError(
            f"mmlu is scored from zero_shot/mmlu.jsonl of $DFROT_LAB_DATA alone; {made} makes it"
        )
    return {name: local.get(name) for name in names}


def table(name: str, spec: Recipe | None, model: ModelSpec, limit: int | None, store: Store) -> pd.DataFrame:
    """Accuracy on each task (its first `limit` items), and the average, of a row called `name`: of `spec`'s
    model, or with None the plain one; tasks as `chosen`. Columns: row, task, metric, value, stderr, items,
    version, source, then what a results row says of the model. ConnectionError: the hub cannot be reached."""
    plain = spec is None or spec.prefix is None
    require("Recipe.prefix", "one", plain, "None for tasks, whose texts have nothing before them")
    model = door.resolved(model)
    recipe = door.resolved(spec.with_(windows=1)).canonical() if spec else None  # tasks need no windows
    tasks = chosen()

    def inputs() -> Any:
        digests = {task: door.prints(str(path)) if path else "hub" for task, path in tasks.items()}
        return keys.tasks(recipe or model, door.prints, digests, limit, version_of("lm-eval"))

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
    about = {"model": public(model).source, "device": model.device}
    about |= {"bits": spec.bits, "rotation": spec.rotation.name} if spec else {}
    lines = [{"row": name, "task": task, **line, **about} for task in tasks for line in artefact.json(task)]
    return pd.DataFrame([*lines, *_averages(lines)])


def _averages(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over six and over nine tasks of acc, and of acc_norm (acc where a task has none); nothing
    where one is missing."""
    found = {(line["task"], line["metric"]): line for line in lines}
    averages = []
    for (name, tasks), metric in product(AVERAGES.items(), METRICS):
        if not set(tasks) <= {task for task, _ in found}:
            continue
        own = [found.get((task, metric), found[task, "acc"]) for task in tasks]
        said: dict[str, Any] = {"task": name, "metric": metric, "version": None, "source": None}
        said["value"] = sum(line["value"] for line in own) / len(own)
        said["stderr"] = sum(line["stderr"] ** 2 for line in own) ** 0.5 / len(own)
        averages.append({**own[0], **said, "items": sum(line["items"] for line in own)})
    return averages


def _score(loaded: LoadedModel, task: str, path: Path | None, limit: int | None) -> list[dict[str, Any]]:
    """One task's accuracies by lm-eval: metric, value, stderr, items, version, source."""
    found = _evaluated(loaded, task, path, limit)
    scores, items = found["results"][task], int(found["n-samples"][task]["effective"])
    source = "local file" if path else "hub"
    about = {"items": items, "version": str(found["versions"][task]), "source": source}
    values = {name: float(scores[f"{name},none"]) for name in METRICS if f"{name},none" in scores}
    # lm-eval's own formula for a mean of zeros and ones
    errors = {name: (value * (1 - value) / max(items - 1, 1)) ** 0.5 for name, value in values.items()}
    return [{"metric": name, "value": values[name], "stderr": errors[name], **about} for name in values]


def _evaluated(loaded: LoadedModel, task: str, path: Path | None, limit: int | None) -> dict[str, Any]:
    """What lm-eval itself returns for one task, without examples. Not by its `simple_evaluate`, which lists
    the installed packages after each task, for two seconds."""
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    model = _language_model(loaded)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        try:
            manager = _local_task(task, path, Path(folder)) if path else TaskManager()
            asked = manager.load([task])
            asked["tasks"][task].set_config(key="num_fewshot", value=0)
            options: dict[str, Any] = {"limit": limit, "bootstrap_iters": 0, "log_samples": False}
            if loaded.checkpoint is None:
                return dict(evaluate(model, asked, **options))
            evaluate(model, asked, **options)
            model.hidden = stream.through(loaded, model.batches, task)
            with stream.part(loaded, HEAD):
                return dict(evaluate(model, asked, **options))
        except OSError as error:
            said = f"task {task} is not here and could not be loaded from the hub ({error})"
            advice = "into zero_shot/ of a folder and name the folder in DFROT_LAB_DATA, or go online."
            raise ConnectionError(f"{said}. Put {task}.jsonl {advice}") from error


def _language_model(loaded: LoadedModel) -> Any:
    """lm-eval's model. One that does not fit into memory is asked twice: the first time it notes what it is
    asked, `batches`; all of that then passes the layers once, and the second time it has the logits."""
    from lm_eval.models.huggingface import HFLM

    class Streamed(HFLM):
        """Answers from `hidden`, what leaves the last layer for each batch, once it is there."""

        device = loaded.device

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.batches, self.hidden = list[Tensor](), list[Tensor]()

        def _model_call(self, inps: Tensor, *_args: Any, **_options: Any) -> Tensor:
            if self.hidden:
                return stream.logits(loaded, self.hidden.pop(0))
            self.batches.append(inps)
            return torch.zeros(1).expand(*inps.shape, loaded.config.vocab_size)

    # it warns that a model is no name, and that it cannot check a device it does not choose
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own: dict[str, Any] = {"pretrained": loaded.model, "tokenizer": loaded.tokenizer, "batch_size": 16}
    kind = HFLM if loaded.checkpoint is None else Streamed
    return kind(**own, device=str(loaded.device), max_length=loaded.context)


def _local_task(task: str, path: Path, folder: Path) -> Any:
    """A TaskManager that knows `task` alone: lm-eval's own file, its data taken from `path`."""
    import lm_eval.tasks

    own, split = TASKS[task]
    override = dict.fromkeys(f"{name}_split" for name in ("training", "validation", "test", "fewshot"))
    override |= {"include": str(Path(lm_eval.tasks.__file__).parent / own), "task": task}
    override |= {"dataset_path": "json", "dataset_name": None, f"{split}_split": split}
    override["dataset_kwargs"] = {"data_files": {split: str(path)}}
    override |= {"description": SUBJECTS} if task == "mmlu" else {}
    (folder / f"{task}.yaml").write_text(json.dumps(override), encoding="utf-8")  # JSON is YAML
    return lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
