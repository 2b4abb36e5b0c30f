"""Run by test_syncs.py: trains as `launch/train.py` does and writes down where a step reads a value off its tensors."""

import json
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import cogds.loop  # noqa: E402
from cogds.train import main  # noqa: E402


class Reads(TorchDispatchMode):
    """Where `item()`, `tolist()`, `if tensor` and the like stand: on a GPU each waits for all that is queued."""

    steps: list[list[str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::_local_scalar_dense":
            own = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            parts = Path(own[-1].filename).parts
            package = next((one for one in ("deepspeed", "diffusers", "peft", "cogds") if one in parts), "other")
            self.steps[-1].append(f"{package}:{Path(own[-1].filename).name}:{own[-1].name}")
        return function(*args, **(kwargs or {}))


train_step = cogds.loop.train_step


def watched(*args):
    Reads.steps.append([])
    with Reads():
        return train_step(*args)


cogds.loop.train_step = watched
main(ROOT / "ds_configs/zero2.json", ROOT / "launch/configs/demo.yaml", sys.argv[1:])
Path(os.environ["READS"]).write_text(json.dumps(Reads.steps))
