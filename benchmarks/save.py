"""Measure how long it takes to write a checkpoint, and how long that blocks the training thread.

    python benchmarks/save.py --folder DIR [--gb 1.6]

Writes a state of this size in the background, as in training, while the main thread reads the clock. Prints one line of
JSON: seconds of the write, including digests and fsync, and the longest time that the main thread was blocked.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cogds.distributed.world import World  # noqa: E402
from cogds.engine.checkpoint import Saver, write  # noqa: E402
from cogds.engine.state import TrainState  # noqa: E402

NUM_TENSORS = 1008  # 336 LoRA tensors on the attention layers of the 5B model, and two moments for each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder to write to; the checkpoint is not removed")
    parser.add_argument("--gb", type=float, default=1.6, help="size of the state")
    args = parser.parse_args()
    size = int(args.gb * 1e9 / 4 / NUM_TENSORS)
    state = TrainState({f"weight/{number}": torch.randn(size) for number in range(NUM_TENSORS)}, 1)
    saver, longest_s = Saver(), 0.0
    saver.start(lambda: write(args.folder, 1, state, {}, 1, None) and None)
    before = time.perf_counter()
    while not saver.is_done:
        time.sleep(0.001)
        now = time.perf_counter()
        longest_s, before = max(longest_s, now - before), now
    write_s = saver.finish(World(0, 1, 0, 1))
    print(json.dumps({"gb": args.gb, "write_s": round(write_s or 0, 2), "longest_pause_s": round(longest_s, 3)}))


if __name__ == "__main__":
    main()
