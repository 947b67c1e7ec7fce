"""The store: what is asked for twice is computed once, and what a kill, a bad disk or a full one leaves
behind is never used.
"""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dfrot_lab.disk import artefacts as store_module, atomic
from dfrot_lab.disk.artefacts import Artefact, CorruptArtefact, Store, Writer
from dfrot_lab.disk.atomic import cache_dir
from dfrot_lab.recipe.base import content_key
from dfrot_lab.recipe.specs import CaptureSpec

INPUTS = {"spec": "a", "tokens": 8}
KEY = content_key({"kind": "capture", "formulas": store_module.FORMULAS, "inputs": INPUTS})

posix = pytest.mark.skipif(os.name != "posix", reason="kills and limits as POSIX has them")


def make(writer: Writer) -> None:
    writer.save_tensors("layers.0.input_norm", {"x": torch.arange(1000.0).reshape(10, 100)})
    writer.save_json("table", [1, 2.5, "three", None])
    writer.note["rows"] = 10


def never(writer: Writer) -> None:
    raise AssertionError("make was called although the artefact is stored")


def flip_a_bit(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def start(script: str, *args: object, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


# ---- round trip
# -------------------------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    made = Store(tmp_path).get_or_make("capture", INPUTS, make)
    opened = Store(tmp_path).open("capture", INPUTS)
    assert opened is not None
    for artefact in (made, opened):
        assert artefact.path == tmp_path / "capture" / KEY
        assert (artefact.kind, artefact.key) == ("capture", KEY)
        assert artefact.names == ["layers.0.input_norm", "table"]
        assert torch.equal(
            artefact.tensors("layers.0.input_norm")["x"], torch.arange(1000.0).reshape(10, 100)
        )
        assert artefact.json("table") == [1, 2.5, "three", None]
    assert sorted(p.name for p in made.path.iterdir()) == [
        "layers.0.input_norm.safetensors",
        "manifest.json",
        "table.json",
    ]
    assert not made.path.with_name(f"{KEY}.partial").exists()


def test_manifest_says_what_made_it(tmp_path: Path) -> None:
    manifest = Store(tmp_path).get_or_make("capture", INPUTS, make).manifest
    assert manifest["inputs"] == INPUTS
    assert manifest["note"] == {"rows": 10}
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["versions"]) == {"python", "torch", "transformers", "dfrot_lab"}
    assert (
        manifest["files"]["table.json"]["bytes"] == (tmp_path / "capture" / KEY / "table.json").stat().st_size
    )
    assert len(manifest["files"]["table.json"]["xxh3_128"]) == 32
    assert manifest["created"].endswith("+00:00")
    assert manifest["seconds"] >= 0


def test_same_inputs_are_made_once(tmp_path: Path) -> None:
    first = Store(tmp_path).get_or_make("capture", INPUTS, make)
    written = (first.path / "manifest.json").stat().st_mtime_ns
    again = Store(tmp_path).get_or_make("capture", dict(reversed(INPUTS.items())), never)
    assert again.path == first.path
    assert (first.path / "manifest.json").stat().st_mtime_ns == written


def test_other_inputs_or_another_kind_are_another_artefact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    paths = {
        store.get_or_make(kind, inputs, make).path
        for kind in ("capture", "refine")
        for inputs in (INPUTS, {**INPUTS, "tokens": 9})
    }
    assert len(paths) == 4
    assert [a.path for a in store.list()] == sorted(paths)


def test_a_spec_is_an_input_by_its_dict_and_nothing_is_keyed_by_its_repr(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artefact = store.get_or_make(
        "capture", {"spec": CaptureSpec().to_dict(), "layers": (0, 1), "by": {10: "a", 9: "b"}}, make
    )
    assert (
        store.open("capture", {"spec": CaptureSpec().to_dict(), "layers": [0, 1], "by": {10: "a", 9: "b"}})
        is not None
    )
    assert artefact.manifest["inputs"]["layers"] == [0, 1]
    with pytest.raises(TypeError, match="CaptureSpec is not JSON serializable"):
        store.open("capture", {"spec": CaptureSpec()})


def test_absent_is_none_and_leaves_nothing(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").open("capture", INPUTS) is None
    assert Store(tmp_path / "none").list() == []
    assert not (tmp_path / "none").exists()


def test_unusual_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": base.T,
        "same": base,
        "again": base,
        "row": base[1],
        "grad": torch.ones(2, requires_grad=True),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
        "half": base.to(torch.bfloat16),
        "mask": base > 3,
    }
    loaded = Store(tmp_path).get_or_make("t", INPUTS, lambda w: w.save_tensors("all", tensors)).tensors("all")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_tensor_changed_in_place_leaves_the_file_alone(tmp_path: Path) -> None:
    artefact = Store(tmp_path).get_or_make("capture", INPUTS, make)
    artefact.tensors("layers.0.input_norm")["x"].zero_()
    fresh = Store(tmp_path).get_or_make("capture", INPUTS, never)
    assert fresh.tensors("layers.0.input_norm")["x"].sum() == 499500


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_names_and_kinds_are_file_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"name must be letters.*got "):
        Store(tmp_path).get_or_make("k", INPUTS, lambda w: w.save_json(name, 1))
    with pytest.raises(ValueError, match=r"kind must be letters.*got "):
        Store(tmp_path).open(name, INPUTS)


def test_a_name_is_one_file(tmp_path: Path) -> None:
    def twice(writer: Writer) -> None:
        writer.save_json("x", 1)
        writer.save_tensors("x", {"x": torch.ones(1)})

    with pytest.raises(ValueError, match="name must be free; 'x' is taken"):
        Store(tmp_path).get_or_make("k", INPUTS, twice)
    with pytest.raises(ValueError, match="name must be free; 'manifest' is taken"):
        Store(tmp_path).get_or_make("k2", INPUTS, lambda w: w.save_json("manifest", 1))


def test_an_unknown_name_is_a_key_error_that_lists_the_names(tmp_path: Path) -> None:
    artefact = Store(tmp_path).get_or_make("capture", INPUTS, make)
    with pytest.raises(
        KeyError, match=r"R1\.safetensors is not in .*layers\.0\.input_norm\.safetensors, table\.json"
    ):
        artefact.tensors("R1")


def test_a_checkpoint_can_be_saved_again_read_and_dropped(tmp_path: Path) -> None:
    def steps(writer: Writer) -> None:
        for step in range(3):
            writer.save_tensors("state", {"R": torch.full((4,), float(step))})
            assert writer.load_tensors("state")["R"][0] == step
            writer.save_json("step", step)
        assert writer.json("step") == 2
        writer.drop("state")
        writer.drop("no such name")
        assert not writer.has("state")

    artefact = Store(tmp_path).get_or_make("refine", INPUTS, steps)
    assert artefact.names == ["step"]
    assert sorted(p.name for p in artefact.path.iterdir()) == ["manifest.json", "step.json"]


# ---- corrupt artefacts
# ------------------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    os.truncate(folder / "layers.0.input_norm.safetensors", 1000)


def flip(folder: Path) -> None:
    flip_a_bit(folder / "layers.0.input_norm.safetensors")


def remove(folder: Path) -> None:
    (folder / "table.json").unlink()


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 100)


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def flip_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"rows": 10', '"rows": 11'))


