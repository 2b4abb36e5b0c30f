"""`launch/train.py` that also counts, before training, the weights that ZeRO-3 has released: `OUTPUT_DIR/released`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from cogds.cli import call, run
    from cogds.train.trainer import Trainer

    build = Trainer.build

    def counting_build(self, run, initial):
        engine = build(self, run, initial)
        parameters = list(engine.module.parameters())
        num_released = sum(not parameter.numel() for parameter in parameters)
        (self.output_dir / "released").write_text(f"{num_released} {len(parameters)}")
        return engine

    Trainer.build = counting_build
    sys.exit(run(lambda: call("train", sys.argv[1:], starts_ranks=False)))
