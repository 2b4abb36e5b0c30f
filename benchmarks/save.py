"""How long a checkpoint takes to write, and how much of that the training thread feels.

    python benchmarks/save.py --folder DIR [--gb 1.6]

Writes a state of this size as training does, in the background, while the main thread looks at the clock. Prints a
line of JSON: seconds of the write, digests and syncs included, and the longest time that the main thread stood still.
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

NUM_TENSORS = 1008  # 336 of a LoRA on the attention layers of the 5B model, and two moments of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to write; a checkpoint is left in it")
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
