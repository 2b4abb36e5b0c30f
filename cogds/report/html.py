"""The report as one self-contained HTML page: plots are inline SVG, pictures are data URIs, and there are no scripts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cogds.core.buckets import crop_share
from cogds.core.geometry import ClipShape
from cogds.data.storage.location import display_name
from cogds.formatting import percent
from cogds.metrics.figures import ORANGE
from cogds.pages.page import picture_uri, printable, render, write_page
from cogds.report.analysis import ClipTable, Report
from cogds.report.plots import make_plots
from cogds.report.text import (
    ESTIMATE_NOTE,
    NOT_MEASURED,
    caption_lines,
    empty_bucket_lines,
    memory_text,
    processing_lines,
    quality_lines,
    step_text,
    suggestion_lines,
    warning_lines,
)

# (path, kind, start_s, height, width) -> the frame shown at start_s, uint8 [height, width, 3], or None if unreadable.
# The requested size has the clip's proportions.
FirstFrame = Callable[[str, str, float, int, int], np.ndarray | None]

TILES_PER_BUCKET = 4
MAX_TILES = 120
TILE_SIDE = 260  # the longer side of a picture, in pixels
MAX_CAPTION_CHARS = 300


@dataclass(frozen=True)
class Tile:
    """One sample clip. picture: a data URI, None if unreadable; note: its size and how it is cropped."""

    picture: str | None
    alt: str
    name: str
    caption: str
    note: str


@dataclass(frozen=True)
class Sheet:
    """Sample clips of one bucket."""

    title: str
    tiles: Sequence[Tile]


def write_html(
    file: Path, report: Report, clips: ClipTable, first_frame: FirstFrame, seed: int = 0, name: str = ""
) -> None:
    """Write the page into an existing folder. name: of the run, for the heading."""
    write_page(file, html_page(report, clips, first_frame, seed, name))


def html_page(report: Report, clips: ClipTable, first_frame: FirstFrame, seed: int = 0, name: str = "") -> str:
    """Render the page. seed: of the choice of sample clips."""
    return render(
        "page.html.j2",
        Path(__file__).parent,
        report=report,
        name=name,
        plots=make_plots(report, clips),
        sheets=sample_sheets(report, clips, first_frame, seed),
        warnings=warning_lines(report),
        notes=empty_bucket_lines(report) + caption_lines(report) + processing_lines(report) + quality_lines(report),
        suggestion=suggestion_lines(report),
        estimate_note=ESTIMATE_NOTE,
        memory_text=memory_text,
        step_text=step_text,
        is_timed=any(step_text(bucket) != NOT_MEASURED for bucket in report.used_buckets),
    )


def sample_sheets(report: Report, clips: ClipTable, first_frame: FirstFrame, seed: int) -> list[Sheet]:
    """Choose a few clips of every bucket, by seed and bucket, and show how each is cropped."""
    used = [index for index, bucket in enumerate(report.buckets) if bucket.num_clips]
    num_tiles = max(1, min(TILES_PER_BUCKET, MAX_TILES // max(1, len(used))))
    sheets = []
    for index in used:
        rows = np.flatnonzero(clips.buckets == index)
        if len(rows) > num_tiles:
            rows = np.sort(np.random.default_rng([seed, index]).choice(rows, num_tiles, replace=False))
        shape = report.buckets[index].shape
        taken = clips.table.select(["path", "kind", "caption", "start_s", "width", "height"]).take(rows)
        tiles = [_tile(row, shape, first_frame) for row in taken.to_pylist()]
        sheets.append(Sheet(f"{shape}", tiles))
    return sheets


def _tile(row: dict[str, Any], shape: ClipShape, first_frame: FirstFrame) -> Tile:
    name = printable(display_name(row["path"]).rsplit("/", 1)[-1])
    caption = printable(row["caption"] or "")
    if len(caption) > MAX_CAPTION_CHARS:
        caption = caption[:MAX_CAPTION_CHARS].rstrip() + " …"
    height, width = row["height"], row["width"]
    scale = min(1.0, TILE_SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    frame = first_frame(row["path"], row["kind"], row["start_s"] or 0.0, *size)
    if frame is None:
        return Tile(None, "", name, caption, "first frame unreadable")
    note = f"{width} × {height}, {percent(crop_share(height, width, shape))} cropped away"
    if shape.height > height or shape.width > width:
        note += ", upscaled"
    return Tile(
        picture_uri(crop_picture(frame, shape)),
        f"First frame of {name}: {note} for bucket {shape}",
        name,
        caption,
        note,
    )


def crop_picture(frame: np.ndarray, shape: ClipShape) -> Image.Image:
    """Draw a frame, uint8 [H, W, 3], with the part that the bucket crops away dimmed."""
    height, width = frame.shape[:2]
    scale = max(shape.height / height, shape.width / width)
    kept_width, kept_height = shape.width / (scale * width), shape.height / (scale * height)
    whole = Image.fromarray(np.ascontiguousarray(frame)).convert("RGB")
    left, top = (1 - kept_width) / 2 * width, (1 - kept_height) / 2 * height
    kept = (round(left), round(top), max(1, round(width - left)), max(1, round(height - top)))
    picture = Image.blend(whole, Image.new("RGB", whole.size), 0.7)
    picture.paste(whole.crop(kept), kept[:2])
    if min(kept[2] - kept[0], kept[3] - kept[1]) > 2:
        ImageDraw.Draw(picture).rectangle((kept[0], kept[1], kept[2] - 1, kept[3] - 1), outline=ORANGE, width=2)
    return picture
