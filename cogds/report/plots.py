"""The plots of the report page. They contain numbers and bucket names only, nothing that users wrote."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from cogds.formatting import counted, percent
from cogds.metrics.figures import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PALE_ORANGE,
    PURPLE,
    draw_bars,
    new_figure,
    plot_style,
    to_svg,
)
from cogds.report.analysis import ClipTable, Report
from cogds.report.text import ESTIMATE_NOTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 1500
# Bucket labels closer than this share of the axes are left out.
LABEL_WIDTH, LABEL_HEIGHT, LENGTH_LABEL_WIDTH = 0.17, 0.04, 0.06
MEMORY_GROUPS = (
    ("frozen weights", BLUE, ("base weights", "gathered weights", "unpacked weight", "vae weights")),
    (
        "trained weights and optimizer",
        PURPLE,
        ("trained weights", "trained gradients", "optimizer state", "moving average"),
    ),
    ("encoding on the fly", GREEN, ("text encoder weights", "second vae weights", "clip encode")),
    ("kept activations", ORANGE, ("kept activations",)),
    ("one block", PALE_ORANGE, ("block activations",)),
    ("buffers, inputs, CUDA", GRAY, ("reduce buffers", "rotary tables", "inputs and loss", "cuda context")),
)


@dataclass(frozen=True)
class Plot:
    """A plot as an `<svg>` element, with a title and a note."""

    svg: str
    title: str
    note: str


def make_plots(report: Report, clips: ClipTable) -> list[Plot]:
    """Draw the clips' sizes and lengths, and the samples and the memory of each bucket that has clips."""
    functions = [_plot_sizes, _plot_lengths, _plot_samples, _plot_memory]
    with plot_style():
        drawn = [result for function in functions if (result := function(report, clips))]
        return [Plot(to_svg(figure, f"{title}. {note}"), title, note) for figure, title, note in drawn]


def _plot_sizes(report: Report, clips: ClipTable) -> "tuple[Figure, str, str] | None":
    """Every distinct size as a disc whose area grows with its number of clips, and the buckets as squares."""
    usable = pc.equal(clips.table.column("status"), "ok")
    widths, heights = (pc.fill_null(clips.table.column(name), 0).to_numpy() for name in ("width", "height"))
    shown = usable.to_numpy() & (widths > 0) & (heights > 0)
    code, counts = np.unique(widths[shown].astype(np.int64) << 32 | heights[shown].astype(np.int64), return_counts=True)
    if not len(code):
        return None
    order = np.argsort(-counts, kind="stable")[:MAX_POINTS]
    note = f"{counted(len(code), 'size')} of {counted(int(counts.sum()), 'clip')}. "
    if len(code) > MAX_POINTS:
        share = counts[order].sum() / counts.sum()
        note += f"Shown are the {MAX_POINTS:,} most frequent, {percent(share)} of the clips. "
    note += "Squares are buckets. Clips on the diagonal are square."
    figure = new_figure(6.4, 5.2)
    axes = figure.subplots()
    x, y = code[order] >> 32, code[order] & 0xFFFFFFFF
    area = 12 + 500 * np.sqrt(counts[order] / counts.max())
    axes.scatter(x, y, s=area, color=BLUE, alpha=0.35, linewidths=0)
    sizes = sorted({(bucket.shape.width, bucket.shape.height) for bucket in report.buckets})
    limit = 1.12 * max(int(x.max()), int(y.max()), *(side for size in sizes for side in size))
    bucket_x, bucket_y = zip(*sizes)
    axes.scatter(bucket_x, bucket_y, marker="s", s=46, facecolors="none", edgecolors=ORANGE, linewidths=2, zorder=3)
    _label_sizes(axes, sizes, limit)
    axes.plot([0, limit], [0, limit], color=GRAY, linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, limit), ylim=(0, limit), xlabel="width [pixels]", ylabel="height [pixels]")
    return figure, "Clip sizes", note


