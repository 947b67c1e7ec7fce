"""The files around the package say what is true: pins agree, the README's commands exist, its tables are the
measured ones.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dfrot_lab.cli.app import app
from dfrot_lab.disk import row_files
from dfrot_lab.maths import tables
from dfrot_lab.recipe import registry
from dfrot_lab.recipe.keys import FORMULAS
from dfrot_lab.recipe.specs import MASSIVE_RULES, ModelSpec
from dfrot_lab.show import gallery
from dfrot_lab.study import experiments, leaderboard
from dfrot_lab.study.experiments import EXPERIMENTS
from dfrot_lab.study.setting import Setting

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_exactly(name):
    found = pins(name)
    assert found
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in found.values()), found


def test_all_doors_lead_to_the_same_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    conda = (ROOT / "environment.yml").read_text()
    assert "- -r requirements.txt" in conda
    assert "- -e ." in conda
    assert conda.index("\n  - pip\n") < conda.index("- pip:"), "conda needs pip itself before the pip block"
    make = (ROOT / "Makefile").read_text()
    assert all(f"-r locks/{name}.txt" in make for name in ("build", "cpu", "run", "cuda", "dev"))
    assert "-r requirements" not in make
    minor = re.search(r"python=(\d\.\d+)", conda)[1]
    assert project["project"]["requires-python"] == f">={minor}"


def test_every_pin_is_locked_with_the_hashes_of_its_files_and_no_index_is_named():
    """A pin that moved without `make lock` is found here; what pip may install is compared to the byte."""
    entries: dict[str, str] = {}
    for path in sorted((ROOT / "locks").glob("*.txt")):
        text = path.read_text()
        assert "://" not in text and not re.search(r"(?m)^ *-(?!-hash=sha256:[0-9a-f]{64}( \\)?$)", text), (
            path
        )
        for block in re.split(r"(?m)^(?=[a-z0-9])", text)[1:]:
            name, version = re.match(r"([a-z0-9-]+)==([\w.+]+)", block).groups()
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), f"{path.name}: {name} has no hash"
            entries[f"{name}=={version}"] = path.stem
    for name, part in (("requirements.txt", "run"), ("requirements-dev.txt", "dev")):
        for package, version in pins(name).items():
            assert entries.get(f"{package}=={version}") == part, f"{package}=={version}: run `make lock`"
    assert entries[f"torch=={pins('requirements.txt')['torch']}+cpu"] == "cpu"
    assert len(entries) > 150 and all(
        each.startswith("setuptools") for each in entries if entries[each] == "build"
    )


def test_pip_refuses_a_file_with_another_hash(tmp_path):
    """A wheel made here, once with its own hash and once with another's: no index is asked."""
    import hashlib
    import zipfile

    wheel, info = tmp_path / "tiny_thing-1.0-py3-none-any.whl", "tiny_thing-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    options = re.search(r"^LOCKED := \$\(PIP\) (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    own = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for digest, code in ((own, 0), (own[::-1], 1)):
        (tmp_path / "lock.txt").write_text(f"tiny-thing==1.0 --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(tmp_path)]
        command += [*options, "--target", str(tmp_path / digest), "-r", str(tmp_path / "lock.txt")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr


def test_every_locked_package_has_its_licence_on_the_page():
    run = "import licences as l, json; print(json.dumps([l.locked(), l.PAGE.read_text(), l.NOT_HERE, {n: l.licence(n, v) for n, v, _ in l.locked()}]))"
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=ROOT / "tools", capture_output=True, text=True, check=True
    )
    locked, page, not_here, here = json.loads(done.stdout)
    rows = [
        line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| [a-z0-9-]+ \| \d", line)
    ]
    assert [row[:3] for row in rows] == locked, "docs/licences.md is not that of locks/: run `make lock`"
    for name, _, why, said in rows:
        assert here[name] in (said, not_here) or said == not_here, (
            f"{name} says {here[name]}, the page {said}"
        )
        assert said != "not said" and (
            said != not_here or why == "with CUDA" or name not in pins("requirements.txt")
        )
    assert sum(said == not_here for *_, said in rows) < 40


def test_what_is_installed_fits_together():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_installed_versions_are_the_pinned_ones():
    from importlib import metadata

    wrong = {
        n: (v, metadata.version(n))
        for n, v in pins("requirements.txt").items()
        if metadata.version(n).split("+")[0] != v
    }
    assert not wrong, f"installed versions differ from requirements.txt: {wrong}"


def test_ci_runs_the_readmes_test_command():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
    assert "make test" in README


def test_every_dfrot_lab_command_in_the_docs_exists():
    commands = set(re.findall(r"dfrot-lab ([a-z]+)", README + (ROOT / "Makefile").read_text()))
    assert {"run", "figures", "doctor"} <= commands
    for command in commands:
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0, f"dfrot-lab {command} is in the docs but not in the program"


def test_every_option_in_the_readme_exists():
    for line in re.findall(r"^(?:\s*)dfrot-lab ([a-z]+) (.*)$", README, re.M):
        command, rest = line
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in shown, f"dfrot-lab {command} has no {option}"


def test_every_make_verb_in_the_readme_exists():
    verbs = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z]+)`", README)) | set(re.findall(r"^make ([a-z]+)", README, re.M))
    assert {"run", "test"} <= named
    assert named <= verbs


def test_readmes_tree_is_the_tree():
    tree = re.search(r"```text\n(.*?)```", README, re.S)[1]
    named = [line.split()[0] for line in tree.splitlines() if line.strip()]
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"the README's tree names what is not there: {missing}"


def test_readmes_files_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), (
            f"README links to {target}, which is not there"
        )


MAIN = sorted(path.stem for path in (ROOT / "data" / "results").glob("main-wiki*.jsonl"))


@pytest.mark.parametrize("name", MAIN)
def test_readmes_tables_are_the_committed_results(name):
    table = row_files.load(ROOT / "data" / "results" / f"{name}.jsonl")
    assert len(table) > 20
    shown = tables.markdown(tables.comparison(table))
    assert shown in (ROOT / "data" / "results" / f"{name}.md").read_text()
    assert shown in README, f"README's table is not that of {name}.jsonl: copy data/results/{name}.md"


def test_committed_results_have_provenance():
    files = sorted((ROOT / "data" / "results").glob("main-wiki*.jsonl"))
    assert files
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert all(tuple(row) == tables.COLUMNS for row in rows)
        assert all(row["commit"] and row["recipe"] and row["windows"] and row["device"] for row in rows)


def test_committed_experiments_have_provenance_and_a_figure():
    for file in [path for path in COMMITTED if not path.name.startswith("main-w")]:
        name = experiment_of(file)
        corpus = file.stem.removeprefix(f"{name}-")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        scored = [row for row in rows if row.get("recipe")]
        assert all(row["commit"] and row["recipe"] and row["windows"] and row["device"] for row in scored)
        about = json.loads((ROOT / "figures" / corpus / f"{name}.json").read_text())
        assert about["rows"] == len(rows), f"{file.name} and its figure are not of the same table"
        assert set(about["recipes"]) == {row["recipe"] for row in rows if row.get("recipe")}
        assert not about["quick"]


BOARD = ("group", "option", "fit, s", leaderboard.PEAK, leaderboard.ONLINE_OPS, "needs", *leaderboard.COLUMNS)
OWN = {
    "main": (),
    "gamma-sweep": ("init", "line"),
    "keep-out": (),
    "gain": (),
    "offset": (),
    "free-options": ("option",),
    "better-weights": ("option",),
    "kv-caches": ("cache", "option"),
    "static-activations": ("acts",),
    "prefix": ("acts", "prefix"),
    "block-floats": ("format",),
    **dict.fromkeys(leaderboard.EXPERIMENTS, BOARD),
    "transfer": ("fitted",),
    "main-table": ("extra_minutes",),
    "calibration": ("varied", "level"),
    "clip-sweep": ("clip", "scored_on"),
    "symmetric-or-not": ("refined_with", "sign_flips", "tested_with"),
    "variants": ("variant",),
    "massive-activations": ("layer",),
    "intervene": ("chosen", "k"),
}
"""Columns an experiment of evaluations has beside those of every results row."""
APART = ("bench", "evaluations")
COMMITTED = [path for path in sorted((ROOT / "data" / "results").glob("*.jsonl")) if path.stem not in APART]


def experiment_of(path: Path) -> str:
    """The experiment whose rows a file holds; its name ends in the text's."""
    return next(name for name in (*EXPERIMENTS, "compare") if path.stem.startswith(f"{name}-wiki"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_row_has_every_column_and_those_of_its_experiment(path):
    name, rows = experiment_of(path), [json.loads(line) for line in path.read_text().splitlines()]
    assert len({tuple(row) for row in rows}) == 1
    if name not in OWN:
        others = ("zero-shot", "token-orders", "compare", "measuring", "spike-writers", "attention-sink")
        assert name in others, "a table of something else than evaluations"
        return
    assert {*rows[0]} - {*tables.COLUMNS} == {*OWN[name]} and [c for c in rows[0] if c not in OWN[name]] == [
        *tables.COLUMNS
    ]
    for row in (row for row in rows if row["recipe"]):
        assert row["formulas"] == FORMULAS and row["versions"]["torch"] and row["family"] and row["method"]
        assert row["bits"] == f"{row['w_bits']}-{row['a_bits']}-{row['kv_bits']}"
        assert row["weight_quantizer"].startswith("none" if row["w_bits"] == 16 else f"sym{row['w_bits']}")
        assert (row["keep_out_rule"] is not None) == row["keep_out"]
        spec = registry.load(registry.METHODS, row["method"]).SPEC
        assert row["rule"] in MASSIVE_RULES if "rule" in spec.model_fields else row["rule"] is None
        assert (row["calibration"] is not None) == (row["weights"] not in (None, "rtn"))
    table = row_files.load(path)
    assert all(table[name].dtype == "Int64" for name in tables.WHOLE)


@pytest.mark.parametrize(
    "path", [p for p in COMMITTED if experiment_of(p) not in ("main", "compare")], ids=lambda path: path.stem
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_committed_table_is_read_and_not_computed_on_any_device(path, device, monkeypatch):
    """The default setting's question is answered by it; another question is not."""

    def computed(name: str, *_: object) -> None:
        raise LookupError(name)

    monkeypatch.setattr(experiments, "run", computed)
    name = experiment_of(path)
    setting = Setting(corpus="wikitext2", model=ModelSpec(device=device))
    assert len(gallery.table(name, setting, ROOT)) == len(path.read_text().splitlines())
    for change in ({"seed": 1}, {"windows": 7}, {"model": ModelSpec(dtype="float64", device=device)}):
        with pytest.raises(LookupError, match=name):
            gallery.table(name, setting.with_(**change), ROOT)


def test_the_performance_page_shows_the_committed_benchmark():
    run = [
        sys.executable,
        "-c",
        "import page; print(page.page(page.PAGE.read_text(), page.load()) == page.PAGE.read_text())",
    ]
    done = subprocess.run(run, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True", (
        "docs/performance.md is not that of data/results/bench.jsonl: run python benchmarks/page.py"
    )


def test_every_benchmark_runs_with_make_bench_or_says_it_does_not():
    named = set(re.search(r"^BENCHMARKS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts - named == {"common", "page", "jitter", "large_model", "workers"}
    rows = [json.loads(line) for line in (ROOT / "data" / "results" / "bench.jsonl").read_text().splitlines()]
    assert {"refinement", "evaluation", "Hadamard", "GPTQ", "capture", "growth", "explorers"} == {
        row["stage"] for row in rows
    }


def test_figures_have_what_they_were_made_from():
    pictures = sorted((ROOT / "figures").rglob("*.png"))
    assert pictures
    for picture in pictures:
        about = json.loads(picture.with_suffix(".json").read_text())
        assert about["figure"] == picture.stem
        assert about["versions"]["torch"]
        assert picture.with_suffix(".svg").exists()


def test_licence_is_apache_2():
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
