#!/usr/bin/env python
"""deepspeed launch/train.py --deepspeed ds_configs/zero2.json [--config run.yaml] [key.sub=value ...]"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout without being installed

from cogds.cli import run  # noqa: E402
from cogds.train import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(lambda: main(ROOT / "ds_configs/zero2.json", ROOT / "launch/configs/demo.yaml")))
