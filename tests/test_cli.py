"""Every command end to end on a tiny model: what it prints, what it writes, and how it refuses bad input with
nothing lost.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import LAYERS, save_tiny
from test_evaluate import resolved
from typer.testing import CliRunner

from dfrot_lab.cli.app import app
from dfrot_lab.disk import rotation_files, row_files
from dfrot_lab.maths import rotations, tables
from dfrot_lab.model.families import FAMILIES
from dfrot_lab.model.public import public
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.specs import MASSIVE_RULES, Recipe, RotationSpec
from dfrot_lab.study.experiments import EXPERIMENTS

DONE = "[0-9a-f]*[0-9a-f]/manifest.json"
"""Finished artefacts only: the folder of one being made ends in .partial."""

COMMON = ("--model", "--corpus", "--seed", "--out", "--json", "--dtype")
WITHOUT = {
    "run": (),
    "capture": ("--seed",),
    "errors": (),
    "refine": (),
    "evaluate": (),
    "recipe": ("--json",),
    "experiment": (),
    "figures": (),
    "compare": (),
    "report": (),
    "models": ("--corpus", "--seed"),
    "doctor": ("--seed",),
    "fetch": ("--seed",),
}
"""Every command, with the common options that would do nothing there."""


@pytest.fixture
def bench(tmp_path, text_file, monkeypatch):
    """A cache of its own, a tiny model that sees windows of 2048, and the test's folder to work in."""
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DFROT_LAB_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    spec = save_tiny(tmp_path / "model", context=4096)
    text_file.write_text(text_file.read_text() * 6)
    return ["--model", spec.source, "--corpus", str(text_file)]


def invoke(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (
        f"{arguments}: exit {result.exit_code}\n{result.output}\n{result.exception!r}"
    )
    return result


@pytest.mark.parametrize("command", WITHOUT)
def test_every_command_has_help_and_the_common_options_that_do_something(command):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert [option for option in COMMON if option not in shown] == list(WITHOUT[command])


def test_help_lists_the_commands_and_what_can_be_chosen_by_name():
    shown = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.split())
    assert all(f" {command} " in shown for command in WITHOUT)
    for names in (registry.rows(), registry.METHODS, registry.WEIGHTS, FAMILIES, MASSIVE_RULES):
        assert all(name in shown.split("What can be chosen")[1] for name in names)


def test_help_and_import_load_nothing_heavy():
    heavy = "{'torch', 'transformers', 'pandas', 'matplotlib'}"
    code = f"import sys; from dfrot_lab import cli; print(sorted({heavy} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_capture_finds_the_planted_tokens(bench, tmp_path):
    shown = json.loads(
        invoke("capture", *bench, "--tokens", "100", "--json", "--out", str(tmp_path / "t.csv")).stdout
    )
    assert shown["sites"] == 2 * LAYERS
    assert {row["text"] for row in shown["rows"]} == {"\n"}
    assert len(pd.read_csv(tmp_path / "t.csv")) == len(shown["rows"])


def test_errors_writes_the_whole_table(bench, tmp_path):
    invoke("errors", *bench, "--tokens", "100", "--out", str(tmp_path / "t.parquet"))
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert len(table) == 2 * LAYERS * 100 * 3
    assert set(table["rotation"]) == {"NR", "RO", "RH"}


def test_errors_refuses_an_unknown_ending_and_leaves_nothing(bench, tmp_path):
    shown = invoke("errors", *bench, "--tokens", "50", "--out", str(tmp_path / "t.xls"), code=1)
    assert "--out must be a file ending in .parquet, .csv, .json" in shown.stderr
    assert not list(tmp_path.glob("*.xls*"))


def test_refine_then_evaluate_the_saved_rotation(bench, tmp_path):
    path = tmp_path / "R1.safetensors"
    invoke("refine", *bench, "--tokens", "200", "--steps", "3", "--gamma", "10", "--out", str(path))
    assert rotations.orthogonality_error(rotation_files.load(path)) < 1e-5
    row = json.loads(
        invoke(
            "evaluate", *bench, "--rotation", str(path), "--bits", "16-4-16", "--windows", "2", "--json"
        ).stdout
    )
    assert tuple(row) == (*tables.COLUMNS, tables.DIVERGENCE, tables.AGREEMENT)
    assert row["metric"] == tables.PERPLEXITY and row["builds"] == 1
    assert row["KL divergence"] > 0 and 0 < row["top-1 agreement"] <= 1
    assert row["rotation"] == "R1.safetensors"
    assert row["value"] > 1


