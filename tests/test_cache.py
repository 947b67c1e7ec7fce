"""`dfrot-lab cache`: the store can be seen, checked and cleared, and nothing in use or dear goes unasked."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dfrot_lab.cli.app import app
from dfrot_lab.cli.cache import DEAR, KEEP_DAYS
from dfrot_lab.disk import downloads, upkeep
from dfrot_lab.disk.artefacts import Store, Writer
from dfrot_lab.disk.atomic import cache_dir
from dfrot_lab.recipe.keys import model_key
from dfrot_lab.recipe.specs import DEFAULT_MODEL

posix = pytest.mark.skipif(os.name != "posix", reason="kills and rights as POSIX has them")
PACKAGED = model_key(downloads.MODELS[DEFAULT_MODEL].sha256[:32], "float32", "cpu")
OWN = "0123456789abcdef0123456789abcdef"


def make(writer: Writer) -> None:
    writer.save_tensors("x", {"x": torch.arange(1000.0)})
    writer.save_json("table", [1, 2])


def dear(writer: Writer) -> None:
    writer._start -= 2 * DEAR
    make(writer)


def stopped(writer: Writer) -> None:
    make(writer)
    raise KeyboardInterrupt


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A capture of the packaged model, a dear evaluation of another one, what a stopped run left."""
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    found = Store()
    found.get_or_make("capture", {"model": PACKAGED, "tokens": 8}, make)

    def evaluation(writer: Writer) -> None:
        dear(writer)
        writer.save_json("recipe", {"model": {"source": "/far/away/tiny"}})

    found.get_or_make("evaluation", {"recipe": {"rotation": {"seed": 0}, "model": OWN}}, evaluation)
    with pytest.raises(KeyboardInterrupt):
        found.get_or_make("capture", {"model": OWN, "tokens": 9}, stopped)
    return found


def said(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["cache", *words])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def rows(*words: str) -> dict[tuple[str, str, str], dict[str, object]]:
    found = json.loads(said(*words, "--json"))["rows"]
    return {(row["kind"], row["model"], row["state"]): row for row in found}


def states(store: Store) -> dict[str, int]:
    found = [f"{entry.kind} {entry.state}" for entry in upkeep.entries(store.root)]
    return {name: found.count(name) for name in found}


def age(folder: Path, days: float) -> None:
    """Have a folder without a manifest look as old as that."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        os.utime(path, (time.time() - days * upkeep.DAY,) * 2)


def test_list_names_models_and_counts_bytes(store: Store) -> None:
    found = rows("list")
    assert set(found) == {
        ("capture", DEFAULT_MODEL, "artefact"),
        ("capture", "tiny", "partial"),
        ("evaluation", "tiny", "artefact"),
    }
    size = sum(p.stat().st_size for p in store.root.glob("evaluation/*/*"))
    assert found["evaluation", "tiny", "artefact"]["MB"] == round(size / 1e6, 3)
    assert "/far/away" not in said("list")
    keys = {row["key"] for row in json.loads(said("list", "--keys", "--json"))["rows"]}
    assert len(keys) == 3 and {a.key for a in store.list()} <= keys
    assert "2 min" in said("list"), "what the evaluation took"


def test_an_empty_store_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "new"))
    assert "nothing" in said("list") and json.loads(said("verify", "--json")) == {"checked": 0, "damaged": 0}
    assert "--kind must be one of nothing: it is empty; got 'capture'" in said(
        "prune", "--kind", "capture", code=1
    )


def test_show_takes_the_start_of_a_key(store: Store) -> None:
    artefact = store.list()[0]
    shown = json.loads(said("show", artefact.key[:10], "--json"))
    assert shown["key"] == artefact.key and shown["model"] == DEFAULT_MODEL and shown["kind"] == "capture"
    assert shown["inputs"] == artefact.manifest["inputs"] and shown["files"] == artefact.manifest["files"]
    assert shown["created"] == artefact.manifest["created"] and "commit" in shown
    for wrong in ("ffffffff", ""):
        assert f"KEY must be the start of one key that `cache list --keys` shows; got {wrong!r}" in said(
            "show", wrong, code=1
        )


def flip(path: Path) -> None:
    """Change a bit and keep size and time: what only reading every byte finds."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "said_of_it"),
    [
        (lambda folder: flip(folder / "x.safetensors"), "x.safetensors has a wrong checksum"),
        (lambda folder: (folder / "table.json").unlink(), "table.json is missing"),
        (lambda folder: (folder / "table.json").write_text("[]"), "table.json has 2 bytes"),
        (lambda folder: flip(folder / "manifest.json"), "manifest.json is missing or damaged"),
    ],
)
def test_verify_finds_damage_and_sets_aside_only_when_told(store: Store, damage, said_of_it: str) -> None:
    assert json.loads(said("verify", "--json")) == {"checked": 2, "damaged": 0}
    folder = store.list()[0].path
    damage(folder)
    assert said_of_it in said("verify", code=1) and folder.is_dir()
    assert f"{said_of_it}, set aside" in said("verify", "--repair", code=1)
    assert not folder.exists() and folder.with_name(f"{folder.name}.corrupt-1").is_dir()
    assert "checked: 1" in said("verify")
    assert store.get_or_make("capture", {"model": PACKAGED, "tokens": 8}, make).names == ["table", "x"]