def a_folder_for_a_manifest(folder: Path) -> None:
    remove_manifest(folder)
    (folder / "manifest.json").mkdir()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


DAMAGES = {
    truncate: "has 1,000 bytes instead of",
    flip: "has a wrong checksum",
    remove: "table.json is missing",
    cut_manifest: "manifest.json cannot be used",
    empty_manifest: "manifest.json cannot be used",
    flip_manifest: "does not match its checksum",
    remove_manifest: "manifest.json cannot be used",
    a_folder_for_a_manifest: "manifest.json cannot be used",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_set_aside_and_recomputed(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage) -> None:
    store = Store(tmp_path)
    folder = store.get_or_make("capture", INPUTS, make).path
    for n in (1, 2):
        damage(folder)
        with caplog.at_level(logging.WARNING):
            assert store.open("capture", INPUTS) is None
        assert DAMAGES[damage] in caplog.text
        assert f"set aside as {KEY}.corrupt-{n}, it will be recomputed" in caplog.text
        assert (tmp_path / "capture" / f"{KEY}.corrupt-{n}").is_dir()
        again = store.get_or_make("capture", INPUTS, make)
        assert again.tensors("layers.0.input_norm")["x"].sum() == 499500
    assert [a.key for a in store.list()] == [KEY]


@pytest.mark.parametrize("damage", DAMAGES)
def test_get_or_make_never_returns_damage(tmp_path: Path, damage) -> None:
    store = Store(tmp_path)
    damage(store.get_or_make("capture", INPUTS, make).path)
    again = store.get_or_make("capture", INPUTS, make)
    assert again.tensors("layers.0.input_norm")["x"].sum() == 499500
    assert again.json("table") == [1, 2.5, "three", None]


def test_a_flipped_bit_is_found_before_use_and_whole_files_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(atomic, "SETTLED", -(10**12))  # so that young files are remembered too,
    monkeypatch.setattr(atomic, "SMALL", 0)  # and small ones
    reads: list[str] = []
    read = atomic.read
    monkeypatch.setattr(atomic, "read", lambda path, *rest: reads.append(path.name) or read(path, *rest))
    store = Store(tmp_path / "store")
    store.get_or_make("capture", INPUTS, make)
    reads.clear()
    artefact = store.get_or_make("capture", INPUTS, never)
    files = ["layers.0.input_norm.safetensors", "table.json"]
    assert sorted(reads) == files and artefact.json("table") and store.open("capture", INPUTS)
    assert sorted(reads) == files, "opened and read again: nothing had changed"
    flip(artefact.path)
    with pytest.raises(
        CorruptArtefact, match="has a wrong checksum; run the same command again to recompute it"
    ):
        artefact.tensors("layers.0.input_norm")
    assert not artefact.path.exists()
    assert artefact.path.with_name(f"{KEY}.corrupt-1").exists()
    assert store.get_or_make("capture", INPUTS, make).tensors("layers.0.input_norm")["x"].sum() == 499500


def test_a_cache_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    Store(tmp_path / "store").get_or_make("capture", INPUTS, make)
    script = f"""
import os, sys
from pathlib import Path
os.access = lambda path, mode: False
import tempfile
tempfile.TemporaryFile = tempfile.NamedTemporaryFile = None
from dfrot_lab.disk.artefacts import Store
print(Store(Path(sys.argv[1])).get_or_make("capture", {INPUTS!r}, None).json("table")[0])
try:
    Store(Path(sys.argv[1])).get_or_make("capture", {{}}, None)
except OSError as error:
    print(error)
"""
    out = finished(start(script, tmp_path / "store"))
    assert out.startswith("1\n") and f"cannot write to the folder {tmp_path / 'store' / 'capture'}" in out


def test_an_artefact_under_anothers_name_is_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.get_or_make("capture", INPUTS, make)
    other = content_key({"kind": "capture", "formulas": store_module.FORMULAS, "inputs": {"other": 1}})
    shutil.copytree(made.path, made.path.with_name(other))
    assert store.open("capture", {"other": 1}) is None


# ---- resume
# -----------------------------------------------------------------------------------------------------------------------------


def test_an_exception_in_make_keeps_the_finished_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(writer: Writer) -> None:
        writer.note["first"] = 1
        writer.save_tensors("one", {"x": torch.ones(3)})
        raise KeyboardInterrupt

    def resumed(writer: Writer) -> None:
        assert writer.has("one")
        assert not writer.has("two")
        assert writer.load_tensors("one")["x"].sum() == 3
        writer.save_json("two", 2)

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).get_or_make("k", INPUTS, interrupted)
    assert Store(tmp_path).open("k", INPUTS) is None
    assert Store(tmp_path).list() == []
    with caplog.at_level(logging.INFO):
        artefact = Store(tmp_path).get_or_make("k", INPUTS, resumed)
    assert f"resuming k {artefact.key}: 1 files already done" in caplog.text
    assert artefact.names == ["one", "two"]
    assert artefact.manifest["note"] == {"first": 1}


