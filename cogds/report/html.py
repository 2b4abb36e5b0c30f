"""The report as an HTML page: plots are inline SVG, pictures are data URIs, and there are no scripts.

It shows every clip, up to MAX_CLIPS. If there are more than PAGE_CLIPS, the other pages are in a folder next to it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw

from cogds.core.geometry import ClipShape
from cogds.metrics.figures import ORANGE
from cogds.pages.page import picture_uri, render, write_page
from cogds.process.progress import progress_bar
from cogds.report.analysis import ClipTable, Report
from cogds.report.clips import Clip, ClipList, FrameRequest, list_clips
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
    time_lines,
    warning_lines,
)

# Reads frames, uint8 [H, W, 3] or None if unreadable, in the order of the requests.
ReadFrames = Callable[[Sequence[FrameRequest]], Iterable[np.ndarray | None]]

PAGE_CLIPS = 60  # clips on one page
MAX_CLIPS = 5000
PICTURE_SIDE = 260  # the longer side of a picture, in pixels


@dataclass(frozen=True)
class Tile:
    """A clip with its picture, a data URI; None if unreadable."""

    clip: Clip
    picture: str | None


@dataclass(frozen=True)
class Pages:
    """The pages of clips. addresses: of each page, relative to the current one; current: its number, from 0."""

    addresses: Sequence[str]
    current: int

    @property
    def shown(self) -> list[int | None]:
        """The numbers of the pages to link: the first, the last and the neighbors. None for a gap."""
        near = {0, len(self.addresses) - 1, *range(self.current - 3, self.current + 4)}
        numbers = sorted(number for number in near if 0 <= number < len(self.addresses))
        return [part for n, m in zip([-1, *numbers], numbers) for part in (([None] if m > n + 1 else []) + [m])]


def write_html(
    file: Path, report: Report, clips: ClipTable, clip_list: ClipList, read_frames: ReadFrames, name: str = ""
) -> None:
    """Write the page into an existing folder. name: of the run, for the heading.

    The first PAGE_CLIPS clips are on it. The others are on pages in a folder next to it, `report_clips/2.html`.
    """
    listed = list_clips(clip_list, MAX_CLIPS)
    folder = file.with_name(f"{file.stem}_clips")
    num_pages = max(1, -(-len(listed) // PAGE_CLIPS))
    with progress_bar("reading first frames", "clip", len(listed)) as bar:
        tiles = make_tiles(listed, read_frames)
        for number in range(num_pages):
            page_tiles = list(itertools.islice(tiles, PAGE_CLIPS))
            bar.update(len(page_tiles))
            if not number:
                addresses = [quote(file.name), *(quote(f"{folder.name}/{n + 1}.html") for n in range(1, num_pages))]
                write_page(file, html_page(report, clips, page_tiles, Pages(addresses, 0), len(clip_list.table), name))
                continue
            folder.mkdir(exist_ok=True)
            addresses = [quote(f"../{file.name}"), *(f"{n + 1}.html" for n in range(1, num_pages))]
            write_page(folder / f"{number + 1}.html", clips_page(page_tiles, Pages(addresses, number), name))
    for old in folder.glob("*.html"):  # of an earlier report about more clips
        if old.stem.isdecimal() and int(old.stem) > num_pages:
            old.unlink()


def html_page(
    report: Report, clips: ClipTable, tiles: Sequence[Tile], pages: Pages, num_clips: int = 0, name: str = ""
) -> str:
    """Render the page. tiles: of the first page of clips. num_clips: of the dataset."""
    return render(
        "page.html.j2",
        Path(__file__).parent,
        report=report,
        name=name,
        plots=make_plots(report, clips),
        tiles=tiles,
        pages=pages,
        max_clips=MAX_CLIPS if num_clips > MAX_CLIPS else None,
        warnings=warning_lines(report),
        notes=empty_bucket_lines(report) + caption_lines(report) + processing_lines(report) + quality_lines(report),
        suggestion=suggestion_lines(report),
        times=time_lines(report),
        estimate_note=ESTIMATE_NOTE,
        memory_text=memory_text,
        step_text=step_text,
        is_timed=any(step_text(bucket) != NOT_MEASURED for bucket in report.used_buckets),
    )


def clips_page(tiles: Sequence[Tile], pages: Pages, name: str = "") -> str:
    """Render a further page of clips."""
    return render("clips.html.j2", Path(__file__).parent, tiles=tiles, pages=pages, name=name)


def make_tiles(clips: Sequence[Clip], read_frames: ReadFrames) -> Iterator[Tile]:
    """Add a picture to each clip that has a size."""
    requests = []
    for clip in clips:
        if clip.request:
            height, width = clip.size
            scale = min(1.0, PICTURE_SIDE / max(height, width))
            size = max(1, round(height * scale)), max(1, round(width * scale))
            requests.append(clip.request._replace(height=size[0], width=size[1]))
    frames = iter(read_frames(requests))
    for clip in clips:
        frame = next(frames) if clip.request else None
        if frame is None:
            yield Tile(clip, None)
        else:
            yield Tile(clip, picture_uri(crop_picture(frame, clip.shape) if clip.shape else Image.fromarray(frame)))


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
