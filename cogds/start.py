"""How every entry point starts: it imports with Python's garbage collector at rest.

Importing torch, diffusers and DeepSpeed makes a million objects that live as long as the process. Looking for garbage
among them took 3 of the 11 seconds that `--help` needed (docs/performance.md), and every full collection of the
training would go through them again. They are left out of that for good.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Inside, no garbage is collected; what is there at its end never is."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