@pytest.mark.parametrize(
    ("damage", "left"),
    [(flip, ["table"]), (truncate, ["table"]), (remove, ["layers.0.input_norm"]), (cut_manifest, [])],
)
def test_a_damaged_partial_folder_is_used_as_far_as_it_is_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage, left: list[str]
) -> None:
    def interrupted(writer: Writer) -> None:
        make(writer)
        raise KeyboardInterrupt

    def resumed(writer: Writer) -> None:
        assert writer.names == left
        assert sorted(p.name for p in writer.path.iterdir() if p.name != "manifest.json") == sorted(
            writer.manifest["files"]
        )
        make(writer)

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).get_or_make("k", INPUTS, interrupted)
    partial = next((tmp_path / "k").glob("*.partial"))
    damage(partial)
    (partial / ".table.json.tmp").write_text("half")
    with caplog.at_level(logging.WARNING):
        artefact = Store(tmp_path).get_or_make("k", INPUTS, resumed)
    assert ("it will be recomputed" if left else "starting afresh") in caplog.text
    assert artefact.tensors("layers.0.input_norm")["x"].sum() == 499500


def precious(folder: Path) -> Path:
    """A folder of the user's own, outside the store."""
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    (folder / "manifest.json").write_text("{}")
    return folder


@posix
@pytest.mark.parametrize("end", ["", ".partial"])
@pytest.mark.parametrize("what", ["a link", "a link to nothing", "a link to a file", "a file", "a pipe"])
def test_what_is_no_folder_in_an_artefact_s_place_is_set_aside_and_nothing_behind_a_link_is_touched(
    tmp_path: Path, end: str, what: str
) -> None:
    own, place = precious(tmp_path / "own"), tmp_path / "store" / "capture" / f"{KEY}{end}"
    before = {path: path.read_text() for path in own.iterdir()}
    place.parent.mkdir(parents=True)
    if what.startswith("a link"):
        place.symlink_to({"a link": own, "a link to a file": own / "thesis.txt"}.get(what, own / "nothing"))
    elif what == "a pipe":
        os.mkfifo(place)
    else:
        place.write_text("precious")
    store = Store(tmp_path / "store")
    made = store.get_or_make("capture", INPUTS, make)
    assert (
        made.path.is_dir() and not made.path.is_symlink() and made.names == ["layers.0.input_norm", "table"]
    )
    assert {path: path.read_text() for path in own.iterdir()} == before
    (aside,) = place.parent.glob("*.corrupt-1")
    assert aside.is_symlink() == what.startswith("a link") and not place.with_name(f"{KEY}.partial").exists()
    assert [found.key for found in store.list()] == [KEY]


