from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogds.data.probe import FileFacts, ProbeTask, probe_file, reason_of
from cogds.data.video import DecodeError, write_video


def test_what_files_hold(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 10)
    Image.fromarray(frames[0]).save(tmp_path / "b.png")
    assert probe_file(ProbeTask("video", str(tmp_path / "a.mp4"))) == FileFacts(5, 10.0, 48, 32, 0, pytest.approx(0.5))
    for kind in ("image", "condition"):
        assert probe_file(ProbeTask(kind, str(tmp_path / "b.png"))) == FileFacts(1, 0.0, 48, 32, 0, 0.0)
    with pytest.raises(DecodeError, match="as an image"):
        probe_file(ProbeTask("image", str(tmp_path / "a.mp4")))


@pytest.mark.parametrize(
    "sentence, phrase",
    [
        ("took more than 120 s", "took too long"),
        ("needed more than 4 GB of memory", "needed too much memory"),
        ("crashed its process (code -11)", "crashed the decoder"),
        ("decoding fails near 0.400 s: Invalid data", "damaged"),
        ("it is truncated: 10 of 20 frames are there", "truncated"),
        ("failed: OSError: stale file handle", "cannot be used"),
    ],
)
def test_reasons_are_counted_by_phrases_without_numbers(sentence: str, phrase: str) -> None:
    assert reason_of(sentence) == f"{phrase}: {sentence}"
