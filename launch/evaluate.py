#!/usr/bin/env python
"""python launch/evaluate.py [--config run.yaml] [--lora LORA] [key.sub=value ...]"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout without being installed

if __name__ == "__main__":
    from cogds.start import importing

    with importing():
        from cogds.cli import run
        from cogds.evaluate import main
    sys.exit(run(lambda: main(ROOT / "launch/configs/demo.yaml")))
