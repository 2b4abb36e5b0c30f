"""TensorBoard's file: what goes into it, as bytes.

`open_board` names the file of a run; each `*_record` is one event as it stands there. Nothing here writes:
`metrics.async_writer` does.
"""

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

from cogds.metrics.async_writer import Outlet
from cogds.metrics.images import encode_animation, encode_picture

RGB = 3  # of TensorBoard's colour spaces

# The Custom Scalars tab: category -> chart -> the tags in it, as regular expressions.
LAYOUT: dict[str, dict[str, list[str]]] = {
    "overview": {
        "loss": [r"^train/loss$", r"^eval/(train_)?loss$"],
        "gradient norm before clipping": [r"^train/grad_norm$"],
        "learning rate": [r"^train/lr$"],
        "seconds a step": [r"^perf/step_s$"],
    },
    "loss": {
        "by bucket": [r"^train/loss/bucket=.*"],
        "by timestep, q1 the least noisy quarter": [r"^train/loss/t_q\d$"],
        "skipped steps": [r"^train/skipped$"],
    },
    "evaluation": {
        "loss of clips held out, and of trained ones": [r"^eval/(train_)?loss$"],
        "held out, by bucket": [r"^eval/loss/bucket=.*"],
        "held out, by timestep": [r"^eval/loss/t=.*"],
        "trained, by bucket": [r"^eval/train_loss/bucket=.*"],
        "trained, by timestep": [r"^eval/train_loss/t=.*"],
    },
    "speed": {
        "where a step goes, seconds": [r"^perf/(data_wait|forward|backward|inputs|optimizer|step)_s$"],
        "tokens/s": [r"^perf/tokens_per_s$"],
        "samples/s": [r"^perf/samples_per_s$"],
        "model TFLOP/s of a GPU": [r"^perf/tflops$"],
        "MFU": [r"^perf/mfu$"],
        "slowest rank over the median": [r"^perf/rank_skew$"],
        "saves, seconds": [r"^checkpoint/.*_s$"],
    },
    "memory": {
        "peak of the device, GB": [r"^(perf|callbacks)/peak_memory_gb$", r"^memory/(predicted|measured)_gb$"],
        "peak of the host, GB": [r"^perf/peak_host_memory_gb$"],
    },
    "data": {
        "share of a step spent waiting for data": [r"^perf/data_wait$"],
        "share of the clips seen": [r"^data/coverage$"],
        "epoch": [r"^train/epoch$"],
    },
    "LoRA": {
        "norm of the weights by depth": [r"^lora/weight_norm/.*"],
        "norm of one step's update by depth": [r"^lora/update_norm/.*"],
    },
}


def open_board(folder: Path, first_step: int) -> Outlet:
    """TensorBoard's file of a run that has trained `first_step` steps: later ones of earlier files are hidden."""
    head = framed(Event(file_version="brain.Event:2"))
    if first_step:
        head += framed(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))
    # In the order of time, which is how TensorBoard reads a folder; no two of one host are alike.
    return Outlet(folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}", head)


def framed(event: Event) -> bytes:
    """An event as it stands in TensorBoard's files."""
    event.wall_time = time.time()
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def scalars_record(step: int, scalars: Mapping[str, float]) -> bytes:
    """Scalars of one step."""
    values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    return framed(Event(step=step, summary=Summary(value=values)))


def text_record(name: str, text: str) -> bytes:
    """A text that is shown as it is, without being read as Markdown."""
    return framed(Event(summary=text_summary(name, "    " + text.replace("\n", "\n    "))))


def picture_record(step: int, name: str, pixels: np.ndarray) -> bytes:
    """A picture uint8 [H, W, 3]; see `encode_picture` for its size."""
    return _image_record(step, name, *encode_picture(pixels))


def animation_record(step: int, name: str, frames: np.ndarray, fps: float) -> bytes:
    """Frames uint8 [F, H, W, 3] that play in the Images tab; see `encode_animation` for their size."""
    return _image_record(step, name, *encode_animation(frames, fps))


def _image_record(step: int, name: str, data: bytes, height: int, width: int) -> bytes:
    image = Summary.Image(height=height, width=width, colorspace=RGB, encoded_image_string=data)
    return framed(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))


def layout_record(layout: Mapping[str, Mapping[str, Sequence[str]]]) -> bytes:
    """What the Custom Scalars tab shows: category -> chart -> regular expressions of tags."""
    charts = {
        category: {title: ["Multiline", list(tags)] for title, tags in inner.items()}
        for category, inner in layout.items()
    }
    return framed(Event(summary=layout_summary(charts)))


def hparams_records(settings: Mapping[str, str | float | bool], metrics: Sequence[str]) -> tuple[list[bytes], bytes]:
    """What the HParams tab compares runs by: the records of a run's beginning, and that of its end.

    metrics: tags of scalars to compare.
    """
    experiment, start, end = hparams_summaries(dict(settings), dict.fromkeys(metrics, 0.0))
    return [framed(Event(summary=experiment)), framed(Event(summary=start))], framed(Event(summary=end))
