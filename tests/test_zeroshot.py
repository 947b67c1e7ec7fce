"""Zero-shot: the tasks' own files found and scored, averages by hand, each table computed once; and that a
rotation alone changes no answer.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from again import assert_near, sharing
from test_evaluate import resolved, save_lively
from transformers import AutoTokenizer

from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import checkpoint, loading
from dfrot_lab.model.loading import LoadedModel
from dfrot_lab.model.public import public
from dfrot_lab.recipe.specs import CorpusSpec, ModelSpec, Recipe, RotationSpec, recipe_of
from dfrot_lab.score import build, zeroshot
from dfrot_lab.score.zeroshot import AVERAGE, CHOSEN, METRICS, NINE, SIX, TASKS, chosen, local_file, table
from dfrot_lab.study import paper

ITEMS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"goal": "dry a cup", "sol1": "a towel", "sol2": "a long hot bath", "label": 0},
        {"goal": "light a fire", "sol1": "water", "sol2": "a match", "label": 1},
        {"goal": "cut wool", "sol1": "shears", "sol2": "soup", "label": 0},
    ],
    "winogrande": [
        {
            "sentence": "The dog bit the cat as _ was angry.",
            "option1": "dog",
            "option2": "cat",
            "answer": "1",
        },
        {"sentence": "Ann paid Bo because _ was owed.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        {
            "sentence": "The pot fell on the jar and _ broke.",
            "option1": "pot",
            "option2": "jar",
            "answer": "2",
        },
    ],
    "hellaswag": [
        {
            "ind": n,
            "activity_label": "Sheep",
            "ctx_a": "A man shears.",
            "ctx_b": "he",
            "endings": ["rests", "flies off", "sinks", "x"],
            "label": str(n),
        }
        for n in range(3)
    ],
    "arc_easy": [
        {
            "id": str(n),
            "question": f"What is {n} + 1?",
            "choices": {"text": ["0", "1 apple", "2", "3!"], "label": list("ABCD")},
            "answerKey": key,
        }
        for n, key in enumerate("BCD")
    ],
    "arc_challenge": [
        {
            "id": str(n),
            "question": f"Why {n}?",
            "choices": {"text": ["so", "no reason at all", "luck"], "label": list("ABC")},
            "answerKey": key,
        }
        for n, key in enumerate("ABC")
    ],
    "lambada_openai": [{"text": f"the sheep number {n} went over the hill"} for n in range(3)],
}
MORE: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"passage": "Sheep eat grass.", "question": "do sheep eat grass", "label": 1},
        {"passage": "Wool is not metal.", "question": "is wool metal", "label": 0},
    ],
    "openbookqa": [
        {
            "question_stem": "Wool keeps one",
            "choices": {"text": ["warm", "wet", "x", "old"], "label": list("ABCD")},
            "answerKey": "A",
        },
        {
            "question_stem": "Ice is",
            "choices": {"text": ["hot", "cold and hard", "x", "old"], "label": list("ABCD")},
            "answerKey": "B",
        },
    ],
    "social_iqa": [
        {
            "context": "Ann fell.",
            "question": "How is she?",
            "answerA": "hurt",
            "answerB": "a lot",
            "answerC": "x",
            "label": "1",
        },
        {
            "context": "Bo won.",
            "question": "How is he?",
            "answerA": "sad",
            "answerB": "proud of it",
            "answerC": "x",
            "label": "2",
        },
    ],
    "mmlu": [
        {"question": "1 + 1?", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 1},
        {
            "question": " Bones are? ",
            "subject": "anatomy",
            "choices": ["hard", "gas", "red", "no"],
            "answer": 0,
        },
    ],
}
"""Three items of each task of six, two of each other, in the field names of lm-eval's task files, short enough
for a tiny model's context.
"""


def put(data: Path, items: dict[str, list[dict[str, Any]]]) -> None:
    """Write each task's items where the package looks for them."""
    for task, own in items.items():
        (data / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in own))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DFROT_LAB_DATA with ITEMS in it; what `datasets` makes of them goes to the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    data = tmp_path / "data" / "zero_shot"
    data.mkdir(parents=True)
    put(data, ITEMS)
    monkeypatch.delenv(CHOSEN, raising=False)
    monkeypatch.setenv("DFROT_LAB_DATA", str(tmp_path / "data"))
    return data


