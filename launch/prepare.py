#!/usr/bin/env python
"""`cogds prepare` for launchers: see `python launch/prepare.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout without being installed
    from cogds.cli import launch

    sys.exit(launch("prepare"))
