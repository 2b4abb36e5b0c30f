"""Clips to scan, and a record of the files that are probed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogds.data.manifest import scan as scan_module
from cogds.data.storage import requests
from cogds.data.video.media import VideoInfo, write_video
from cogds.data.video.probe_task import ProbeTask, probe_file


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, np.zeros((5, 32, 48, 3), np.uint8), 10)
    return path


@pytest.fixture
def folder(tmp_path: Path, clip: Path) -> Path:
    """Three equal clips and an image, with captions."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(clip, folder / f"{name}.mp4")
        (folder / f"{name}.txt").write_text(f"clip {name}")
    Image.new("RGB", (8, 6)).save(folder / "d.png")
    (folder / "d.txt").write_text("a picture")
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that this process has probed since the list was last cleared."""
    names: list[str] = []

    def spy(task: ProbeTask) -> VideoInfo:
        names.append(Path(task.path).name)
        return probe_file(task)

    monkeypatch.setattr(scan_module, "probe_file", spy)
    return names


@pytest.fixture
def short_delays(monkeypatch):
    """Repeat requests to servers that fail sooner."""
    monkeypatch.setattr(requests, "FIRST_DELAY_S", 0.01)


@pytest.fixture
def gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up requests to servers that fail after half a second."""
    monkeypatch.setattr(requests, "GIVE_UP_S", 0.5)
