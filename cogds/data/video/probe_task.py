"""Probing of one file of a dataset, run in a `WorkerPool` process: a crash loses only that file."""

import re
from typing import NamedTuple

from cogds.data.video.kinds import kind_of
from cogds.data.video.media import VideoInfo, probe_image, probe_video

# A probe reads the file once and decodes one frame, which takes seconds even for gigabytes on a network disk.
PROBE_TIMEOUT_S = 120.0
# An 8K image, including its rotated and converted copies, takes less than 1 GB.
PROBE_MEMORY_BYTES = 4_000_000_000


class ProbeTask(NamedTuple):
    """A file to probe. kind: "video", "image", "condition" for a conditioning image, "control" for a control video."""

    kind: str
    path: str


def probe_file(task: ProbeTask) -> VideoInfo:
    """Open a file and decode its first frame. Raises media.DecodeError if it cannot be used."""
    is_video = kind_of(task.path) != "image" if task.kind == "control" else task.kind == "video"
    return probe_video(task.path) if is_video else probe_image(task.path)


# Patterns of error messages, and the category under which such messages are counted.
_CATEGORIES = (
    (r"pip install", "package missing"),
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


def categorize(message: str) -> str:
    """Return an error message as `category: message`, with one of a few fixed categories."""
    category = next((category for pattern, category in _CATEGORIES if re.search(pattern, message)), "cannot be used")
    repeated = re.match(
        rf"it (?:is )?{re.escape(category)}[^:]*: ", message
    )  # "it is truncated: only 3 frames are left"
    return f"{category}: {message[repeated.end() :] if repeated else message}"
