"""TensorBoard's event file: its name, and its records as bytes. `async_writer` writes them."""

import io
import os
import re
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars as layout_summary
from torch.utils.tensorboard.summary import hparams as hparams_summaries
from torch.utils.tensorboard.summary import text as text_summary

from cogds.metrics.async_writer import AppendFile
from cogds.metrics.images import encode_gif, encode_image

RGB = 3  # TensorBoard's number for this color space

NUM_SHOWN_HPARAMS = 5  # TensorBoard's constant

# Copies of the losses under names that the first tab, Time Series, sorts before all others (ASCII).
COPIES = {
    "train/loss": "Loss/training",
    "eval/loss": "Loss/held-out clips",
    "eval/train_loss": "Loss/trained clips",
}

# The Custom Scalars tab: category -> title of a chart -> the tag in it, as a regular expression. Each tag that matches
# has a chart of its own, because TensorBoard draws all tags of a run in one color. A group is added to the title.
LAYOUT: dict[str, dict[str, str]] = {
    "overview": {
        "loss": "train/loss",
        "loss of held-out clips": "eval/loss",
        "loss of trained clips, evaluated": "eval/train_loss",
        "gradient norm before clipping": "train/grad_norm",
        "learning rate": "train/lr",
        "seconds per step": "perf/step_s",
    },
    "loss": {
        "bucket": r"train/loss/bucket=(.*)",
        "timesteps (1: least noisy quarter)": r"train/loss/t_q(\d)",
        "skipped steps": "train/skipped",
    },
    "evaluation": {
        "held out, bucket": r"eval/loss/bucket=(.*)",
        "held out, timestep": r"eval/loss/t=(.*)",
        "held out, condition mode": r"eval/loss/mode=(.*)",
        "trained, bucket": r"eval/train_loss/bucket=(.*)",
        "trained, timestep": r"eval/train_loss/t=(.*)",
        "trained, condition mode": r"eval/train_loss/mode=(.*)",
    },
    "speed": {
        "seconds": r"perf/(data_wait|forward|backward|inputs|optimizer)_s",
        "tokens/s": "perf/tokens_per_s",
        "samples/s": "perf/samples_per_s",
        "model TFLOP/s per GPU": "perf/tflops",
        "MFU": "perf/mfu",
        "slowest rank / median rank": "perf/rank_skew",
        "saving, seconds": r"checkpoint/(.*)_s",
    },
    "memory": {
        "peak of the device, GB": "perf/peak_memory_gb",
        "peak of the device in evaluations and videos, GB": "callbacks/peak_memory_gb",
        "memory check, GB": r"memory/(predicted|measured)_gb",
        "peak of the host, GB": "perf/peak_host_memory_gb",
    },
    "data": {
        "share of a step waiting for data": "perf/data_wait",
        "share of clips seen": "data/coverage",
        "epoch": "train/epoch",
    },
    "LoRA": {
        "norm of the weights, blocks": r"lora/weight_norm/blocks=(.*)",
        "norm of the update, blocks": r"lora/update_norm/blocks=(.*)",
    },
}


def board_folder(output_dir: Path) -> Path:
    """Return the folder of a run's event files: `tensorboard/NAME`, because TensorBoard calls a run by its folder.

    A run whose event files are in `tensorboard/` itself is continued there.
    """
    folder = output_dir / "tensorboard"
    return folder if any(folder.glob("events.out.tfevents.*")) else folder / output_dir.resolve().name


def event_file(output_dir: Path, first_step: int) -> AppendFile:
    """Return the event file of a run that starts after `first_step`; TensorBoard hides later steps of older files."""
    header = event_bytes(Event(file_version="brain.Event:2"))
    if first_step:
        header += event_bytes(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))
    # TensorBoard reads the files of a folder in the order of their names, so the name starts with the time.
    name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
    return AppendFile(board_folder(output_dir) / name, header, num_folders=2)


def event_bytes(event: Event) -> bytes:
    """Return an event in the format of TensorBoard's files."""
    event.wall_time = time.time()
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def scalars_record(step: int, scalars: Mapping[str, float]) -> bytes:
    """Return the record of one step's scalars, with the copies that TensorBoard shows first."""
    scalars = {**scalars, **{COPIES[name]: value for name, value in scalars.items() if name in COPIES}}
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    return event_bytes(Event(step=step, summary=Summary(value=values)))


def text_record(name: str, text: str) -> bytes:
    """Return the record of a text that is shown verbatim, not as Markdown."""
    return event_bytes(Event(summary=text_summary(name, "    " + text.replace("\n", "\n    "))))


def image_record(name: str, step: int, pixels: np.ndarray) -> bytes:
    """Return the record of an image, uint8 [H, W, 3]; see `encode_image` for its size."""
    return _image_record(name, step, *encode_image(pixels))


def gif_record(name: str, step: int, frames: np.ndarray, fps: float) -> bytes:
    """Return the record of a clip, uint8 [F, H, W, 3], that plays in the Images tab; see `encode_gif` for its size."""
    return _image_record(name, step, *encode_gif(frames, fps))


def _image_record(name: str, step: int, data: bytes, height: int, width: int) -> bytes:
    image = Summary.Image(height=height, width=width, colorspace=RGB, encoded_image_string=data)
    return event_bytes(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))


def layout_record(tags: Collection[str]) -> bytes:
    """Return the record of the Custom Scalars tab's layout: the charts of LAYOUT that have a tag."""
    charts: dict[str, dict[str, list[Any]]] = {}
    for category, patterns in LAYOUT.items():
        for title, pattern in patterns.items():
            for tag in sorted(tags):
                if match := re.fullmatch(pattern, tag):
                    name = " ".join([title, *match.groups()])
                    charts.setdefault(category, {})[name] = ["Multiline", [f"^{re.escape(tag)}$"]]
    return event_bytes(Event(summary=layout_summary(charts)))


def hparams_records(settings: Mapping[str, str | float | bool], metrics: Sequence[str]) -> tuple[list[bytes], bytes]:
    """Return the records of the HParams tab for a run's start, and the one for its end.

    settings: the tab sorts them by name and first shows NUM_SHOWN_HPARAMS. metrics: tags of the scalars to compare
    runs by.
    """
    experiment, start, end = hparams_summaries(dict(settings), dict.fromkeys(metrics, 0.0))
    return [event_bytes(Event(summary=experiment)), event_bytes(Event(summary=start))], event_bytes(Event(summary=end))
