#!/usr/bin/env python
"""python launch/sample.py --model MODEL --lora LORA --image IMAGE --prompt PROMPT [--output sample.mp4]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout without being installed

if __name__ == "__main__":
    from cogds.start import importing

    with importing():
        from cogds.cli import run
        from cogds.sample import main
    sys.exit(run(main))
