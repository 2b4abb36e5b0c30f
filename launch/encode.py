#!/usr/bin/env python
"""deepspeed launch/encode.py [--config run.yaml] [--verify | --prune | --stats] [key.sub=value ...]"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout without being installed

if __name__ == "__main__":
    from cogds.start import start

    sys.exit(start("cogds.encode", ROOT / "launch/configs/demo.yaml"))