def test_prune_takes_the_dead_and_leaves_the_rest(store: Store) -> None:
    folder = store.list()[0].path
    folder.rename(f"{folder}.corrupt-1")
    strange = [folder.parent / "z" / "x", folder.with_name("y" * 32) / "x", folder.with_name("notes.lock")]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_text("not ours")
    before = states(store)
    assert before["capture lock"] == 2 and before["capture set aside"] == 1
    assert "removed: nothing: a dry run" in said("prune", "--dry-run") and states(store) == before
    assert "partial artefacts kept, to go on from: 1" in said("prune")
    assert states(store) == {"capture partial": 1, "evaluation artefact": 1}
    partial = next(store.root.glob("capture/*.partial"))
    age(partial, KEEP_DAYS - 1)
    said("prune")
    assert partial.is_dir()
    age(partial, KEEP_DAYS + 1)
    assert "see --dry-run" in said("prune", code=1), "nobody knows what it took"
    said("prune", "--yes")
    assert states(store) == {"evaluation artefact": 1}
    assert all(path.read_text() == "not ours" for path in strange)


def test_what_is_dear_needs_a_yes(store: Store) -> None:
    before = states(store)
    assert "--yes must be said to remove 3 artefacts, which would take about 2 min to make again" in said(
        "prune", "--older", "0", code=1
    )
    assert states(store) == before
    said("prune", "--older", "1", "--yes")
    assert states(store) == {"capture artefact": 1, "capture partial": 1, "evaluation artefact": 1}
    said("prune", "--older", "0", "--keep-results")
    assert states(store) == {"evaluation artefact": 1}
    said("prune", "--kind", "evaluation", "--yes")
    assert not states(store)


def test_a_partial_that_was_pruned_is_begun_again_and_a_kept_one_goes_on(store: Store) -> None:
    def resumed(writer: Writer) -> None:
        assert writer.names == ["table", "x"]

    said("prune", "--kind", "evaluation", "--yes")
    assert store.get_or_make("capture", {"model": OWN, "tokens": 9}, resumed).names == ["table", "x"]


@posix
def test_prune_of_a_link_removes_the_link_and_says_so(store: Store, tmp_path: Path) -> None:
    folder = store.list()[0].path
    folder.rename(moved := tmp_path / "moved")
    folder.symlink_to(moved)
    old = folder.with_name(f"{folder.name}.corrupt-0")
    old.symlink_to(moved)  # of a prune that failed at it
    held = {path.name: path.read_bytes() for path in moved.iterdir()}
    assert json.loads(said("verify", "--json"))["checked"] == 2
    out = said("prune", "--kind", "capture", "--yes")
    assert "artefact, a link" in out and "links among them, whose folders stay where they are: 2" in out
    assert not folder.is_symlink() and not old.is_symlink()
    assert {path.name: path.read_bytes() for path in moved.iterdir()} == held
    said("prune")


