import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogds.data import probe
from cogds.data.manifest import Entry, read_entries
from cogds.data.probe import probe_entries
from cogds.data.video import VideoInfo, write_video


@pytest.mark.parametrize("num_workers", [0, 2])
def test_probing_keeps_order_and_lists_the_unusable(tmp_path: Path, num_workers: int) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 10)
    shutil.copy(tmp_path / "a.mp4", tmp_path / "c.mp4")
    shutil.copy(tmp_path / "a.mp4", tmp_path / "f.mp4")
    Image.fromarray(frames[0]).save(tmp_path / "d.png")
    (tmp_path / "b.mp4").touch()
    for name in ("a", "b", "d"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe\xfa")
    entries = [
        *read_entries(tmp_path),
        Entry(str(tmp_path / "gone.mp4"), "x", "video"),
        Entry(str(tmp_path / "a.mp4"), "x", "video", str(tmp_path / "gone.png")),
        Entry(str(tmp_path / "a.mp4"), "x", "video", str(tmp_path / "d.png")),
    ]
    clips, rejected = probe_entries(entries, num_workers)
    assert [Path(clip.path).name for clip in clips] == ["a.mp4", "d.png", "a.mp4"]
    assert (clips[0].num_frames, clips[0].fps, clips[0].height, clips[0].width) == (5, 10, 32, 48)
    assert clips[0].duration_s == pytest.approx(0.5)
    assert [(Path(r.path).name, reason in r.reason) for r, reason in zip(
        rejected, ["0 bytes", "caption missing", "cannot be read as UTF-8", "does not exist", "conditioning image"]
    )] == [(name, True) for name in ("b.mp4", "c.mp4", "f.mp4", "gone.mp4", "a.mp4")]  # fmt: skip


def unruly_probe(path: str) -> VideoInfo:
    if "crash" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in path:
        time.sleep(600)
    return VideoInfo(5, 10.0, 48, 32, 0.5)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_crash_or_a_hang_costs_one_file(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A forked child has the planted probe; a spawned one would import the real one.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(probe.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(probe.video, "probe_video", unruly_probe)
    names = ["1", "crash 2", "3", "hang 4", "5", "crash 6", "7"]
    clips, rejected = probe_entries([Entry(name, "x", "video") for name in names], num_workers, timeout_s=1.0)
    assert [clip.path for clip in clips] == ["1", "3", "5", "7"]
    assert [(r.path, "crashed" in r.reason, "more than 1 s" in r.reason) for r in rejected] == [
        ("crash 2", True, False), ("hang 4", False, True), ("crash 6", True, False)
    ]  # fmt: skip
    assert not multiprocessing.active_children()


def test_no_entries() -> None:
    assert probe_entries([], 2) == ([], [])
