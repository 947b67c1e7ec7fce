"""A file's bytes are read once: not again while it is the same file, always again once it is not."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_tiny

from dfrot_lab.disk import atomic
from dfrot_lab.disk.atomic import digest
from dfrot_lab.model import loading

CONTENT = bytes(range(256)) * 9000  # more than two of the blocks it is read in


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which files are remembered however young and small they are."""
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(atomic, "SMALL", 0)
    monkeypatch.setattr(atomic, "SETTLED", -(10**12))
    monkeypatch.setattr(atomic, "_known", {})
    return tmp_path / "cache" / "digests.json"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files read from here on."""
    names: list[str] = []
    read = atomic.read
    monkeypatch.setattr(atomic, "read", lambda path, *rest: names.append(path.name) or read(path, *rest))
    return names


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.bin"
    path.write_bytes(CONTENT)
    return path


def forget_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_known", {})


def test_a_digest_is_of_the_bytes_alone(file: Path, tmp_path: Path):
    copy, other = tmp_path / "copy", tmp_path / "other"
    copy.write_bytes(CONTENT)
    other.write_bytes(CONTENT[:-1] + b"\0")
    assert digest(file) == digest(str(copy)) != digest(other)
    assert re.fullmatch(r"[0-9a-f]{32}", digest(file))
    assert digest(file, "sha256") == hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        digest(tmp_path / "nowhere")


@pytest.mark.parametrize("process", ["same", "another"])
def test_the_same_file_is_read_once(file: Path, reads: list[str], process: str, monkeypatch, tmp_path):
    first = digest(file)
    if process == "another":
        forget_this_process(monkeypatch)
    (tmp_path / "link").symlink_to(file)
    assert digest(file) == digest(tmp_path / "link") == first and reads == ["a.bin"]


def overwrite_in_place(path: Path) -> None:
    path.write_bytes(CONTENT[:-1] + b"x")


def overwrite_and_put_the_time_back(path: Path) -> None:
    before = path.stat().st_mtime_ns
    overwrite_in_place(path)
    os.utime(path, ns=(before, before))


def take_its_place(path: Path) -> None:
    before, other = path.stat().st_mtime_ns, path.with_name("other")
    overwrite_in_place(other)
    os.utime(other, ns=(before, before))
    other.replace(path)


@pytest.mark.parametrize("change", [overwrite_in_place, overwrite_and_put_the_time_back, take_its_place])
def test_a_changed_file_of_the_same_size_is_read_again(file: Path, reads: list[str], change, monkeypatch):
    first = digest(file)
    change(file)
    forget_this_process(monkeypatch)
    assert digest(file) != first and reads == ["a.bin"] * 2


def test_a_file_that_may_change_under_the_same_time_stamp_is_not_remembered(
    file: Path, reads: list[str], memory: Path, monkeypatch
):
    monkeypatch.setattr(atomic, "SETTLED", 60 * 10**9)
    assert digest(file) == digest(file) and reads == ["a.bin"] * 2
    assert not memory.exists()


def test_a_small_file_is_read_again_and_leaves_no_entry(
    file: Path, reads: list[str], memory: Path, monkeypatch
):
    """A store has thousands of them: a memory of all would cost more than their bytes."""
    monkeypatch.setattr(atomic, "SMALL", len(CONTENT) + 1)
    assert digest(file) == digest(file) and reads == ["a.bin"] * 2 and not memory.exists()
    monkeypatch.setattr(atomic, "SMALL", len(CONTENT))
    assert digest(file) == digest(file) and reads == ["a.bin"] * 3 and memory.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"xxh3_128:NAME": 3}', b"null"])
def test_a_damaged_memory_is_an_empty_one_and_heals(
    file: Path, reads: list[str], memory: Path, damage: bytes, monkeypatch
):
    first = digest(file)
    memory.write_bytes(damage.replace(b"NAME", str(file).encode()))
    for _ in range(2):
        forget_this_process(monkeypatch)
        assert digest(file) == first
    assert reads == ["a.bin"] * 2
    assert json.loads(memory.read_bytes())[f"xxh3_128:{file}"][-1] == first


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_no_pipe_is_waited_for_as_memory_or_as_file(file: Path, memory: Path, monkeypatch):
    memory.parent.mkdir()
    os.mkfifo(memory)
    before = digest(file)
    forget_this_process(monkeypatch)
    assert digest(file) == before and memory.is_file(), "it heals"
    os.mkfifo(file.with_name("pipe"))
    with pytest.raises(ValueError, match=r"must be a regular file.*; got .*pipe"):
        digest(file.with_name("pipe"))


def test_a_memory_that_cannot_be_written_costs_only_the_reading(file: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "blocked").write_text("no folder")
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "blocked" / "cache"))
    assert digest(file, "sha256") == hashlib.sha256(CONTENT).hexdigest()


def test_processes_at_once_lose_no_entry(tmp_path: Path, memory: Path):
    for name in range(24):
        (tmp_path / f"{name}.bin").write_bytes(b"%d" % name)
    script = (
        "import sys\nfrom dfrot_lab.disk import atomic\natomic.SETTLED, atomic.SMALL = -(10**12), 0\n"
        "print(*[atomic.digest(name) for name in sys.argv[1:]])"
    )
    parts = [[str(tmp_path / f"{name}.bin") for name in range(start, 24, 4)] for start in range(4)]
    started = [
        subprocess.Popen([sys.executable, "-c", script, *part], stdout=subprocess.PIPE, text=True)
        for part in parts
    ]
    found = [process.communicate(timeout=60)[0].split() for process in started]
    entries = json.loads(memory.read_bytes())
    assert len(entries) == 24
    for names, values in zip(parts, found, strict=True):
        assert [entries[f"xxh3_128:{name}"][-1] for name in names] == values


def test_a_model_s_bytes_are_read_once_for_all_its_keys(tmp_path: Path, reads: list[str], monkeypatch):
    spec = save_tiny(tmp_path / "m")
    first = loading.fingerprint(spec)
    files = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert sorted(reads) == files and "model.safetensors" in files
    loaded = loading.load_model(spec)
    forget_this_process(monkeypatch)
    assert loading.fingerprint(spec) == loaded.fingerprint == first and sorted(reads) == files
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert loading.fingerprint(spec) != first and sorted(reads) == sorted([*files, "config.json"])
