"""Run by test_syncs.py: `launch/train.py` that also records where a step reads tensors or waits for the device.

Writes the places to the file named by READS.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import cogds.train.trainer  # noqa: E402
from cogds.cli import call  # noqa: E402


def place():
    """Return package, file and function of the caller."""
    frames = traceback.extract_stack()[:-2]
    own = [frame for frame in frames if "/torch/" not in frame.filename and frame.filename != __file__]
    parts = Path(own[-1].filename).parts
    package = next((name for name in ("deepspeed", "diffusers", "peft", "cogds") if name in parts), "other")
    return f"{package}:{Path(own[-1].filename).name}:{own[-1].name}"


class Reads(TorchDispatchMode):
    """Records calls such as `item()`, `tolist()` and `if tensor`. On a GPU each waits for all queued work."""

    steps: ClassVar[list[list[str]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::_local_scalar_dense":
            self.steps[-1].append(place())
        return function(*args, **(kwargs or {}))


train_step, waits, active = cogds.train.trainer.train_step, [], []


def record_step(*args):
    Reads.steps.append([])
    active.append(True)
    with Reads():
        result = train_step(*args)
    active.clear()
    return result


def synchronize(*_):
    if active:
        waits.append(place())


cogds.train.trainer.train_step = record_step
# DeepSpeed waits through its own object, which does nothing on a CPU.
torch.cuda.synchronize = get_accelerator().synchronize = synchronize
call("train", sys.argv[1:], starts_ranks=False)
Path(os.environ["READS"]).write_text(json.dumps({"reads": Reads.steps, "waits": waits}))
