"""`launch/train.py` that also writes what the trained engine computes: `OUTPUT_DIR/output.pt`.

With ZeRO-2, there is no host memory for a copy of the state, so that training waits while it is saved.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    import torch

    from cogds.cli import call, run
    from cogds.train import full_saving
    from cogds.train.trainer import Trainer
    from tests.model.lora.adapters import example_inputs

    if "ds_configs/zero2.json" in sys.argv:  # others write in the background
        full_saving.available_memory_bytes = lambda: 0
    train = Trainer.train

    def train_and_compute(self, run, engine, *args):
        train(self, run, engine, *args)
        inputs = {
            name: value.to(self.job.dtype)
            if torch.is_tensor(value) and name in ("hidden_states", "encoder_hidden_states", "ofs")
            else value
            for name, value in example_inputs().items()
        }
        engine.module.set_checkpointing("none")
        with torch.no_grad():
            output = engine(**inputs)[0]
        if run.world.rank == 0:
            torch.save(output, self.output_dir / "output.pt")

    Trainer.train = train_and_compute
    sys.exit(run(lambda: call("train", sys.argv[1:], starts_ranks=False)))
