"""The commands of README and quick start, so that tests run what a newcomer copies."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, QUICKSTART = "README.md", "docs/quickstart.md"


def commands(file=README):
    """Every shell command, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / file).read_text(), flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def command(start, file=README):
    """The words of the one command that starts with this text."""
    (found,) = [line for line in commands(file) if line.startswith(start)]
    return shlex.split(found)
