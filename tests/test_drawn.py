import os
from pathlib import Path

import numpy as np
import pytest

from cogds.core.geometry import ClipShape
from cogds.data.video.media import read_clip
from tests import drawn
from tests.data.scanned import scan_folder
from tests.drawn import draw_clips


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_depend_only_on_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "_CLIPS", drawn._CLIPS[4:])
    draw_clips(tmp_path / "a" / "clips")
    draw_clips(tmp_path / "b")
    draw_clips(tmp_path / "c", seed=1)
    assert files(tmp_path / "a" / "clips") == files(tmp_path / "b") != files(tmp_path / "c")


def test_clips_are_usable(tmp_path: Path) -> None:
    draw_clips(tmp_path / "clips")
    clips = scan_folder(tmp_path / "clips", tmp_path / "manifest.parquet")
    assert {clip["status"] for clip in clips} == {"ok"}
    assert [clip["kind"] for clip in clips] == ["video"] * 6 + ["image"]
    assert {clip["fps"] for clip in clips} == {0, 12, 16, 24, 25, 30}
    assert {np.sign(clip["width"] - clip["height"]) for clip in clips} == {-1, 0, 1}
    assert all(0.7 <= clip["duration_s"] <= 3 and max(clip["width"], clip["height"]) <= 320 for clip in clips[:-1])
    frames = read_clip(clips[0]["path"], ClipShape(9, clips[0]["height"], clips[0]["width"]), fps=4).astype(float)
    assert abs(frames[0] - frames[-1]).mean() > 2  # the shape moves


def test_an_existing_folder_is_not_changed(tmp_path: Path) -> None:
    draw_clips(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(drawn, "write_video", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_clips(tmp_path / "clips")
    assert not os.listdir(tmp_path)
