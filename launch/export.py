#!/usr/bin/env python
"""python launch/export.py LORA --to diffusers|comfyui|comfyui-wrapper|merged --output FOLDER [--model MODEL]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout without being installed

if __name__ == "__main__":
    from cogds.start import importing

    with importing():
        from cogds.cli import run
        from cogds.export import main
    sys.exit(run(main))