def test_evaluate_adds_rows_to_a_file(bench, tmp_path):
    out = tmp_path / "rows.jsonl"
    for rotation in ("RH", "RO"):
        invoke(
            "evaluate",
            *bench,
            "--rotation",
            rotation,
            "--bits",
            "16-4-4",
            "--windows",
            "1",
            "--keep-out",
            "--out",
            str(out),
        )
    table = row_files.load(out)
    assert list(zip(table["rotation"], table["metric"], strict=True)) == [
        (name, metric) for name in ("RH", "RO") for metric in tables.LEVELS
    ]
    assert table["keep_out"].eq(True).all() and set(table["keep_out_rule"]) == {"nr_error_9.5"}
    for key in table["recipe"]:
        assert Recipe.from_yaml(tmp_path / f"rows.{key}.yaml").key == key


OPTIONS = (
    ["--rotation", "RO", "--seed", "3", "--bits", "16-4-4"],
    ["--rotation", "DFRot", "--gamma", "7", "--rule", "nr_error_8.5", "--bits", "16-4-16"],
    ["--rotation", "RH", "--bits", "4-4-16", "--weights", "rtn", "--dtype", "float64"],
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options[1])
def test_a_recipe_that_was_printed_gives_the_row_of_its_options(bench, tmp_path, options):
    """To the key, so it is one evaluation and stored once; a file of it and one written by --out do too."""
    row = json.loads(invoke("evaluate", *bench, *options, "--windows", "1", "--json").stdout)
    given = dict(zip(options[::2], options[1::2], strict=True))
    places = [given.pop("--rotation"), given.pop("--bits")]
    rest = [*bench, *(word for pair in given.items() for word in pair), "--windows", "1"]
    printed = invoke("recipe", *places, *rest).stdout
    invoke("recipe", *places, *rest, "--out", str(tmp_path / "written.yaml"))
    assert (tmp_path / "written.yaml").read_text() == printed
    (tmp_path / "printed.yaml").write_text(printed)
    assert json.loads(invoke("evaluate", "--recipe", str(tmp_path / "printed.yaml"), "--json").stdout) == row
    assert row["recipe"] == public(resolved(Recipe.from_yaml(printed))).key
    refused = invoke("evaluate", "--recipe", str(tmp_path / "printed.yaml"), "--windows", "3", code=1).stderr
    assert refused.startswith("Error: --recipe says everything: put windows into ")
    assert len(list((tmp_path / "cache" / "store").glob(f"evaluation/{DONE}"))) == 1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("windows: six", "Recipe.windows must be a whole number >= 1; got 'six'"),
        ("rotations: {kind: RO}", "Recipe has no field 'rotations'; it has model, "),
        (
            "rotation: {method: quip}",
            "rotation method must be one of random, dfrot, offset, offset_plus, klt, proxy, task, smoothquant, optrot, duquant, duquant_online, flatquant, scale_search; got 'quip'",
        ),
        ("rotation: {kind: RX}", "RotationSpec.kind must be one of NR, RO, RH, RHT2, GSR, file; got 'RX'"),
        ("- a\n- b", "Recipe must be a mapping of its fields; got ['a', 'b']"),
        ("a: [", "a recipe must be YAML; got "),
    ],
)
def test_a_recipe_with_a_mistake_is_one_line_that_names_it(bench, tmp_path, said, message):
    (tmp_path / "r.yaml").write_text(said)
    shown = invoke("evaluate", "--recipe", str(tmp_path / "r.yaml"), code=1)
    assert shown.stderr.startswith("Error: ") and message in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def run_program(bench, tmp_path, *more):
    command = [
        sys.executable,
        "-m",
        "dfrot_lab",
        "run",
        *bench,
        "--windows",
        "1",
        "--builds",
        "2",
        "--out",
        str(tmp_path / "out"),
        *more,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        # a shell's background job is deaf to Ctrl-C, and so would its children be
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_run_stopped_by_ctrl_c_goes_on_and_a_second_run_reuses_everything(bench, tmp_path):
    first = run_program(bench, tmp_path)
    while not list((tmp_path / "cache" / "store").glob(f"evaluation/{DONE}")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    assert "the same command goes on from here" in errors
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "store").glob(f"*/{DONE}")}
    second = run_program(bench, tmp_path, "--json")
    output, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert all(p.stat().st_mtime_ns == before for p, before in kept.items()), (
        "a finished artefact was made again"
    )
    rows = pd.DataFrame(json.loads(output))
    plain = rows[rows["metric"] == "perplexity"]
    assert set(zip(plain["rotation"], plain["keep_out"], strict=True)) == {
        ("NR", False), ("RO", False), ("RO", True), ("RH", False), ("RH", True), ("DFRot", False),
    }  # fmt: skip
    assert len(plain) == 11 and set(plain["builds"]) == {1, 2}
    assert set(plain["rotation"][plain["builds"] == 1]) == {"NR"}, "of which one build is enough"
    assert plain["builds"][plain["bits"] == "16-16-16"].tolist() == [2]
    compared = rows[rows["metric"] == tables.change("RH")]
    assert set(zip(compared["rotation"], compared["keep_out"], strict=True)) == {
        ("NR", False), ("RO", False), ("DFRot", False), ("RH", True),
    }  # fmt: skip
    assert (compared["verdict"].notna() == (compared["builds"] == 2)).all()
    made = set((tmp_path / "cache" / "store").glob(f"*/{DONE}"))
    third = run_program(bench, tmp_path)
    output, errors = third.communicate(timeout=120)
    assert third.returncode == 0, errors
    assert set((tmp_path / "cache" / "store").glob(f"*/{DONE}")) == made
    assert "stored" in errors
    for name in (
        "rows.jsonl",
        "rows.md",
        "rows.recipes.yaml",
        "massive-tokens.csv",
        "log.txt",
        "figures/perplexity.png",
        "figures/token-errors.svg",
    ):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert len(row_files.load(tmp_path / "out" / "rows.jsonl")) == len(rows)
    assert "The most massive token, \N{LEFT SINGLE QUOTATION MARK}↵" in output


