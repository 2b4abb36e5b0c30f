"""The README's commands, so that tests run what a newcomer copies."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    """The code blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands():
    """Every shell command, in order."""
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def command(start):
    """The words of the one command that starts with this text."""
    (found,) = [line for line in commands() if line.startswith(start)]
    return shlex.split(found)