def test_a_folder_in_one_being_made_is_refused_by_name_and_nothing_is_removed(tmp_path: Path) -> None:
    (inside := tmp_path / "capture" / f"{KEY}.partial" / "sub").mkdir(parents=True)
    (inside.parent / "a.txt").write_text("precious")
    with pytest.raises(
        ValueError, match=r"\.partial must be .* files alone; got the folder \['sub'\]: take it"
    ):
        Store(tmp_path).get_or_make("capture", INPUTS, make)
    assert inside.is_dir() and (inside.parent / "a.txt").read_text() == "precious"


@posix
def test_a_link_where_a_temporary_file_goes_is_not_written_through(tmp_path: Path) -> None:
    (mine := tmp_path / "mine").write_text("precious")
    (tmp_path / f".x.json.{os.getpid()}.tmp").symlink_to(mine)
    atomic.write_text(tmp_path / "x.json", "new")
    assert mine.read_text() == "precious" and (tmp_path / "x.json").read_text() == "new"


@posix
@pytest.mark.parametrize("what", ["a link", "a pipe"])
def test_a_lock_that_is_no_file_is_refused_at_once(tmp_path: Path, what: str) -> None:
    (mine := tmp_path / "mine").write_text("precious")
    lock = tmp_path / "a.lock"
    lock.symlink_to(mine) if what == "a link" else os.mkfifo(lock)
    with pytest.raises(OSError, match=r"lock file .*a\.lock \(a link .* take that away"), atomic.locked(lock):
        pytest.fail("held")
    assert mine.read_text() == "precious"