def test_a_dry_run_says_what_a_model_that_is_not_here_would_take_and_writes_nothing(bench, tmp_path):
    def outside_the_cache() -> list[Path]:
        return sorted(path for path in tmp_path.rglob("*") if tmp_path / "cache" not in (path, *path.parents))

    before = outside_the_cache()
    shown = invoke(
        "run", "--dry-run", "--model", "llama-2-7b", "--out", str(tmp_path / "out"), "--windows", "2"
    ).stdout
    assert "llama-2-7b: 6,738,415,616 parameters" in shown
    for name in (
        "this machine",
        "one 80 GB GPU",
        "not measured",
        "evaluate, integer",
        "total",
        "within a factor of about 2",
    ):
        assert name in shown
    rows = pd.DataFrame(json.loads(invoke("run", *bench, "--dry-run", "--json").stdout))
    assert set(rows["machine"]) == {"this machine", "one 80 GB GPU"}
    assert (rows["fits"] == True).all()  # noqa: E712 a string would be true as well
    assert outside_the_cache() == before


@pytest.mark.parametrize("weights", ["absent", "a link to nowhere", "large"])
def test_a_dry_run_of_a_folder_reads_its_config_and_none_of_its_weights(bench, weights):
    """They may be a terabyte on a slow disk, or not there yet. That a file was read shows in its time of last
    access.
    """
    folder, long_ago = Path(bench[1]), (1e9, 2e9)
    files = list(folder.glob("*.safetensors"))
    control = folder / "control.safetensors"
    for file in (*files, control):
        file.unlink(missing_ok=True)
        if weights == "a link to nowhere":
            file.symlink_to(folder / "nowhere")
        elif weights == "large":
            file.touch()
            os.truncate(file, 1 << 28)  # a hole, which takes no room
            os.utime(file, long_ago)
    shown = json.loads(invoke("run", *bench, "--dry-run", "--json").stdout)
    assert {row["model"] for row in shown} == {str(folder)} and all(row["seconds"] >= 0 for row in shown)
    if weights == "large":
        with control.open("rb") as file:
            file.read(1)
        if control.stat().st_atime == long_ago[0]:
            pytest.skip("this disk keeps no time of last access")
        assert {(file.stat().st_atime, file.stat().st_mtime) for file in files} == {long_ago}


