"""A decoder that misbehaves for certain clips, in a module that a worker process imports quickly."""

import time

from cogds.data.video import decode_task


def decode(task: decode_task.DecodeTask) -> decode_task.DecodedClip:
    """Hang on clip_0, use up the memory on clip_1, decode all others."""
    if task.path.endswith("clip_0.mp4"):
        time.sleep(1000)
    if task.path.endswith("clip_1.mp4"):
        memory = []
        while True:
            memory.append(bytearray(50_000_000))
    return decode_task.decode(task)