def row_of(model: ModelSpec, text: Path, bits: str = "16-16-16", kind: str = "NR") -> Recipe:
    calibration = {"corpus": CorpusSpec(name=str(text), split="calibration"), "windows": 2, "window": 64}
    spec = recipe_of(
        bits,
        weights="rtn",
        model=model,
        corpus=CorpusSpec(name=str(text)),
        rotation=RotationSpec(kind=kind),
        windows=2,
        window=64,
    )
    return spec.with_(weights=spec.weights.with_(**calibration))


def saved_model(folder: Path) -> ModelSpec:
    """A tiny model with an end-of-text token, the byte 0, without which lm-eval cannot encode."""
    spec = save_lively(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "\u0100"
    tokenizer.save_pretrained(folder)
    return spec


def test_a_model_read_layer_by_layer_answers_as_the_kept_one(folder, tmp_path, text_file, monkeypatch):
    model = saved_model(tmp_path / "model")
    spec = row_of(model, text_file, "4-4-4", "RH")
    expected = table("row", spec, model, 3, Store(tmp_path / "kept"))
    plain = table("row", None, model, 2, Store(tmp_path / "kept"))
    monkeypatch.setenv(checkpoint.MEMORY, "0")
    pd.testing.assert_frame_equal(table("row", spec, model, 3, Store(tmp_path / "s")), expected)
    pd.testing.assert_frame_equal(table("row", None, model, 2, Store(tmp_path / "s")), plain)


def test_what_is_returned_is_what_lm_eval_s_own_front_door_returns(folder, tmp_path):
    """`simple_evaluate`, with the defaults of its command line."""
    from lm_eval import simple_evaluate

    loaded = loading.load_model(saved_model(tmp_path / "model"))
    for task in ("hellaswag", "lambada_openai"):
        found = zeroshot._evaluated(loaded, task, local_file(task), None)
        model = zeroshot._language_model(loaded)
        manager = zeroshot._local_task(task, local_file(task), tmp_path)
        expected = simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)
        for part in ("results", "versions", "n-shot", "n-samples", "higher_is_better"):
            assert found[part] == expected[part], part


# ---- where items are
# ------------------------------------------------------------------------------------------


def test_a_local_file_is_found_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DFROT_LAB_DATA", str(tmp_path))
    assert all(local_file(task) is None for task in TASKS)
    (tmp_path / "zero_shot").mkdir()
    (tmp_path / "zero_shot" / "piqa.jsonl").write_text("{}\n")
    (tmp_path / "zero_shot" / "winogrande.jsonl").mkdir()  # a folder is no file
    assert {task: local_file(task) for task in TASKS if local_file(task)} == {
        "piqa": tmp_path / "zero_shot" / "piqa.jsonl"
    }


def test_there_is_no_local_file_without_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("DFROT_LAB_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert all(local_file(task) is None for task in TASKS)


# ---- averages
# ------------------------------------------------------------------------------------------


def line(task: str, metric: str, value: float, stderr: float = 0.01, items: int = 10) -> dict[str, Any]:
    return {
        "row": "r",
        "task": task,
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "items": items,
        "version": "1",
        "source": "hub",
    }


def six_tasks() -> list[dict[str, Any]]:
    """Task n has acc n/10, stderr n/100 and n items; those with a length-normalised accuracy have it 0.05
    above.
    """
    lines = [line(task, "acc", n / 10, n / 100, n) for n, task in enumerate(SIX, 1)]
    normalised = ("piqa", "hellaswag", "arc_easy", "arc_challenge")
    return lines + [
        line(task, "acc_norm", n / 10 + 0.05, 0.02, n) for n, task in enumerate(SIX, 1) if task in normalised
    ]


def test_averages_are_those_computed_by_hand():
    """(0.1 + ... + 0.6) / 6, errors added in squares; acc_norm takes acc where a task has no acc_norm: here
    winogrande and lambada.
    """
    acc, acc_norm = zeroshot._averages(six_tasks())
    assert (acc["row"], acc["task"], acc["metric"], acc["items"]) == ("r", AVERAGE, "acc", 21)
    assert acc["value"] == pytest.approx(0.35)
    assert acc["stderr"] == pytest.approx(
        math.sqrt(0.01**2 + 0.02**2 + 0.03**2 + 0.04**2 + 0.05**2 + 0.06**2) / 6
    )
    assert (acc_norm["metric"], acc_norm["items"]) == ("acc_norm", 21)
    assert acc_norm["value"] == pytest.approx((0.15 + 0.2 + 0.35 + 0.45 + 0.55 + 0.6) / 6)
    assert acc_norm["stderr"] == pytest.approx(math.sqrt(4 * 0.02**2 + 0.02**2 + 0.06**2) / 6)


@pytest.mark.parametrize("missing", SIX)
def test_there_is_no_average_where_a_task_is_missing(missing):
    assert zeroshot._averages([found for found in six_tasks() if found["task"] != missing]) == []


# ---- scoring, on a tiny model and a few items of each task
# ------------------------------------------------------------------------------


def log_likelihoods(loaded: LoadedModel, context: str, continuations: list[str]) -> list[float]:
    """log p of each continuation after the context, token by token."""
    found = []
    start = len(loaded.tokenizer(context).input_ids)
    for continuation in continuations:
        ids = loaded.tokenizer(context + continuation).input_ids
        logits = loaded.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found.append(sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids))))
    return found