def test_only_a_dry_run_takes_a_name_that_cannot_be_loaded(bench, tmp_path):
    assert (
        "ModelSpec.source must be"
        in invoke("run", "--model", "llama-2-7b", "--out", str(tmp_path / "out"), code=1).stderr
    )
    assert "llama-2-7b, llama-3-70b" in invoke("run", "--dry-run", "--model", "llama-7b", code=1).stderr
    shown = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).output
    assert "--dry-run" in shown
    assert all(name in shown for name in ("llama-2-7b", "llama-3-70b"))


BAD = [
    (["evaluate", "--bits", "4-4"], "bits must be WEIGHTS-ACTIVATIONS-KV such as 4-4-16; got '4-4'"),
    (["evaluate", "--bits", "1-4-16"], "QuantSpec.bits must be a whole number in 2..16; got 1"),
    (["evaluate", "--bits", "4-4-17"], "QuantSpec.bits must be a whole number in 2..16; got 17"),
    (
        ["evaluate", "--rotation", "XX"],
        "KurTail + massive, SpinQuant, OSTQuant R1, SmoothQuant, OptRot, DuQuant R1, DuQuant, FlatQuant, AWQ, OS+, one in blocks such as RH-b64, or a safetensors file; got 'XX'",
    ),
    (["evaluate", "--windows", "0"], "Recipe.windows must be a whole number >= 1; got 0"),
    (["evaluate", "--windows", "100000", "--bits", "16-4-16"], "windows"),
    (["refine", "--gamma", "0"], "RefineSpec.gamma must be > 0; got 0"),
    (["refine", "--rule", "big"], f"RefineSpec.rule must be one of {', '.join(MASSIVE_RULES)}; got 'big'"),
    (["evaluate", "--rotation", "DFRot", "--rule", "big"], "RefineSpec.rule must be one of ratio_8, "),
    (
        ["evaluate", "--weights", "awq"],
        "WeightSpec.method must be one of rtn, gptq, gptaq, qep, foem, lwc, rsq, aespa; got 'awq'",
    ),
    (
        ["evaluate", "--dtype", "int8"],
        "ModelSpec.dtype must be one of auto, float32, float64, bfloat16, float16;",
    ),
    (
        ["errors", "--scheme", "sym"],
        "QuantSpec.scheme must be one of symmetric, asymmetric, free, mxfp4, nvfp4; got 'sym'",
    ),
    (["capture", "--tokens", "0"], "CaptureSpec.tokens must be a whole number >= 1; got 0"),
    (["capture", "--tokens", "-5"], "CaptureSpec.tokens must be a whole number >= 1; got -5"),
    (
        ["capture", "--tokens", "3000"],
        "CaptureSpec.tokens must be at most 2048 or a multiple of it; got 3000",
    ),
    (["capture", "--tokens", "20480000"], "windows"),
    (["capture", "--corpus", "no-such-corpus"], "no-such-corpus"),
    (["capture", "--model", "no-such-model"], "ModelSpec.source must be"),
    (["capture", "--model", "owner/name"], "For a model on the hub say hub:owner/name"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_clear_line(bench, arguments, message):
    shown = invoke(arguments[0], *bench, *arguments[1:], code=1)
    assert message in shown.stderr
    assert "Traceback" not in shown.output
    assert shown.stderr.rstrip().splitlines()[-1].startswith("Error: ")


ODD = [
    ["evaluate", "--recipe", "PIPE"],
    ["evaluate", "--recipe", "/dev/zero"],
    ["evaluate", "--recipe", "none.yaml"],
    ["evaluate", "--recipe", "FOLDER"],
    ["evaluate", "--out", "PIPE.jsonl"],
    ["evaluate", "--out", "full.jsonl"],
    ["evaluate", "--rotation", "PIPE"],
    ["evaluate", "--corpus", "PIPE"],
    ["evaluate", "--calibration", "PIPE"],
    ["capture", "--out", "PIPE.csv"],
    ["recipe", "--out", "PIPE"],
    ["report", "--out", "PIPE"],
    ["refine", "--out", "PIPE.safetensors"],
]


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices as POSIX has them")
@pytest.mark.parametrize("words", ODD, ids=" ".join)
def test_what_is_no_regular_file_is_neither_read_nor_written(bench, tmp_path, words):
    for name in ("PIPE", "PIPE.jsonl", "PIPE.csv", "PIPE.safetensors"):
        os.mkfifo(name)
    Path("full.jsonl").symlink_to("/dev/full")
    Path("FOLDER").mkdir()
    shown = invoke(words[0], *([] if "--recipe" in words else bench), *words[1:], code=1).stderr
    assert (
        shown.startswith("Error: ") and shown.count("\n") == 1 and words[2] in shown and "must be " in shown
    )
    assert {path.name for path in (tmp_path / "cache" / "store").glob("*")} <= {"shape"}, "before any work"


@pytest.mark.skipif(os.name != "posix", reason="elsewhere no folder goes that is in use")
@pytest.mark.parametrize("words", [["doctor"], ["cache", "list"]])
def test_a_current_folder_that_is_gone_is_one_line(tmp_path, words):
    (gone := tmp_path / "gone").mkdir()
    script = "import os, sys; from dfrot_lab.cli.app import app; os.rmdir(os.getcwd()); app(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=gone, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "Error: [Errno 2] the current folder is not there any more: cd to one that is"
    )


def test_a_recipe_as_long_as_a_book_is_not_read(tmp_path):
    (tmp_path / "r.yaml").touch()
    os.truncate(tmp_path / "r.yaml", 1 << 33)
    shown = invoke("evaluate", "--recipe", str(tmp_path / "r.yaml"), code=1).stderr
    assert "a recipe must have at most 1,048,576 bytes; got " in shown


def test_an_out_that_holds_something_else_is_refused_before_work_and_stays(bench, tmp_path):
    (tmp_path / "pretty.jsonl").write_text(text := '{\n "mine": 1\n}')
    shown = invoke("evaluate", *bench, "--windows", "1", "--out", "pretty.jsonl", code=1).stderr
    assert "pretty.jsonl line 1 must be one JSON object" in shown and shown.count("\n") == 1
    assert (tmp_path / "pretty.jsonl").read_text() == text and not (tmp_path / "cache" / "store").exists()


@pytest.mark.parametrize("kind", ["size", "skewed", "garbage"])
def test_a_wrong_rotation_file_is_refused(bench, tmp_path, kind):
    path = tmp_path / "R.safetensors"
    if kind == "garbage":
        path.write_bytes(b"not a rotation")
    elif kind == "size":
        rotation_files.save(rotations.make(RotationSpec(kind="RH"), 32), path, RotationSpec(kind="RH"))
    else:
        from safetensors.torch import save_file

        save_file({"R1": rotations.make(RotationSpec(kind="RH"), 64) * 1.01}, path)
    shown = invoke("evaluate", *bench, "--rotation", str(path), "--bits", "16-4-16", "--windows", "1", code=1)
    expected = {"size": "64", "skewed": "orthogonal", "garbage": "R.safetensors"}[kind]
    assert expected in shown.stderr


def test_an_unwritable_cache_is_named(bench, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "file" / "cache"))
    shown = invoke("capture", *bench, "--tokens", "10", code=1)
    assert "DFROT_LAB_CACHE" in shown.stderr


