"""`launch/train.py` that also writes, before training, what ZeRO-3 did with the weights: `OUTPUT_DIR/weights.json`.

released: number of weights that are not gathered; total: of all weights; storages: number of pieces of memory that hold
this rank's partitions of the frozen weights. The first block of each bucket is recomputed, as `auto` may choose on a
GPU.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from cogds.cli import call, run
    from cogds.core.checkpointing import BlockCheckpointing
    from cogds.train import tuning
    from cogds.train.trainer import Trainer

    build = Trainer.build

    def counting_build(self, run, initial):
        engine = build(self, run, initial)
        parameters = list(engine.module.parameters())
        frozen = [parameter.ds_tensor for parameter in parameters if not parameter.requires_grad]
        counts = {
            "released": sum(not parameter.numel() for parameter in parameters),
            "total": len(parameters),
            "storages": len({partition.untyped_storage().data_ptr() for partition in frozen}),
        }
        (self.output_dir / "weights.json").write_text(json.dumps(counts))
        return engine

    Trainer.build = counting_build
    tuning.choose_checkpointing = lambda job, *_: (BlockCheckpointing("selective", 1, 2),) * len(job.buckets)
    sys.exit(run(lambda: call("train", sys.argv[1:], starts_ranks=False)))
