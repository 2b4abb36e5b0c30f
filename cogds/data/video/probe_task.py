"""What one file of a dataset holds. `probe_file` runs in a `WorkerPool` child: a file that crashes it costs itself."""

import re
from typing import NamedTuple

from cogds.data.video import media as video

# A probe reads the file once and decodes one frame: seconds, even for gigabytes on a network disk.
PROBE_TIMEOUT_S = 120.0
# Of an 8K picture: its pixels, turned and converted, are below 1 GB.
PROBE_MEMORY_BYTES = 4_000_000_000


class ProbeTask(NamedTuple):
    """A file and how it is opened. kind: "video", or "image" and "condition", which are both pictures."""

    kind: str
    path: str


class FileFacts(NamedTuple):
    """What a file holds: see `video.VideoInfo`."""

    frames: int
    fps: float
    width: int
    height: int
    rotation: int
    duration_s: float


def probe_file(task: ProbeTask) -> FileFacts:
    """Open a file and decode its first frame. Raises video.DecodeError for whatever is wrong with it."""
    info = video.probe_video(task.path) if task.kind == "video" else video.probe_image(task.path)
    return FileFacts(info.num_frames, info.fps, info.width, info.height, info.rotation, info.duration_s)


# What a failed probe says -> the phrase that it is counted under. Sentences with numbers in them count as one.
_PHRASES = (
    (r"does not exist", "file missing"),
    (r"is a folder|is a device", "not a file"),
    (r"is empty", "empty file"),
    (r"no video stream|no frames", "no video in it"),
    (r"took more than", "took too long"),
    (r"needed more than .* memory", "needed too much memory"),
    (r"crashed", "crashed the decoder"),
    (r"truncated|cut short|read to its end", "truncated"),
    (r"cannot be opened|cannot be read", "cannot be opened"),
    (r"damaged|cannot be decoded|can be decoded|decoding fails", "damaged"),
    (r"not supported|timestamp|frame rate|of mode", "not supported"),
)


def reason_of(sentence: str) -> str:
    """A failed probe's sentence as `phrase: sentence`, with one of a few fixed phrases."""
    phrase = next((phrase for pattern, phrase in _PHRASES if re.search(pattern, sentence)), "cannot be used")
    return f"{phrase}: {sentence}"