def test_models_and_fetch_describe(bench):
    about = json.loads(invoke("models", *bench[:2], "--json").stdout)
    assert about["channels"] == 64
    assert "GPT2LMHeadModel" in about["refused"]
    assert "calibration" in invoke("fetch", *bench).stdout


def test_doctor_says_what_is_here_and_what_is_missing(bench, tmp_path):
    shown = json.loads(invoke("doctor", *bench, "--json").stdout)
    assert shown["missing"] == "nothing"
    assert shown["cache"]["folder"] == str(tmp_path / "cache")
    asked = "not fetched yet (about 478 MB; dfrot-lab fetch --model qwen2.5-coder-0.5b)"
    assert shown["cache"]["qwen2.5-coder-0.5b download"] == asked
    broken = invoke("doctor", "--model", "nowhere", "--json", code=1)
    assert json.loads(broken.stdout)["missing"].startswith("ModelSpec.source must be ")
    (tmp_path / "empty.txt").write_text(" \n")
    silent = invoke("doctor", *bench[:2], "--corpus", str(tmp_path / "empty.txt"), "--json", code=1)
    assert json.loads(silent.stdout)["missing"].startswith("CorpusSpec.name must be a file with a text in it")


def test_experiments_are_listed_with_what_they_reproduce():
    listed = json.loads(invoke("experiment", "--json").stdout)["rows"]
    assert [row["name"] for row in listed] == list(EXPERIMENTS)
    assert all(row["reproduces"] and row["question"].endswith("?") for row in listed)
    assert "keep-out" in invoke("experiment").stdout


