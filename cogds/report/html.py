"""The report as one HTML page that asks for nothing: plots are inline SVG, pictures are data URIs, there is no script.

File names and captions come from whoever made the clips. The template escapes all of it (jinja2's autoescape); plots
carry numbers and bucket names only, and a policy in the page forbids whatever might slip through.
"""

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc
from markupsafe import Markup
from PIL import Image, ImageDraw

from cogds.core.buckets import crop_share
from cogds.core.geometry import ClipShape
from cogds.files import whole_file
from cogds.formatting import counted, duration, gigabytes, number, percent
from cogds.report.facts import ClipTable, Report
from cogds.report.text import ESTIMATE_NOTE, memory_text, step_text, suggestion_lines, warning_lines

# (path, kind, start_s, height, width) -> the frame on display then, uint8 [height, width, 3], or None where it cannot
# be read. The size that is asked for has the clip's proportions.
FirstFrame = Callable[[str, str, float, int, int], np.ndarray | None]

TILES_PER_BUCKET = 4
MAX_TILES = 120
TILE_SIDE = 260  # pixels of a picture's longer side
MAX_POINTS = 1500
CAPTION_LETTERS = 300
# Readable on white and on black alike; one colour, one meaning.
BLUE, ORANGE, GREY = "#3b82c4", "#e0812b", "#8a8f98"
# matplotlib writes this colour where the page's own text colour belongs.
INK = "#010203"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, sharp, and read aloud
    "font.family": ["sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Tile:
    """One sample clip: picture (a data URI, or None), name, caption, and how it is cut."""

    picture: str | None
    alt: str
    name: str
    caption: str
    note: str


@dataclass(frozen=True)
class Sheet:
    """A bucket's sample clips."""

    title: str
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Plot:
    """An inline SVG and its description for those who do not see it."""

    svg: Markup
    title: str
    note: str


def write_html(
    file: Path, report: Report, clips: ClipTable, first_frame: FirstFrame, seed: int = 0, name: str = ""
) -> None:
    """Write the page. name: what the run is called, for the heading."""
    with whole_file(file) as partial:
        partial.write_text(html_page(report, clips, first_frame, seed, name), encoding="utf-8")


def html_page(report: Report, clips: ClipTable, first_frame: FirstFrame, seed: int = 0, name: str = "") -> str:
    """The page as text. seed: which clips are shown as samples."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {one.__name__: one for one in (counted, percent, gigabytes, duration, number)}
    return environment.get_template("page.html.j2").render(
        report=report,
        name=name,
        plots=make_plots(report, clips),
        sheets=contact_sheet(report, clips, first_frame, seed),
        captions=warning_lines(report),
        suggestion=suggestion_lines(report),
        estimate_note=ESTIMATE_NOTE,
        memory_text=memory_text,
        step_text=step_text,
        printable=printable,
        num_used=sum(one.num_samples > 0 for one in report.buckets),
    )


def printable(text: str) -> str:
    """A text with control characters and lone surrogates shown as escapes: a page in UTF-8 cannot hold them."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )


def contact_sheet(report: Report, clips: ClipTable, first_frame: FirstFrame, seed: int) -> list[Sheet]:
    """A few clips of every bucket that has some, each with its crop drawn in. Drawn anew from the seed and bucket."""
    used = [index for index, one in enumerate(report.buckets) if one.num_clips]
    if not used:
        return []
    each = max(1, min(TILES_PER_BUCKET, MAX_TILES // len(used)))
    sheets = []
    for index in used:
        rows = np.flatnonzero(clips.buckets == index)
        if len(rows) > each:
            rows = np.sort(np.random.default_rng([seed, index]).choice(rows, each, replace=False))
        shape = report.buckets[index].shape
        taken = clips.table.select(["path", "kind", "caption", "start_s", "width", "height"]).take(rows)
        tiles = [_tile(row, shape, first_frame) for row in taken.to_pylist()]
        sheets.append(Sheet(f"{shape}", tiles))
    return sheets


def _tile(row: dict[str, Any], shape: ClipShape, first_frame: FirstFrame) -> Tile:
    name = printable(Path(row["path"]).name)
    caption = printable(row["caption"] or "")
    if len(caption) > CAPTION_LETTERS:
        caption = caption[:CAPTION_LETTERS].rstrip() + " …"
    height, width = row["height"], row["width"]
    scale = min(1.0, TILE_SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    frame = first_frame(row["path"], row["kind"], row["start_s"] or 0.0, *size)
    if frame is None:
        return Tile(None, "", name, caption, "its first frame cannot be read")
    note = f"{width} × {height}, {percent(crop_share(height, width, shape))} cut away"
    if shape.height > height or shape.width > width:
        note += ", enlarged"
    return Tile(
        data_uri(crop_picture(frame, shape)), f"First frame of {name}: {note} for bucket {shape}", name, caption, note
    )


def crop_picture(frame: np.ndarray, shape: ClipShape) -> Image.Image:
    """A frame uint8 [H, W, 3] with what the bucket cuts away dimmed."""
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


def data_uri(picture: Image.Image) -> str:
    """A picture as a JPEG in a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def make_plots(report: Report, clips: ClipTable) -> list[Plot]:
    """Sizes with the buckets drawn in, lengths with the buckets' lengths, clips and memory by bucket."""
    import matplotlib  # only the page needs it, and it takes a second to load

    with matplotlib.rc_context(STYLE):
        plots = [_sizes_plot(report, clips), _lengths_plot(report, clips), _clips_plot(report), _memory_plot(report)]
    return [plot for plot in plots if plot]


def _figure(width: float, height: float) -> Any:
    """A figure of its own, in inches: no global state, no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _inline(figure: Any, title: str, note: str) -> Plot:
    import matplotlib

    buffer = io.StringIO()
    # No metadata: it would name a date and addresses. The salt gives every plot's elements names of their own.
    nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Names such as `figure_1` recur in every plot, and nothing refers to them.
    svg = re.sub(r' id="[A-Za-z]+[A-Za-z0-9.]*_\d+"', "", svg)
    label = Markup.escape(f"{title}. {note}")
    return Plot(Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)), title, note)


def _sizes_plot(report: Report, clips: ClipTable) -> Plot | None:
    """Every distinct size as a disc whose area grows with its clips, and the buckets as squares."""
    usable = pc.equal(clips.table.column("status"), "ok")
    widths, heights = (pc.fill_null(clips.table.column(name), 0).to_numpy() for name in ("width", "height"))
    shown = usable.to_numpy() & (widths > 0) & (heights > 0)
    code, counts = np.unique(widths[shown].astype(np.int64) << 32 | heights[shown].astype(np.int64), return_counts=True)
    if not len(code):
        return None
    order = np.argsort(-counts, kind="stable")[:MAX_POINTS]
    note = f"{len(code):,} sizes of {int(counts.sum()):,} clips"
    if len(code) > MAX_POINTS:
        share = counts[order].sum() / counts.sum()
        note += f"; drawn are the {MAX_POINTS:,} commonest, {percent(share)} of the clips"
    note += "; squares are buckets, the diagonal is a square picture"
    figure = _figure(6.4, 5.2)
    axes = figure.subplots()
    x, y = code[order] >> 32, code[order] & 0xFFFFFFFF
    area = 12 + 500 * np.sqrt(counts[order] / counts.max())
    axes.scatter(x, y, s=area, color=BLUE, alpha=0.35, linewidths=0, label="clips")
    sizes = {(one.shape.width, one.shape.height) for one in report.buckets}
    limit = 1.12 * max(int(x.max()), int(y.max()), *(side for size in sizes for side in size))
    axes.scatter(*zip(*sorted(sizes)), marker="s", s=46, facecolors="none", edgecolors=ORANGE, linewidths=2, zorder=3)
    # Names would cover one another where many buckets are near.
    for width, height in sorted(sizes) if len(sizes) <= 12 else ():
        axes.annotate(
            f"{height}x{width}", (width, height), (7, 0), textcoords="offset points", va="center", color=ORANGE,
            fontsize=8, fontweight="bold",
        )  # fmt: skip
    axes.plot([0, limit], [0, limit], color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, limit), ylim=(0, limit), xlabel="width [pixels]", ylabel="height [pixels]")
    return _inline(figure, "Sizes of the clips", note)


def _lengths_plot(report: Report, clips: ClipTable) -> Plot | None:
    """How long the clips are, in frames at the target rate."""
    usable = pc.equal(clips.table.column("status"), "ok").to_numpy()
    frames = clips.frames[usable]
    if not len(frames):
        return None
    lengths = sorted({one.shape.frames for one in report.buckets})
    end = max(2 * lengths[-1], int(np.quantile(frames, 0.95)), 10)
    beyond = int((frames > end).sum())
    figure = _figure(6.4, 3.4)
    axes = figure.subplots()
    counts, edges = np.histogram(frames[frames <= end], bins=min(60, end), range=(0.5, end + 0.5))
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BLUE, alpha=0.75)
    for length in lengths:
        axes.axvline(length, color=ORANGE, linewidth=1.5)
        axes.annotate(str(length), (length, 1), (3, -4), xycoords=("data", "axes fraction"),
                      textcoords="offset points", color=ORANGE, va="top", fontsize=9)  # fmt: skip
    axes.set(xlabel="frames at the target rate", ylabel="clips", xlim=(0, end + 1))
    note = f"{len(frames):,} clips; lines are the buckets' lengths"
    return _inline(figure, "Lengths of the clips", note + (f"; {beyond:,} clips are longer still" if beyond else ""))


def _clips_plot(report: Report) -> Plot:
    """Samples of each bucket, and what of its clips' picture is cut away."""
    names = [str(one.shape) for one in report.buckets]
    figure = _figure(6.4, 1.3 + 0.28 * len(names))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    left.barh(names, [one.num_samples for one in report.buckets], color=BLUE)
    left.set(xlabel="samples")
    right.barh(names, [100 * one.crop_share for one in report.buckets], color=ORANGE)
    right.set(xlabel="cut away [%]", xlim=(0, max(10, *(110 * one.crop_share for one in report.buckets))))
    left.invert_yaxis()
    return _inline(figure, "Samples and cropping by bucket", "samples of one pass; mean share of the picture cut away")


def _memory_plot(report: Report) -> Plot:
    """The terms of the memory estimate, stacked."""
    names = [str(one.shape) for one in report.buckets]
    groups = (
        ("frozen weights", BLUE, ("base weights", "gathered weights", "unpacked weight", "vae weights")),
        ("LoRA and its optimizer", "#7a6bb5", ("lora weights", "lora gradients", "optimizer state")),
        ("kept activations", ORANGE, ("kept activations",)),
        ("one block", "#f0b27a", ("block activations",)),
        ("buffers, inputs, CUDA", GREY, ("reduce buffers", "rotary tables", "inputs and loss", "cuda context")),
    )
    figure = _figure(6.4, 1.7 + 0.28 * len(names))
    axes, start = figure.subplots(), np.zeros(len(names))
    for label, colour, terms in groups:
        sizes = np.array([sum(one.memory.terms()[term] for term in terms) / 1e9 for one in report.buckets])
        axes.barh(names, sizes, left=start, color=colour, label=label)
        start += sizes
    axes.invert_yaxis()
    axes.set(xlabel="GB on one GPU in the backward pass")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _inline(figure, "GPU memory by bucket", ESTIMATE_NOTE)
