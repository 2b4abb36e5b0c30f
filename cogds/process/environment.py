"""Environment variables of this process."""

import os
import shutil
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path


def environment_variables(*prefixes: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables whose names start with any of the prefixes, sorted by name."""
    return {name: value for name, value in sorted(environ.items()) if name.startswith(prefixes)}


def declare_cpu() -> None:
    """Tell DeepSpeed's launcher that this machine has no GPU. Otherwise its processes warn that they found none."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def find_ninja(environ: MutableMapping[str, str] = os.environ, python: str = sys.executable) -> None:
    """Extend the PATH so that torch finds ninja, with which it builds DeepSpeed's extensions.

    pip installs ninja beside the interpreter. That folder is not on the PATH if the virtual environment is not active.
    It goes to the end, so that it hides no other program.
    """
    path, folder = environ.get("PATH", os.defpath), Path(python).parent
    if not shutil.which("ninja", path=path) and (folder / "ninja").is_file():
        environ["PATH"] = f"{path}{os.pathsep}{folder}"
