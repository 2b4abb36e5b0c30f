from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogds.data.video.media import DecodeError, VideoInfo, write_video
from cogds.data.video.probe_task import ProbeTask, categorize, probe_file


def test_properties_of_files(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 10)
    Image.fromarray(frames[0]).save(tmp_path / "b.png")
    assert probe_file(ProbeTask("video", str(tmp_path / "a.mp4"))) == VideoInfo(5, 10.0, 48, 32, pytest.approx(0.5))
    for kind in ("image", "condition"):
        assert probe_file(ProbeTask(kind, str(tmp_path / "b.png"))) == VideoInfo(1, 0.0, 48, 32, 0.0)
    with pytest.raises(DecodeError, match="as an image"):
        probe_file(ProbeTask("image", str(tmp_path / "a.mp4")))


@pytest.mark.parametrize(
    "message, category",
    [
        ("took more than 120 s", "took too long"),
        ("needed more than 4 GB of memory", "needed too much memory"),
        ("crashed its process (code -11)", "crashed the decoder"),
        ("decoding fails near 0.400 s: Invalid data", "damaged"),
        ("the container marks a packet as corrupt (a truncated file?)", "truncated"),
        ("failed: KeyError: 'x'", "cannot be used"),
    ],
)
def test_messages_are_counted_by_category(message: str, category: str) -> None:
    assert categorize(message) == f"{category}: {message}"


def test_a_category_that_the_message_begins_with_is_not_repeated() -> None:
    assert categorize("it is truncated: only 3 of 9 frames are left") == "truncated: only 3 of 9 frames are left"
    assert categorize("it cannot be opened: not found") == "cannot be opened: not found"