def hits(scores: list[float], right: int) -> float:
    return float(max(range(len(scores)), key=scores.__getitem__) == right)


@torch.inference_mode()
def by_hand(loaded: LoadedModel, limit: int) -> dict[tuple[str, str], float]:
    """Accuracies of arc_easy and piqa (the likeliest choice; per character for acc_norm), winogrande (the
    likeliest start) and lambada (greedy).
    """
    seen: dict[tuple[str, str], list[float]] = {}
    for task in ("arc_easy", "piqa"):
        for item in ITEMS[task][:limit]:
            question = item["question"] if task == "arc_easy" else item["goal"]
            choices = item["choices"]["text"] if task == "arc_easy" else [item["sol1"], item["sol2"]]
            right = "ABCD".index(item["answerKey"]) if task == "arc_easy" else item["label"]
            scores = log_likelihoods(
                loaded, f"Question: {question}\nAnswer:", [f" {choice}" for choice in choices]
            )
            seen.setdefault((task, "acc"), []).append(hits(scores, right))
            seen.setdefault((task, "acc_norm"), []).append(
                hits([s / len(c) for s, c in zip(scores, choices, strict=True)], right)
            )
    for item in ITEMS["winogrande"][:limit]:
        before, after = item["sentence"].split("_")
        scores = [
            log_likelihoods(loaded, before + option, [f" {after.strip()}"])[0]
            for option in (item["option1"], item["option2"])
        ]
        seen.setdefault(("winogrande", "acc"), []).append(hits(scores, int(item["answer"]) - 1))
    for item in ITEMS["lambada_openai"][:limit]:
        context, last = item["text"].rsplit(" ", 1)
        ids, start = loaded.tokenizer(f"{context} {last}").input_ids, len(loaded.tokenizer(context).input_ids)
        likeliest = loaded.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        seen.setdefault(("lambada_openai", "acc"), []).append(float(likeliest[start - 1 : -1] == ids[start:]))
    return {key: sum(values) / len(values) for key, values in seen.items()}


def test_accuracies_are_those_of_a_loop_over_items(tmp_path, store, folder, monkeypatch):
    """Four tasks that are each scored in their own way; hellaswag is scored as piqa is, and arc_challenge as
    arc_easy.
    """
    four = {name: TASKS[name] for name in ("piqa", "winogrande", "arc_easy", "lambada_openai")}
    monkeypatch.setattr(zeroshot, "TASKS", four)
    monkeypatch.setattr(zeroshot, "AVERAGES", {AVERAGE: four})
    model, items = saved_model(tmp_path / "model"), 2
    found = table("plain", None, model, items, store)
    accuracy = {(row.task, row.metric): row.value for row in found.itertuples()}
    expected = by_hand(loading.load_model(model), items)
    assert {key: value for key, value in accuracy.items() if key[0] != AVERAGE} == pytest.approx(expected)
    assert set(found["task"]) == {*zeroshot.TASKS, AVERAGE} and set(found["metric"]) == set(METRICS)
    of_tasks = found[found["task"] != AVERAGE]
    assert set(of_tasks["items"]) == {items} and set(found.loc[found["task"] == AVERAGE, "items"]) == {
        4 * items
    }
    assert set(of_tasks["source"]) == {"local file"} and set(found["model"]) == {public(model).source}
    for row in of_tasks.itertuples():
        assert row.stderr == pytest.approx(
            math.sqrt(row.value * (1 - row.value) / (items - 1))
        )  # of a mean of zeros and ones


