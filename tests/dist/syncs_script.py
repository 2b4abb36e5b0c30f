"""Run by test_syncs.py: trains as `launch/train.py` does and writes down where a step reads a value off its tensors,
and where it waits for the device outright."""

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
    """Who is asking: package, file and function."""
    frames = traceback.extract_stack()[:-2]
    own = [one for one in frames if "/torch/" not in one.filename and one.filename != __file__]
    parts = Path(own[-1].filename).parts
    package = next((one for one in ("deepspeed", "diffusers", "peft", "cogds") if one in parts), "other")
    return f"{package}:{Path(own[-1].filename).name}:{own[-1].name}"


class Reads(TorchDispatchMode):
    """Where `item()`, `tolist()`, `if tensor` and the like stand: on a GPU each waits for all that is queued."""

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
# DeepSpeed waits through an object of its own, on a CPU for nothing.
torch.cuda.synchronize = get_accelerator().synchronize = synchronize
call("train", sys.argv[1:], starts_ranks=False)
Path(os.environ["READS"]).write_text(json.dumps({"reads": Reads.steps, "waits": waits}))
