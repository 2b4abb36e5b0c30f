"""The commands in the README and the quick start."""

import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, QUICKSTART = "README.md", "docs/quickstart.md"


def commands(file=README):
    """Return every shell command, in order. A command that continues after a backslash is one line."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / file).read_text(), flags=re.S)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [re.sub(r"\s+", " ", line.strip()) for line in lines if line.strip()]


def command(start, file=README):
    """Return the words of the only command that starts with this text."""
    (line,) = [line for line in commands(file) if line.startswith(start)]
    return shlex.split(line)


def with_programs(words, folder=Path(sys.executable).parent):
    """Return a command whose program is that of a virtual environment (its `bin` folder).

    `cogds` runs as a module, so that it is the code in the working directory and not the installed code.
    """
    if words[0] == "cogds":
        return [folder / "python", "-m", *words]
    program = folder / words[0]
    return [program if program.exists() else words[0], *words[1:]]
