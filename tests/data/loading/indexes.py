"""Rows for an index of clips."""

import pyarrow as pa

from cogds.core.geometry import ClipShape
from cogds.data.loading.index import SCHEMA

BUCKETS = (ClipShape(9, 64, 96), ClipShape(17, 96, 64), ClipShape(1, 64, 64))
CAPTION_KEYS = SCHEMA.field("caption_keys").type
PLACES = {"clips": ["a.safetensors", "b.safetensors"], "captions": ["c.safetensors"]}


def captions_of(row):
    """The numbers of a row's captions: one to three."""
    return [(row + k) % 4 for k in range(1 + row % 3)]


def rows(num):
    captions = [captions_of(i) for i in range(num)]
    return pa.table(
        {
            "path": [f"clip {i}.mp4" for i in range(num)],
            "kind": ["video"] * num,
            "image_path": pa.array([None] * num, pa.string()),
            "captions": [[f"caption {k}" for k in numbers] for numbers in captions],
            "start_s": [i / 16 for i in range(num)],
            "mirrored": [False] * num,
            "clip_key": pa.array([i.to_bytes(16, "big") for i in range(num)], pa.binary(16)),
            "caption_keys": pa.array([[bytes([k] * 16) for k in numbers] for numbers in captions], CAPTION_KEYS),
            "clip_place": pa.array([i % 3 - 1 for i in range(num)], pa.int32()),
            "caption_places": [[k % 2 - 1 for k in numbers] for numbers in captions],
        }
    )
