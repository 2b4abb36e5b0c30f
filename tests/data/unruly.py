"""A decoder that goes wrong on certain names, for guarded processes to run."""

import time

from cogds.data.video import decode_task as good


def decode(task: good.DecodeTask) -> good.DecodedClip:
    """Hang on clip_0, eat memory on clip_1, decode all others."""
    if task.path.endswith("clip_0.mp4"):
        time.sleep(1000)
    if task.path.endswith("clip_1.mp4"):
        held = []
        while True:
            held.append(bytearray(50_000_000))
    return good.decode(task)
