"""Run by test_samples.py: `launch/train.py` that also saves the frames of every video before compression."""

import itertools
import sys
from pathlib import Path

ROOT, folder = Path(__file__).resolve().parents[2], Path(sys.argv.pop(1))
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import cogds.train.samples  # noqa: E402
from cogds.cli import call, run  # noqa: E402
from cogds.distributed.world import read_world  # noqa: E402

number, write_video = itertools.count(), cogds.train.samples.write_video


def keep(path, frames, fps):
    shape = "x".join(map(str, frames.shape[:3]))
    np.save(folder / f"{shape}-{next(number):03d}-rank{read_world().rank}.npy", frames)
    write_video(path, frames, fps)


cogds.train.samples.write_video = keep
sys.exit(run(lambda: call("train", sys.argv[1:], starts_ranks=False)))