def choices_of(task: str, item: dict[str, Any]) -> tuple[str, list[str], int]:
    """What is asked, what may be answered, which is right, as the papers of these tasks and lm-eval have it."""
    if task == "boolq":
        return f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:", ["no", "yes"], item["label"]
    if task == "openbookqa":
        return item["question_stem"], item["choices"]["text"], "ABCD".index(item["answerKey"])
    if task == "social_iqa":
        answers = [item[f"answer{letter}"] for letter in "ABC"]
        return f"Q: {item['context']} {item['question']}\nA:", answers, int(item["label"]) - 1
    about = item["subject"].replace("_", " ")
    lines = [item["question"].strip(), *(f"{a}. {c}" for a, c in zip("ABCD", item["choices"], strict=True))]
    asked = "\n".join([*lines, "Answer:"])
    said = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return said + asked, list("ABCD"), item["answer"]


def test_the_other_tasks_of_the_paper_too_and_the_average_of_nine(tmp_path, store, folder):
    put(folder, MORE)
    model = saved_model(tmp_path / "model")
    found = table("plain", None, model, None, store).set_index(["task", "metric"])
    loaded = loading.load_model(model)
    for task, items in MORE.items():
        expected = []
        with torch.inference_mode():
            for item in items:
                asked, answers, right = choices_of(task, item)
                expected.append(hits(log_likelihoods(loaded, asked, [f" {a}" for a in answers]), right))
        assert found.loc[(task, "acc"), "value"] == sum(expected) / len(expected), task
    acc = found.xs("acc", level="metric")["value"]
    assert acc["average of nine"] == pytest.approx(acc[list(NINE)].mean())
    assert acc[AVERAGE] == pytest.approx(acc[list(SIX)].mean())
    places = {
        (place[0], place[4]) for place, _ in paper._zero_shot(found.reset_index().assign(row="NR 16-16-16"))
    }
    assert places >= {("T2", "acc_average9"), ("T4", "mmlu"), ("zero-shot", "acc_average6")}


