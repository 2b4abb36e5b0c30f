"""Run by test_syncs.py: trains as `launch/train.py` does, and records which code reads values of tensors in a step or
waits for the device.
"""

import json
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import cogds.train.trainer  # noqa: E402
from cogds.cli import call  # noqa: E402


def place():
    """The caller: package, file and function."""
    frames = traceback.extract_stack()[:-2]
    own = [frame for frame in frames if "/torch/" not in frame.filename and frame.filename != __file__]
    parts = Path(own[-1].filename).parts
    package = next((name for name in ("deepspeed", "diffusers", "peft", "cogds") if name in parts), "other")
    return f"{package}:{Path(own[-1].filename).name}:{own[-1].name}"


class Reads(TorchDispatchMode):
    """Records calls such as `item()`, `tolist()` and `if tensor`. On a GPU each waits for all queued work."""

    steps: list[list[str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::_local_scalar_dense":
            self.steps[-1].append(place())
        return function(*args, **(kwargs or {}))


train_step, waits, watching = cogds.train.trainer.train_step, [], []


def watched(*args):
    Reads.steps.append([])
    watching.append(True)
    with Reads():
        result = train_step(*args)
    watching.clear()
    return result


def synchronize(*_):
    if watching:
        waits.append(place())


cogds.train.trainer.train_step = watched
# DeepSpeed waits through its own object, which does nothing on a CPU.
torch.cuda.synchronize = get_accelerator().synchronize = synchronize
call("train", sys.argv[1:], starts_ranks=False)
Path(os.environ["READS"]).write_text(json.dumps({"reads": Reads.steps, "waits": waits}))
