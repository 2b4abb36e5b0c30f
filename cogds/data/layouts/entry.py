"""A clip of a dataset, as its list or folder describes it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

# An entry in a table, without `extras`.
ENTRY_COLUMNS: tuple[tuple[str, pa.DataType], ...] = (
    ("path", pa.string()),
    ("kind", pa.string()),
    ("caption", pa.string()),
    ("more_captions", pa.list_(pa.string())),
    ("caption_error", pa.string()),
    ("image_path", pa.string()),
    ("start_s", pa.float64()),
    ("end_s", pa.float64()),
    ("motion", pa.float64()),
    ("duplicate_of", pa.string()),
    ("control_path", pa.string()),
)


class Entry(NamedTuple):
    """A clip of a dataset.

    Attributes:
        path: location of the file (`storage.location`).
        caption: None if there is none, "" if it is blank.
        kind: "video", or "image" for a clip of one frame.
        image_path: location of the conditioning image; None means the clip's first frame.
        caption_error: why the caption cannot be read.
        start_s, end_s: the clip's range in the file, in seconds after its first frame; None means the beginning and
            the end of the file.
        more_captions: further captions, not blank.
        motion, duplicate_of: scores of `cogds prepare`.
        control_path: location of the control video, which shows the same time range as `path`.
        extras: the other columns of the clip's row in a table, if asked for.
    """

    path: str
    caption: str | None
    kind: str
    image_path: str | None = None
    caption_error: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    more_captions: tuple[str, ...] = ()
    motion: float | None = None
    duplicate_of: str | None = None
    control_path: str | None = None
    extras: Mapping[str, Any] | None = None
