#!/usr/bin/env python
"""`cogds probe` for launchers: see `python launch/probe.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout without being installed
    from cogds.cli import launch

    sys.exit(launch("probe"))