def test_an_experiment_writes_its_table_and_figure_where_told(bench, tmp_path):
    shown = json.loads(
        invoke(
            "experiment", "clip-sweep", *bench, "--quick", "--json", "--out", str(tmp_path / "here")
        ).stdout
    )
    here, name = tmp_path / "here", "clip-sweep-text-model-quick"
    pictures = {f"clip-sweep.{ending}" for ending in ("png", "svg", "json")}
    tables_and_more = {f"{name}.jsonl", f"{name}.recipes.yaml", f"{name}.setting.yaml", "text"}
    assert {path.name for path in here.iterdir()} == tables_and_more
    assert {path.name for path in (here / "text").iterdir()} == pictures
    kept = [json.loads(line) for line in (here / f"{name}.jsonl").read_text().splitlines()]
    assert kept == shown["rows"]
    recipes = yaml.safe_load((here / f"{name}.recipes.yaml").read_text())
    assert {row["recipe"] for row in kept} == set(recipes)
    assert all(Recipe.of(plain).key == key for key, plain in recipes.items())
    assert {row["clip"] for row in kept} == {0.6, 1.0}, "the quick profile has the first and the last"
    assert json.loads((here / "text" / "clip-sweep.json").read_text())["quick"]


def test_an_unknown_experiment_is_one_line_that_lists_them(bench, tmp_path):
    result = invoke("experiment", "keepout", *bench, code=1)
    assert result.stderr.strip().startswith(
        "Error: no experiment 'keepout'; there are main, token-errors-3d,"
    )
    assert "keep-out" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_runs_folder_is_ignored_by_git():
    assert "runs/" in (Path(__file__).parents[1] / ".gitignore").read_text()


def test_a_model_with_a_short_context_is_used_with_a_shorter_window(bench, tmp_path):
    save_tiny(tmp_path / "short", context=64)
    short = ["--model", str(tmp_path / "short"), *bench[2:]]
    said = invoke("run", *short, code=1).output
    assert "window must be at most the model's context of 64 tokens; got 2048" in said
    assert not list((tmp_path / "cache").glob("store/capture/*")), "before any work"
    options = ("--rotation", "DFRot", "--bits", "4-4-4", "--windows", "2", "--window", "64", "--json")
    row = json.loads(invoke("evaluate", *short, *options).stdout)
    assert (row["windows"], row["window"], row["calibration"]) == (
        2,
        64,
        "text.txt (calibration), 128 x 64",
    ) or row
    assert "window=64" not in row["parameters"]


@pytest.mark.parametrize(
    ("words", "option", "words_of_text", "rule"),
    [
        ("run", "--calibration", 400, r"own\.txt .* at least one window of 2048 tokens; got 2000"),
        ("run --windows 2", "--corpus", 1000, r"at most 1: .*own\.txt .* has 2500 tokens, 1 whole windows"),
        (
            "evaluate --bits 4-16-16",
            "--calibration",
            600,
            r"at most 1: .*own\.txt .* has 3000 tokens, 1 whole windows",
        ),
    ],
    ids=["captures", "scores", "weights"],
)
def test_a_text_too_short_is_refused_before_any_work(bench, tmp_path, words, option, words_of_text, rule):
    """A byte is a token; half of the text that is scored is another half's to calibrate on."""
    own = tmp_path / "own.txt"
    own.write_text("some\n" * words_of_text)
    said = invoke(*words.split(), *bench, option, str(own), code=1).stderr
    assert re.search(rule, said), said
    done = (tmp_path / "cache" / "store").glob(f"*/{DONE}")
    assert {path.parents[1].name for path in done} <= {"shape"}