@posix
def test_a_link_to_nothing_is_damage_that_all_tools_show(store: Store) -> None:
    folder = next(found.path for found in store.list() if found.kind == "evaluation")
    (folder / "table.json").unlink()
    (folder / "table.json").symlink_to("nowhere")
    assert "table.json is missing" in said("verify", code=1) and "evaluation" in said("list")
    assert json.loads(said("show", folder.name, "--json"))["kind"] == "evaluation"
    folder.rename(folder.with_name("moved"))
    folder.symlink_to("nothing")
    assert "manifest.json is missing" in said("verify", code=1)
    assert ("evaluation", "of no model", "artefact, damaged, a link") in rows("list")
    assert "set aside" in said("verify", "--repair", code=1)
    said("prune")
    assert not folder.parent.joinpath(f"{folder.name}.corrupt-1").is_symlink()


@pytest.mark.parametrize(
    "text", ["[]", '{"model": "x"}', '{"model": {"source": 5}}', '{"spec": "x"}', "5", "[" * 100_000, "{"]
)
@pytest.mark.parametrize("name", ["recipe", "about"])
def test_a_damaged_recipe_costs_a_name_alone(store: Store, name: str, text: str) -> None:
    kind = {"recipe": "evaluation", "about": "capture"}[name]
    store.get_or_make(kind, {"model": "e" * 32}, lambda writer: writer.save_json(name, {"model": {}}))
    for path in store.root.glob(f"{kind}/*/{name}.json"):
        path.write_text(text)
    assert (kind, "e" * 12, "artefact") in rows("list")
    assert "removed: nothing: a dry run" in said("prune", "--dry-run")


@posix
def test_what_cannot_be_removed_stays_and_the_rest_goes(store: Store) -> None:
    folder = store.list()[0].path
    folder.rename(f"{folder}.corrupt-1")
    lock = next(store.root.glob("evaluation/*.lock"))
    lock.unlink()
    lock.mkdir()
    assert "stays: " in said("prune") and lock.is_dir()
    assert states(store) == {"capture partial": 1, "evaluation artefact": 1, "evaluation lock": 1}


HOLD = """
import sys, time
from pathlib import Path
from dfrot_lab.disk.artefacts import Store

def make(writer):
    writer.save_json("first", 1)
    print("making", flush=True)
    sys.stdin.readline()
    writer.save_json("second", 2)

print(Store(Path(sys.argv[1])).get_or_make("capture", {"held": 1}, make).names, flush=True)
"""


@posix
def test_what_a_process_is_making_stays_until_it_is_killed(store: Store) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    maker, victim = (
        subprocess.Popen([sys.executable, "-c", HOLD.replace("held", name), str(store.root)], **pipes)
        for name in ("held", "killed")
    )
    for process in (maker, victim):
        assert process.stdout.readline() == "making\n"
    out = said("prune", "--older", "0", "--yes")
    assert "partial, in use: stays" in out
    assert states(store) == {"capture partial": 2, "capture lock": 2}
    victim.kill()
    victim.communicate()
    said("prune", "--older", "0", "--yes")
    assert states(store) == {"capture partial": 1, "capture lock": 1}
    assert maker.communicate("go\n", timeout=60)[0] == "['first', 'second']\n" and maker.returncode == 0
    assert Store().open("capture", {"held": 1}).json("second") == 2


RACE = """
import sys
from pathlib import Path
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.disk import upkeep

root, what = Path(sys.argv[1]), sys.argv[2]
for n in range(60):
    if what == "prune":
        list(upkeep.remove(upkeep.entries(root)))
    else:
        artefact = Store(root).get_or_make("k", {"n": n % 3}, lambda writer: writer.save_json("n", n % 3))
        assert artefact.manifest["inputs"] == {"n": n % 3}
"""


@posix
def test_makers_and_prunes_at_once(tmp_path: Path) -> None:
    """Locks are unlinked while others wait for them: nobody makes what another makes, nobody fails."""
    run = [sys.executable, "-c", RACE, str(tmp_path)]
    both = [
        subprocess.Popen([*run, what], stderr=subprocess.PIPE, text=True)
        for what in ("make", "make", "prune")
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]  # all end before one is judged
    assert [process.returncode for process in both] == [0, 0, 0], errors


def test_the_cache_folder_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir().stat().st_mode & 0o777 == 0o700 or os.name != "posix"
    (tmp_path / "a" / "b").chmod(0o755)
    assert cache_dir().stat().st_mode & 0o777 == 0o755 or os.name != "posix", "who opened it meant it"