@posix
def test_a_pipe_for_a_manifest_is_damage(tmp_path: Path) -> None:
    folder = Store(tmp_path).get_or_make("capture", INPUTS, make).path
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert Store(tmp_path).list() == [] and folder.with_name(f"{KEY}.corrupt-1").is_dir()


# Writes files 0..n-1 and a checkpoint after each; the log says what was begun and what `save` returned from.
WORK = """
import logging, sys, time
from pathlib import Path
import torch
from dfrot_lab.disk.artefacts import Store

root, log, n, pause = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

def say(text):
    with log.open("a") as file:
        file.write(text + chr(10))

def make(writer):
    say(f"resumed {int(writer.load_tensors('state')['step']) if writer.has('state') else -1}")
    for i in range(n):
        if writer.has(f"part{i}"):
            continue  # were its state saved again, a kill before the log hears of it would look like a loss
        say(f"begin {i}")
        time.sleep(pause)
        writer.save_tensors(f"part{i}", {"x": torch.full((1000,), float(i))})
        say(f"done {i}")
        writer.save_tensors("state", {"step": torch.tensor(i)})
        say(f"state {i}")
    say("drop -1")
    writer.drop("state")

def run():
    return Store(root).get_or_make("work", {"n": n}, make)
"""


def assert_good_work(root: Path, log: Path, n: int) -> None:
    artefact = Store(root).get_or_make("work", {"n": n}, never)
    assert artefact.names == sorted(f"part{i}" for i in range(n))
    for i in range(n):
        assert torch.equal(artefact.tensors(f"part{i}")["x"], torch.full((1000,), float(i)))
    assert [p.name for p in (root / "work").iterdir() if p.suffix != ".lock"] == [artefact.key]
    done: set[str] = set()
    state = -1
    for word, number in (line.split() for line in log.read_text().splitlines()):
        if word == "done":
            done.add(number)
        elif word == "begin":
            assert number not in done, f"part{number} was computed again although it was finished"
        elif word in ("state", "drop"):
            state = int(number)
        else:
            assert int(number) >= state, "the checkpoint of a finished save was lost"


@posix
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Eight children of one process, which has imported torch for them, each killed in the middle of its
    work; the ninth finishes.
    """
    script = """
import os, random, signal
torch.set_num_threads(1)
dice = random.Random(0)
for _ in range(8):
    pid = os.fork()
    if not pid:
        run()
        os._exit(0)
    time.sleep(dice.uniform(0.02, 0.15))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the child was done before the kill"
pause = 0
run()
"""
    root, log, n = tmp_path / "store", tmp_path / "log", 100
    finished(start(WORK + script, root, log, n, 0.015))
    assert log.read_text().count("resumed") >= 4, "most children were killed before they began"
    assert_good_work(root, log, n)


@posix
def test_killed_before_and_after_every_rename(tmp_path: Path) -> None:
    """One child for each rename, and each side of it: the moments when a file or the journal changes, and the
    folder gets its name.
    """
    n = 2
    script = """
import os, signal
real = Path.replace
torch.set_num_threads(1)

