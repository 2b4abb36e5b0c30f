#!/usr/bin/env python
"""deepspeed launch/train.py --deepspeed ds_configs/zero2.json [--config run.yaml] [key.sub=value ...]"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout without being installed

if __name__ == "__main__":
    from cogds.start import importing

    with importing():
        from cogds.cli import run
        from cogds.train.main import main
    sys.exit(run(lambda: main(ROOT / "ds_configs/zero2.json", ROOT / "launch/configs/demo.yaml")))