def _label_sizes(axes: "Axes", sizes: list[tuple[int, int]], limit: float) -> None:
    """Label the buckets, largest first, leaving out labels that would overlap others."""
    labeled: list[tuple[int, int]] = []
    for width, height in sorted(sizes, key=lambda size: -size[0] * size[1]):
        if any(abs(width - w) < LABEL_WIDTH * limit and abs(height - h) < LABEL_HEIGHT * limit for w, h in labeled):
            continue
        labeled.append((width, height))
        # Near the right edge, the label goes to the left of its square.
        is_right = width > (1 - LABEL_WIDTH) * limit
        axes.annotate(
            f"{height}x{width}", (width, height), (-7 if is_right else 7, 0), textcoords="offset points", va="center",
            ha="right" if is_right else "left", color=ORANGE, fontsize=8, fontweight="bold",
        )  # fmt: skip


def _plot_lengths(report: Report, clips: ClipTable) -> "tuple[Figure, str, str] | None":
    """Histogram of the clips' lengths, in frames at the target frame rate."""
    from matplotlib.ticker import MaxNLocator

    usable = pc.equal(clips.table.column("status"), "ok").to_numpy()
    frames = clips.frames[usable]
    if not len(frames):
        return None
    lengths = sorted({bucket.shape.frames for bucket in report.buckets})
    end = max(2 * lengths[-1], int(np.quantile(frames, 0.95)), 10)
    num_longer = int((frames > end).sum())
    figure = new_figure(6.4, 3.4)
    axes = figure.subplots()
    counts, edges = np.histogram(frames[frames <= end], bins=min(60, end), range=(0.5, end + 0.5))
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BLUE, alpha=0.75)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    labeled = -end
    for length in lengths:
        axes.axvline(length, color=ORANGE, linewidth=1.5)
        if length - labeled < LENGTH_LABEL_WIDTH * end:
            continue
        labeled = length
        axes.annotate(str(length), (length, 1), (3, -4), xycoords=("data", "axes fraction"),
                      textcoords="offset points", color=ORANGE, va="top", fontsize=9)  # fmt: skip
    axes.set(xlabel="frames at the target frame rate", ylabel="clips", xlim=(0, end + 1))
    note = f"{counted(len(frames), 'clip')}. Lines are the buckets' lengths."
    return figure, "Clip lengths", note + (f" Not shown: {counted(num_longer, 'longer clip')}." if num_longer else "")


def _plot_samples(report: Report, _clips: ClipTable) -> "tuple[Figure, str, str] | None":
    """Samples and mean crop of each bucket that has clips."""
    from matplotlib.ticker import MaxNLocator

    if not (buckets := report.used_buckets):
        return None
    names = [str(bucket.shape) for bucket in buckets]
    figure = new_figure(6.4, 1.3 + 0.28 * len(names))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    draw_bars(left, names, [("samples", [bucket.num_samples for bucket in buckets], BLUE)])
    left.set(xlabel="samples")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    crops = [100 * bucket.crop_share for bucket in buckets]
    right.barh(range(len(names)), crops, color=ORANGE)
    right.set(xlabel="cropped away [%]", xlim=(0, max(10, 1.1 * max(crops))))
    note = "Samples of one epoch without repeats, and the mean share of the picture cropped away."
    return figure, "Samples and cropping by bucket", note


def _plot_memory(report: Report, _clips: ClipTable) -> "tuple[Figure, str, str] | None":
    """The terms of the memory estimate, stacked, for each bucket that has clips."""
    if not (buckets := report.used_buckets):
        return None
    names = [str(bucket.shape) for bucket in buckets]
    figure = new_figure(6.4, 1.7 + 0.28 * len(names))
    axes, start = figure.subplots(), np.zeros(len(names))
    for label, color, terms in MEMORY_GROUPS:
        sizes = np.array([sum(bucket.memory.terms()[term] for term in terms) / 1e9 for bucket in buckets])
        axes.barh(names, sizes, left=start, color=color, label=label)
        start += sizes
    axes.invert_yaxis()
    axes.set(xlabel="GB on one GPU in the backward pass")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure, "GPU memory by bucket", ESTIMATE_NOTE
