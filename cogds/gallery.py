"""The gallery verb: a page with the videos that a run made, steps beside prompts, and its loss curve.

The page is a file without a server or network access. It refers to the videos in the run's folder, or contains them
(--embed).
"""

import argparse
import filecmp
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from cogds.errors import UserError, refuse_to_run
from cogds.formatting import counted, gigabytes
from cogds.metrics.figures import BLUE, GREEN, ORANGE, new_figure, plot_style, to_svg
from cogds.metrics.jsonl import read_scalars
from cogds.pages.page import data_uri, read_script, render, write_page
from cogds.process.logs import RESULT
from cogds.videos.sample_folder import Prompt, PromptVideos, read_videos

logger = logging.getLogger(__name__)

PAGE_NAME = "gallery.html"
SIZE_WARNING_BYTES = 200e6
MAX_POINTS = 2000
CURVES = (
    ("train/loss", "training", BLUE),
    ("eval/loss", "held-out clips", ORANGE),
    ("eval/train_loss", "trained clips, evaluated", GREEN),
)
SMOOTHING = 0.02  # part of the steps over which the training loss is averaged


@dataclass(frozen=True)
class Column:
    """The videos of the base model, or of a step. note: the loss then."""

    title: str
    note: str


@dataclass(frozen=True)
class Row:
    """The videos of a prompt as addresses, one per column; None if there is none."""

    prompt: Prompt
    first_frame: str | None
    is_tall: bool
    videos: Sequence[str | None]


def main(args: argparse.Namespace) -> None:
    """Write the page of a run."""
    run = Path(args.run)
    output = args.output or run / PAGE_NAME
    videos = find_videos(run)
    files = [file for prompt in videos for file in (prompt.base, *prompt.by_step.values()) if file]
    num_bytes = sum(file.stat().st_size for file in files)
    if args.embed and num_bytes > SIZE_WARNING_BYTES:
        logger.warning(f"{output}: contains {gigabytes(num_bytes)} of videos. Browsers may be slow; leave out --embed.")
    write_page(output, gallery_page(run, videos, embed if args.embed else relative_to(output)))
    logger.log(RESULT, "%s: videos of %s", output, counted(len(videos), "prompt"))


def find_videos(run: Path) -> list[PromptVideos]:
    """Return the videos of a run. Raises UserError if there are none."""
    if not run.is_dir():
        raise UserError(f"{run}: no such directory. Pass the output_dir of a run.")
    videos = read_videos(run / "samples")
    if not videos:
        raise UserError(
            f"{run / 'samples'}: no videos. Pass the output_dir of a run with sample.every set, after its first videos."
        )
    return videos


def relative_to(page: Path) -> Callable[[Path], str]:
    """Return a function from a file to its address in a page."""
    return lambda file: quote(Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix())


def embed(file: Path) -> str:
    """Return a file as a data URI."""
    return data_uri(file.read_bytes(), {".mp4": "video/mp4", ".png": "image/png"}[file.suffix])


def gallery_page(run: Path, videos: Sequence[PromptVideos], address: Callable[[Path], str]) -> str:
    """Render the page. address: of a file."""
    scalars = read_scalars(run / "metrics.jsonl", [name for name, *_ in CURVES])
    steps = sorted({step for prompt in videos for step in prompt.by_step})
    has_base = any(prompt.base for prompt in videos)
    # A run that starts from the base model has its videos twice.
    is_untrained = 0 in steps and all(
        prompt.base and 0 in prompt.by_step and filecmp.cmp(prompt.base, prompt.by_step[0], shallow=False)
        for prompt in videos
    )
    steps = steps[1:] if is_untrained else steps
    columns = [Column("base model", _loss_note(scalars, 0) if is_untrained else "")] if has_base else []
    columns += [Column(f"step {step}", _loss_note(scalars, step)) for step in steps]
    rows = []
    for prompt in videos:
        files = [prompt.base] if has_base else []
        files += [prompt.by_step.get(step) for step in steps]
        rows.append(
            Row(
                prompt.prompt,
                address(prompt.first_frame) if prompt.first_frame else None,
                _is_tall(prompt.prompt),
                [address(file) if file else None for file in files],
            )
        )
    script, script_digest = read_script("gallery.js")
    curve, note = draw_losses(scalars)
    return render(
        "gallery.html.j2", name=str(run), rows=rows, columns=columns, num_steps=len(steps),
        curve=curve, curve_note=note, script=script, script_digest=script_digest,
    )  # fmt: skip


def _is_tall(prompt: Prompt) -> bool:
    """Whether the videos are higher than wide."""
    try:
        _, height, width = map(int, (prompt.size or "").split("x"))
    except ValueError:
        return False
    return height > width


def _loss_note(scalars: Mapping[str, Sequence[tuple[int, float]]], step: int) -> str:
    """Return the evaluation loss at a step, or "" if there is none."""
    names = {"eval/loss": "held-out loss", "eval/train_loss": "loss of trained clips"}
    for name, noun in names.items():
        if (value := dict(scalars[name]).get(step)) is not None:
            return f"{noun} {value:.4f}"
    return ""


def draw_losses(scalars: Mapping[str, Sequence[tuple[int, float]]]) -> tuple[str, str]:
    """Draw the losses as an `<svg>` element with a note; "" if there are none. scalars: (step, value) pairs by tag."""
    if not any(scalars.values()):
        return "", ""
    with plot_style():
        figure = new_figure(9, 3.4)
        axes, note = figure.subplots(), ""
        for name, label, color in CURVES:
            if not scalars[name]:
                continue
            steps, values = map(np.array, zip(*scalars[name]))
            if name == "train/loss":
                window = max(1, round(SMOOTHING * len(values)))
                if window > 1:
                    note = f"The training loss is the mean of {window} steps; single steps are pale."
                shown = slice(None, None, -(-len(values) // MAX_POINTS))
                axes.plot(steps[shown], values[shown], color=color, alpha=0.25, linewidth=1)
                steps, values = (_moving_mean(points, window)[shown] for points in (steps, values))
                axes.plot(steps, values, color=color, linewidth=1.8, label=label)
            else:
                axes.plot(steps, values, color=color, marker="o", markersize=4, linewidth=1.8, label=label)
        axes.set(xlabel="step", ylabel="loss")
        axes.grid(alpha=0.2)
        figure.legend(loc="outside upper center", ncols=len(CURVES), frameon=False)
        return to_svg(figure, "Losses by step"), note


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the means of `window` neighbors."""
    return np.convolve(values, np.full(window, 1 / window), "valid")


if __name__ == "__main__":
    refuse_to_run("cogds.gallery", "gallery")
