"""How every entry point starts: its module is imported with Python's garbage collector at rest.

Importing torch, diffusers and DeepSpeed makes a million objects that live as long as the process. Looking for garbage
among them took 3 of the 11 seconds that `--help` needed (docs/performance.md), and every full collection of the
training would go through them again. They are left out of that for good.
"""

import gc
import importlib
from pathlib import Path


def start(module: str, *defaults: Path) -> int:
    """The exit code of `main(*defaults)` of a module, see `cogds.cli.run`."""
    gc.disable()
    try:
        run = importlib.import_module("cogds.cli").run  # before what it keeps quiet is imported
        main = importlib.import_module(module).main
    finally:
        gc.enable()
        gc.freeze()
    code: int = run(lambda: main(*defaults))
    return code
