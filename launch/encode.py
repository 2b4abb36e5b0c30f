#!/usr/bin/env python
"""deepspeed launch/encode.py [--config run.yaml] [--verify | --prune | --stats] [key.sub=value ...]"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout without being installed

if __name__ == "__main__":
    from cogds.start import importing

    with importing():
        from cogds.cli import run
        from cogds.encode.main import main
    sys.exit(run(lambda: main(ROOT / "launch/configs/demo.yaml")))
