"""Damaged and unusual files: a bad file affects no other, and the manifest records the reason."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogds.data.manifest import scan as scan_module
from cogds.data.manifest.scan import finish_scan, scan_share
from cogds.data.manifest.table import DataSet, read_manifest
from cogds.data.video.media import write_video
from cogds.data.video.probe_task import ProbeTask
from tests.data.scanned import listed
from tests.data.video.clips import audio_only, encode, rotate


def grey(count: int, height: int, width: int) -> np.ndarray:
    return np.full((count, height, width, 3), 90, np.uint8)


def no_rate(path: Path) -> None:
    """An AVI with 0 frames per second in its header."""
    data = bytearray(encode(path, grey(3, 48, 64), codec="mpeg4").read_bytes())
    at = data.index(b"strh") + 8  # fourcc, fourcc, flags, priority + language, initial frames, scale, rate
    data[at + 20 : at + 28] = bytes(8)
    path.write_bytes(data)


def unusual_folder(folder: Path) -> None:
    folder.mkdir()
    write_video(folder / "good.mp4", np.random.default_rng(0).integers(0, 255, (20, 64, 96, 3), dtype=np.uint8), 10)
    good = (folder / "good.mp4").read_bytes()
    (folder / "zero.mp4").touch()
    (folder / "truncated.mp4").write_bytes(good[: len(good) // 2])
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    audio_only(folder / "audio.mp4")
    write_video(folder / "one frame.mp4", grey(1, 32, 32), 10)
    encode(folder / "one pixel.mkv", grey(2, 1, 1), codec="ffv1", pix_fmt="yuv444p")
    write_video(folder / "8k portrait.mp4", grey(1, 7680, 4320), 30)
    encode(folder / "variable.mp4", grey(6, 48, 64), [0, 100, 150, 400, 420, 1000])
    rotate(encode(folder / "turned.mp4", grey(5, 32, 64)), folder / "turned.mp4", 0, 1, -1, 0)
    no_rate(folder / "no rate.avi")
    shutil.copy(folder / "good.mp4", folder / "long caption.mp4")
    for name in ("a b.mp4", 'it\'s "quoted".mp4', "two\nlines.mp4", "ünï 🎬 \u2028.mp4", "no caption.mp4"):
        shutil.copy(folder / "good.mp4", folder / name)
    with open(os.fsencode(folder) + b"/latin \xe9.mp4", "wb") as file:
        file.write(good)
    os.symlink("/nowhere/at all.mp4", folder / "broken link.mp4")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "picture.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    for path in list(folder.iterdir()):
        if "no caption" not in path.name and "latin" not in os.fsdecode(os.fsencode(path.name)):
            path.with_suffix(".txt").write_text("words " * (5000 if "long" in path.name else 1))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict]]:
    """The manifest row of every file, by file name."""
    folder = tmp_path_factory.mktemp("bad") / "files"
    unusual_folder(folder)
    file = folder.parent / "manifest.parquet"
    scan = listed([DataSet(str(folder))], file)
    scan_share(scan, (0, 1), 2, timeout_s=60)
    finish_scan(scan)
    yield {os.path.basename(row["path"]): row for row in read_manifest(file).to_pylist()}
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "name, category, text",
    [
        ("zero.mp4", "empty file", "0 bytes"),
        ("truncated.mp4", "truncated", ""),
        ("text.mp4", "cannot be opened", "Invalid data"),
        ("audio.mp4", "no video in it", "audio only"),
        ("no caption.mp4", "caption missing", ".txt"),
        ("latin \\xe9.mp4", "file name not UTF-8", "rename the file"),
        ("broken link.mp4", "file missing", "does not exist"),
        ("folder.mp4", "not a file", "it is a folder"),
        ("pipe.mp4", "not a file", "a pipe"),
        ("picture.jpg", "cannot be opened", "as an image"),
    ],
)
def test_unusable_files_are_listed_with_a_reason(rows: dict[str, dict], name: str, category: str, text: str) -> None:
    assert rows[name]["status"] == "unusable"
    assert rows[name]["reason"].split(": ")[0] == category
    assert text in rows[name]["reason"]
    assert (rows[name]["frames"] is None) == (category != "caption missing")


@pytest.mark.parametrize(
    "name, frames, width, height",
    [
        ("good.mp4", 20, 96, 64),
        ("one frame.mp4", 1, 32, 32),
        ("one pixel.mkv", 2, 1, 1),
        ("8k portrait.mp4", 1, 4320, 7680),
        ("variable.mp4", 6, 64, 48),
        ("turned.mp4", 5, 32, 64),
        ("long caption.mp4", 20, 96, 64),
        ("a b.mp4", 20, 96, 64),
        ('it\'s "quoted".mp4', 20, 96, 64),
        ("two\nlines.mp4", 20, 96, 64),
        ("ünï 🎬 \u2028.mp4", 20, 96, 64),
        ("dot.png", 1, 1, 1),
    ],
)
def test_unusual_files_are_usable(rows: dict[str, dict], name: str, frames: int, width: int, height: int) -> None:
    row = rows[name]
    assert (row["status"], row["reason"]) == ("ok", None)
    assert (row["frames"], row["width"], row["height"]) == (frames, width, height)
    assert len(row["digest"]) == 16


def test_details_of_unusual_files(rows: dict[str, dict]) -> None:
    assert len(rows["long caption.mp4"]["caption"].split()) == 5000
    assert rows["turned.mp4"]["rotation"] in (90, 270)
    assert rows["variable.mp4"]["duration_s"] >= 1.0
    # For a header without a frame rate, either is acceptable.
    assert rows["no rate.avi"]["status"] == "unusable" or rows["no rate.avi"]["fps"] > 0
    assert len(rows) == 23


def test_a_file_removed_before_probing_affects_no_other(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, grey(5, 32, 32), 10)
    file = tmp_path / "out" / "m.parquet"
    scan = listed([DataSet(str(tmp_path))], file, default_caption="x")
    (tmp_path / "a.mp4").unlink()
    scan_share(scan, (0, 1), 0)
    finish_scan(scan)
    assert read_manifest(file)["reason"].to_pylist() == ["file missing: the file does not exist", None]


def unruly(task: ProbeTask) -> dict:
    """Instead of `scan_file`, in a worker process: hangs, crashes or leaks memory."""
    name = Path(task.path).stem
    if name == "hang":
        time.sleep(600)
    if name == "crash":
        os._exit(7)
    if name == "leak":
        memory = []
        while True:
            memory.append(bytearray(50_000_000))
    return benign(task)


def benign(task: ProbeTask) -> dict:
    """Instead of `scan_file`, for empty files."""
    status = os.stat(task.path)
    stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    return {**stamp, "frames": 5, "fps": 10.0, "width": 32, "height": 32, "duration_s": 0.5, "digest": bytes(16)}


def test_a_hang_crash_or_memory_leak_loses_one_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["1", "hang", "2", "crash", "3", "leak", "4"]
    for name in names:
        (tmp_path / f"{name}.mp4").touch()
    file = tmp_path / "out" / "m.parquet"

    def scan_with(scan_file: Callable[[ProbeTask], dict], num_workers: int) -> int:
        monkeypatch.setattr(scan_module, "scan_file", scan_file)
        scan = listed([DataSet(str(tmp_path))], file, default_caption="x")
        num_opened = scan_share(scan, (0, 1), num_workers, timeout_s=2.0, memory_bytes=600_000_000)
        finish_scan(scan)
        return num_opened

    scan_with(unruly, 2)
    reasons = {Path(row["path"]).stem: row["reason"] for row in read_manifest(file).to_pylist()}
    categories = {"hang": "took too long", "crash": "crashed the decoder", "leak": "needed too much memory"}
    assert {name: reason and reason.split(": ")[0] for name, reason in reasons.items()} == (
        dict.fromkeys("1234") | categories
    )
    # Only those three are opened again, because the machine may have been at fault.
    assert scan_with(benign, 1) == 3
    assert {row["status"] for row in read_manifest(file).to_pylist()} == {"ok"}
