"""TensorBoard's event file: its name, and its records as bytes. `async_writer` writes them."""

import io
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

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

# The Custom Scalars tab: category -> chart -> the tags in it, as regular expressions.
LAYOUT: dict[str, dict[str, list[str]]] = {
    "overview": {
        "loss": [r"^train/loss$", r"^eval/(train_)?loss$"],
        "gradient norm before clipping": [r"^train/grad_norm$"],
        "learning rate": [r"^train/lr$"],
        "seconds per step": [r"^perf/step_s$"],
    },
    "loss": {
        "by bucket": [r"^train/loss/bucket=.*"],
        "by timestep (q1: least noisy quarter)": [r"^train/loss/t_q\d$"],
        "skipped steps": [r"^train/skipped$"],
    },
    "evaluation": {
        "loss of held-out and of trained clips": [r"^eval/(train_)?loss$"],
        "held out, by bucket": [r"^eval/loss/bucket=.*"],
        "held out, by timestep": [r"^eval/loss/t=.*"],
        "trained, by bucket": [r"^eval/train_loss/bucket=.*"],
        "trained, by timestep": [r"^eval/train_loss/t=.*"],
    },
    "speed": {
        "phases of a step, seconds": [r"^perf/(data_wait|forward|backward|inputs|optimizer|step)_s$"],
        "tokens/s": [r"^perf/tokens_per_s$"],
        "samples/s": [r"^perf/samples_per_s$"],
        "model TFLOP/s per GPU": [r"^perf/tflops$"],
        "MFU": [r"^perf/mfu$"],
        "slowest rank / median rank": [r"^perf/rank_skew$"],
        "saving, seconds": [r"^checkpoint/.*_s$"],
    },
    "memory": {
        "peak of the device, GB": [r"^(perf|callbacks)/peak_memory_gb$", r"^memory/(predicted|measured)_gb$"],
        "peak of the host, GB": [r"^perf/peak_host_memory_gb$"],
    },
    "data": {
        "share of a step waiting for data": [r"^perf/data_wait$"],
        "share of clips seen": [r"^data/coverage$"],
        "epoch": [r"^train/epoch$"],
    },
    "LoRA": {
        "norm of the weights by depth": [r"^lora/weight_norm/.*"],
        "norm of the update by depth": [r"^lora/update_norm/.*"],
    },
}


def event_file(folder: Path, first_step: int) -> AppendFile:
    """Return the event file of a run that starts after `first_step`; TensorBoard hides later steps of older files."""
    header = event_bytes(Event(file_version="brain.Event:2"))
    if first_step:
        header += event_bytes(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))
    # TensorBoard reads the files of a folder in the order of their names, so the name starts with the time.
    return AppendFile(folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}", header)


def event_bytes(event: Event) -> bytes:
    """Return an event in the format of TensorBoard's files."""
    event.wall_time = time.time()
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def scalars_record(step: int, scalars: Mapping[str, float]) -> bytes:
    """Return the record of one step's scalars."""
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


def layout_record(layout: Mapping[str, Mapping[str, Sequence[str]]]) -> bytes:
    """Return the record of the Custom Scalars tab's layout: category -> chart -> regular expressions of tags."""
    charts = {
        category: {title: ["Multiline", list(tags)] for title, tags in inner.items()}
        for category, inner in layout.items()
    }
    return event_bytes(Event(summary=layout_summary(charts)))


def hparams_records(settings: Mapping[str, str | float | bool], metrics: Sequence[str]) -> tuple[list[bytes], bytes]:
    """Return the records of the HParams tab for a run's start, and the one for its end.

    metrics: tags of the scalars to compare runs by.
    """
    experiment, start, end = hparams_summaries(dict(settings), dict.fromkeys(metrics, 0.0))
    return [event_bytes(Event(summary=experiment)), event_bytes(Event(summary=start))], event_bytes(Event(summary=end))