def test_which_tasks_are_scored(folder, tmp_path, monkeypatch):
    assert list(chosen()) == list(SIX) and all(chosen().values())
    put(folder, {"boolq": MORE["boolq"]})
    assert list(chosen()) == [*SIX, "boolq"], "all that have a file"
    monkeypatch.setenv(CHOSEN, "mmlu, piqa")
    with pytest.raises(ValueError, match=r"mmlu is scored from zero_shot/mmlu.jsonl .*to_json"):
        chosen()
    put(folder, {"mmlu": MORE["mmlu"]})
    assert chosen() == {"mmlu": folder / "mmlu.jsonl", "piqa": folder / "piqa.jsonl"}
    monkeypatch.setenv("DFROT_LAB_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv(CHOSEN, "social_iqa")
    assert chosen() == {"social_iqa": None}
    monkeypatch.setenv(CHOSEN, "siqa,piqa")
    with pytest.raises(ValueError, match=r"DFROT_LAB_TASKS must name tasks of piqa, .*; got siqa$"):
        chosen()
    monkeypatch.delenv(CHOSEN)
    assert chosen() == dict.fromkeys(SIX), "the six, from the hub"


def test_a_table_is_computed_once_and_a_row_is_another_with_other_items_limit_or_bits(
    tmp_path, store, folder, text_file, monkeypatch
):
    monkeypatch.setattr(zeroshot, "TASKS", {name: TASKS[name] for name in ("arc_easy", "winogrande")})
    model = saved_model(tmp_path / "model")
    scored: list[tuple[str, int | None]] = []

    def counted(
        _loaded: LoadedModel, task: str, path: Path | None, limit: int | None
    ) -> list[dict[str, Any]]:
        assert path == folder / f"{task}.jsonl"
        scored.append((task, limit))
        return [
            {
                "metric": "acc",
                "value": 0.5,
                "stderr": 0.1,
                "items": len(path.read_text().splitlines()),
                "version": "1",
                "source": "local file",
            }
        ]

    monkeypatch.setattr(zeroshot, "_score", counted)
    spec = row_of(model, text_file)
    first = table("NR", spec, model, 2, store)
    assert scored == [("arc_easy", 2), ("winogrande", 2)]
    pd.testing.assert_frame_equal(table("NR", spec, model, 2, store), first, check_exact=True)
    renamed = table("another name", spec, model, 2, store)
    assert len(scored) == 2 and set(renamed["row"]) == {"another name"}
    assert set(first["bits"]) == {"16-16-16"} and set(first["rotation"]) == {"NR"}
    table("NR", spec, model, None, store)
    assert scored[2:] == [("arc_easy", None), ("winogrande", None)]
    table("RH", row_of(model, text_file, "4-4-4", "RH"), model, 2, store)
    table("plain", None, model, 2, store)
    assert len(scored) == 8
    (folder / "arc_easy.jsonl").write_text(json.dumps(ITEMS["arc_easy"][0]) + "\n")
    assert table("NR", spec, model, 2, store).loc[0, "items"] == 1
    assert len(scored) == 10


def test_a_stopped_table_goes_on_at_its_task(tmp_path, store, folder, monkeypatch):
    model = saved_model(tmp_path / "model")
    scored: list[str] = []

    def stop_at_third(
        _loaded: LoadedModel, task: str, _path: Path | None, _limit: int | None
    ) -> list[dict[str, Any]]:
        if len(scored) == 2 and "go on" not in os.environ:
            raise KeyboardInterrupt
        scored.append(task)
        return [
            {
                "metric": "acc",
                "value": len(scored) / 10,
                "stderr": 0.0,
                "items": 3,
                "version": "1",
                "source": "local file",
            }
        ]

    monkeypatch.setattr(zeroshot, "_score", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        table("plain", None, model, 3, store)
    monkeypatch.setenv("go on", "1")
    found = table("plain", None, model, 3, store)
    assert scored == list(SIX)
    assert found.loc[found["task"] != AVERAGE, "value"].tolist() == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    )


def test_a_quantized_row_is_scored_as_it_is_evaluated(tmp_path, store, folder, text_file, monkeypatch):
    """The model that is scored gives the logits of the built and quantized one, and is itself again after."""
    monkeypatch.setattr(zeroshot, "TASKS", {"arc_easy": TASKS["arc_easy"]})
    model = saved_model(tmp_path / "model")
    spec = row_of(model, text_file, "4-4-4", "RH").with_(keep_out="nr_error_9.5")
    ids = torch.arange(1, 60)[None]
    seen: list[LoadedModel] = []
    logits: list[torch.Tensor] = []

    def look(loaded: LoadedModel, _task: str, _path: Path | None, _limit: int | None) -> list[dict[str, Any]]:
        seen.append(loaded)
        with torch.inference_mode():
            logits.append(loaded.model(ids).logits)
        return []

    monkeypatch.setattr(zeroshot, "_score", look)
    table("RH", spec, model, 2, store)
    built = build.build(spec, Store(tmp_path / "alone"))
    with build.quantized(built, resolved(spec)), torch.inference_mode():
        expected = built.loaded.model(ids).logits
    assert_near(logits[0], expected, 0.05)  # through 4 bits, where rounding may flip a code
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in seen[0].model.modules())


# ---- the default model
# ------------------------------------------------------------------------------------------


@pytest.mark.model
def test_norms_fused_and_nothing_quantized_answers_as_the_plain_model_does(tmp_path):
    """One item of each task; a second call reads the stored accuracies and loads no model."""
    if not all(local_file(task) for task in SIX):
        pytest.skip("DFROT_LAB_DATA names no folder with zero_shot/<task>.jsonl of all six tasks")
    store = sharing(Store(), tmp_path / "store", "model")  # its GGUF file is made a folder once
    spec = recipe_of("16-16-16", rotation=RotationSpec(kind="NR"))
    plain, fused = (
        table("plain", None, ModelSpec(), 1, store),
        table("NR 16-16-16", spec, ModelSpec(), 1, store),
    )
    columns = ["task", "metric", "value", "stderr", "items", "version", "source"]
    pd.testing.assert_frame_equal(plain[columns], fused[columns], check_exact=True)
    assert set(plain["task"]) >= {*SIX, AVERAGE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zeroshot, "_score", None)
        patch.setattr(loading, "load_model", None)
        pd.testing.assert_frame_equal(
            table("NR 16-16-16", spec, ModelSpec(), 1, store), fused, check_exact=True
        )
