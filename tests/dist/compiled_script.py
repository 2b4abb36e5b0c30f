"""Run by test_compiled.py: `launch/train.py` with the block compiled, but for the code generator, which takes minutes."""

import sys
from functools import partialmethod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cogds.cli import run  # noqa: E402
from cogds.model.transformer import Transformer  # noqa: E402
from cogds.train import main  # noqa: E402

Transformer.compile_blocks = partialmethod(Transformer.compile_blocks, "aot_eager")
sys.exit(run(lambda: main(ROOT / "ds_configs/zero2.json", ROOT / "launch/configs/demo.yaml")))