def child(at, side):
    count = 0
    def replace(self, target):
        nonlocal count
        count += 1
        if (count, side) == (at, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(self, target)
        if (count, side) == (at, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    Path.replace = replace
    run()
    os._exit(0)

base, at = Path(sys.argv[1]), 0
killed = True
while killed:
    at += 1
    for side in ("before", "after"):
        root, log = base / f"{at}-{side}" / "store", base / f"{at}-{side}" / "log"
        root.mkdir(parents=True)
        pid = os.fork()
        if not pid:
            child(at, side)
        killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
        run()
print(at - 1)
"""
    renames = int(finished(start(WORK + script, tmp_path, "-", n, 0)))
    assert (
        renames == 2 * 2 * n + 3
    )  # a file and its journal, n parts and n checkpoints; the journal of the drop; the manifest; the folder
    for folder in tmp_path.iterdir():
        assert_good_work(folder / "store", folder / "log", n)


# ---- several processes
# ------------------------------------------------------------------------------------------------------------------

ONCE = """
import sys, time
from pathlib import Path
from dfrot_lab.disk.artefacts import Store

def make(writer):
    with Path(sys.argv[2]).open("a") as file:
        file.write("made" + chr(10))
    time.sleep(0.5)
    writer.save_json("x", 5)

print("ready", flush=True)
sys.stdin.readline()
print(Store(Path(sys.argv[1])).get_or_make("k", {}, make).json("x"))
"""


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ONCE, str(tmp_path / "store"), str(tmp_path / "count")]
    pair = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in pair:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in pair:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=30)[0] for process in pair] == ["5\n", "5\n"]
    assert (tmp_path / "count").read_text() == "made\n"


def test_an_artefact_opens_without_transformers_and_the_module_without_torch(tmp_path: Path) -> None:
    Store(tmp_path).get_or_make("capture", INPUTS, make)
    script = f"""
import sys
from pathlib import Path
from dfrot_lab.disk.artefacts import Store
artefact = Store(Path(sys.argv[1])).open("capture", {INPUTS!r})
assert artefact.json("table")[0] == 1
assert "torch" not in sys.modules
assert artefact.tensors("layers.0.input_norm")["x"].shape == (10, 100)
assert "transformers" not in sys.modules and "datasets" not in sys.modules
"""
    finished(start(script, tmp_path))


def test_no_pickle_is_written_or_read() -> None:
    source = Path(store_module.__file__).read_text(encoding="utf-8")
    assert not [
        word
        for word in ("pickle", "torch.load", "torch.save", "weights_only", "joblib", "shelve")
        if word in source
    ]


# ---- full and unwritable disks
# ----------------------------------------------------------------------------------------------------------

# The first save fits, the second does not, as tensors and as JSON; says what is left and what was raised.
TOO_BIG = """
import errno, json, sys
from pathlib import Path
import torch
from dfrot_lab.disk.artefacts import Store

root = Path(sys.argv[1])

def make(writer, save):
    if not writer.has("small"):
        writer.save_tensors("small", {"x": torch.ones(10)})
    try:
        save(writer)
    finally:
        print(json.dumps([sorted(p.name for p in writer.path.iterdir()), writer.names]))

for save in (lambda w: w.save_tensors("big", {"x": torch.ones(2_000_000)}), lambda w: w.save_json("big", list(range(1_000_000)))):
    try:
        Store(root).get_or_make("k", {}, lambda writer: make(writer, save))
    except OSError as error:
        print(json.dumps([errno.errorcode[error.errno], str(error)]))
"""

FILE_LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
"""


def assert_refused(out: str, code: str, folder: Path) -> None:
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 4
    for (left, names), (raised, message) in (lines[:2], lines[2:]):
        assert left == ["manifest.json", "small.safetensors"]
        assert names == ["small"]
        assert raised == code
        assert f"to {folder}" in message
        assert "bytes wanted" in message
        assert "free some space or write elsewhere (DFROT_LAB_CACHE" in message


def test_what_is_pruned_while_it_is_opened_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes an artefact between a look at a file's size and its reading: as if it had been
    gone before, and it is made again.
    """
    store, made = Store(tmp_path), list[int]()

    def make(writer: Writer) -> None:
        made.append(1)
        writer.save_json("n", len(made))

    folder, digest = store.get_or_make("k", {}, make).path, store_module.digest

    def too_late(path: Path, **options: bool) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        return digest(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "digest", too_late)
        assert store.open("k", {}) is None and not folder.exists()
    assert store.get_or_make("k", {}, make).json("n") == 2
    assert not list(tmp_path.glob("k/*corrupt*")), "nothing is set aside"


@posix
def test_a_file_that_the_disk_does_not_take(tmp_path: Path) -> None:
    """A real refused write that needs no rights: the process's own limit on the size of a file, which fails
    half-way as a full disk does.
    """
    out = finished(start(FILE_LIMIT + TOO_BIG, tmp_path))
    assert_refused(out, "EFBIG", tmp_path / "k")
    done = Store(tmp_path).get_or_make("k", {}, lambda w: w.save_json("had", w.names))
    assert done.json("had") == ["small"]


def in_small_disk(tmp_path: Path, command: str) -> list[str]:
    return [
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        f"mount -t tmpfs -o size=2m tmpfs '{tmp_path}' && {command}",
    ]


@posix
def test_a_full_disk(tmp_path: Path) -> None:
    """A disk of 2 MB in a mount namespace of its own, where the system lets a user make one."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(in_small_disk(tmp_path, "true"), capture_output=True).returncode
    ):
        pytest.skip("no private mount here")
    command = in_small_disk(tmp_path, f"exec '{sys.executable}' -c \"$0\" '{tmp_path}'")
    ran = subprocess.run([*command, TOO_BIG], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert_refused(ran.stdout, "ENOSPC", tmp_path / "k")


def test_a_cache_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    blocked = tmp_path / "file" / "cache"  # below a regular file not even root can write
    monkeypatch.setenv("DFROT_LAB_CACHE", str(blocked))
    for attempt in (cache_dir, Store):
        with pytest.raises(OSError, match="set DFROT_LAB_CACHE") as caught:
            attempt()
        assert f"cannot write to the folder {blocked}" in str(caught.value)
    with pytest.raises(OSError, match="cannot write to the folder") as caught:
        Store(blocked / "store").get_or_make("k", {}, never)
    assert str(blocked / "store" / "k") in str(caught.value)
    assert caught.value.errno == errno.ENOTDIR or os.name != "posix"


def test_the_cache_folder_is_the_variables_or_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    assert (tmp_path / "mine").is_dir()
    assert Store().root == tmp_path / "mine" / "store"
    monkeypatch.delenv("DFROT_LAB_CACHE")
    monkeypatch.setattr(atomic, "user_cache_path", lambda name: tmp_path / "user" / name)  # not the real one
    assert cache_dir() == tmp_path / "user" / "dfrot-lab"


def test_a_large_artefact_opens_at_once(tmp_path: Path) -> None:
    """60 files of 5 MB, about what a capture of 30 layers is. The time is printed, not asserted: machines
    differ.
    """

    def sixty(writer: Writer) -> None:
        for i in range(60):
            writer.save_tensors(f"layers.{i}", {"x": torch.full((1_250_000,), float(i))})

    made = Store(tmp_path).get_or_make("capture", INPUTS, sixty)
    start = time.perf_counter()
    artefact = Store(tmp_path).open("capture", INPUTS)
    opened = time.perf_counter()
    assert isinstance(artefact, Artefact)
    assert artefact.tensors("layers.59")["x"][-1] == 59
    first = time.perf_counter() - opened
    print(  # noqa: T201
        f"made in {made.manifest['seconds']} s, opened in {opened - start:.4f} s, first file in {first:.4f} s"
    )


# ---- read-only caches, odd filesystems
# ----------------------------------------------------------------------------------------------------------

READ_ONLY = """
import hashlib, os, sys
from pathlib import Path
import torch
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.disk.atomic import cache_dir

import safetensors.torch  # before the rights to read it may go
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
readers = int(sys.argv[1])
for _ in range(readers):  # at once, and torch is imported once
    if not os.fork():
        break
else:
    sys.exit(any(os.wait()[1] for _ in range(readers)))
root, said = cache_dir() / "store", []
try:
    (root / "trial").touch()
    said.append("can write")
except OSError:
    said.append("read only")
try:
    artefact = Store().get_or_make("capture", {"spec": "a", "tokens": 8}, None)
    x = artefact.tensors("layers.0.input_norm")["x"]
    said += [str(float(x.sum())), artefact.json("table")[2], str(len(Store().list()))]
    Store().get_or_make("capture", {}, None)
except OSError as error:
    said.append(str(error))
os.write(1, ("; ".join(said) + chr(10)).encode())
os._exit(0)
"""


def tree(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_mode) for p in root.rglob("*"))


@posix
@pytest.mark.parametrize("damaged", [False, True])
def test_many_read_a_cache_that_none_of_them_can_write(tmp_path: Path, damaged: bool) -> None:
    """As another user where this one is root, whom nothing is refused; else with the rights taken away."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder.stat().st_mode & 0o077 == 0:
            folder.chmod(0o755)  # pytest's folders are their owner's alone
    cache = tmp_path / "cache"
    folder = Store(cache / "store").get_or_make("capture", INPUTS, make).path
    if damaged:
        flip(folder)
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree(cache)
    out, err = start(READ_ONLY, 1 if damaged else 6, DFROT_LAB_CACHE=str(cache)).communicate(timeout=100)
    refused = f"[Errno 13] cannot write to the folder {cache / 'store' / 'capture'} (Permission denied)"
    for line in (lines := out.splitlines()):
        assert line.startswith(f"read only; {'' if damaged else '499500.0; three; 1; '}{refused}"), line
    assert len(lines) == (1 if damaged else 6), err
    assert ("is damaged and cannot be set aside: it is not used" in err) == damaged
    assert tree(cache) == before
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o755)  # so that pytest can remove it


@posix
def test_where_no_lock_can_be_made_that_is_said_at_once() -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc here")
    started = time.monotonic()
    refused = pytest.raises(OSError, match=r"cannot make the lock file /proc/x\.lock \(.*\); write elsewhere")
    with refused, atomic.locked(Path("/proc/x.lock")):
        pass
    with pytest.raises(OSError, match="cannot write to the folder /proc/k"):
        Store(Path("/proc")).get_or_make("k", INPUTS, never)
    assert time.monotonic() - started < 5


def test_who_waits_for_a_lock_says_so_and_a_timeout_is_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "PATIENCE", 0.05)
    script = "import sys; from pathlib import Path; from dfrot_lab.disk.atomic import locked\n"
    script += "with locked(Path(sys.argv[1])):\n print('held', flush=True); import time; time.sleep(1)"
    holder = start(script, tmp_path / "a.lock")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError), atomic.locked(tmp_path / "a.lock", 0):
        pass
    with caplog.at_level(logging.INFO), atomic.locked(tmp_path / "a.lock"):
        assert "waiting for another process, which holds" in caplog.text
    finished(holder)


def test_an_artefact_larger_than_the_disk_is_refused_before_its_work(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free

    def large(writer: Writer) -> None:
        writer.reserve(1000)
        writer.save_json("small", 1)
        writer.reserve(2 * free)
        pytest.fail("went on")

    with pytest.raises(
        OSError, match=r"cannot write .*\.partial to .*: [\d,]+ bytes wanted, [\d,]+ free; free"
    ):
        Store(tmp_path).get_or_make("k", INPUTS, large)
    assert Store(tmp_path).get_or_make("k", INPUTS, lambda w: w.save_json("had", w.names)).json("had") == [
        "small"
    ]


def test_more_than_is_free_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    """The disk's own figure, so that no disk need be filled."""
    free = shutil.disk_usage(tmp_path).free
    refused = pytest.raises(
        OSError, match=r"cannot write x to .*: [\d,]+ bytes wanted, [\d,]+ free; free some"
    )
    with refused as caught, atomic.replacing(tmp_path / "x", 2 * free):
        pytest.fail("the block was entered")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
