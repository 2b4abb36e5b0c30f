"""Environment variables of this process."""

import os
from collections.abc import Mapping


def environment_variables(*prefixes: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables whose names start with any of the prefixes, sorted by name."""
    return {name: value for name, value in sorted(environ.items()) if name.startswith(prefixes)}


def declare_cpu() -> None:
    """Tell DeepSpeed's launcher that this machine has no GPU. Otherwise its processes warn that they found none."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
