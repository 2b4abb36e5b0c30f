#!/usr/bin/env python
"""Writes docs/configuration.md, every key of the config: python docs/configuration.py"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cogds.config.reference import reference  # noqa: E402

FILE = ROOT / "docs/configuration.md"

if __name__ == "__main__":
    FILE.write_text(reference())
