"""Files and folders that are complete or absent: made under another name, then renamed.

A killed process leaves at worst a `.tmp` beside the place, never half a file in it.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _beside(path: Path) -> Path:
    # Not the process id: two nodes on a shared file system may have the same.
    return path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Write to the path that this gives; it replaces `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """Fill the folder that this gives; it becomes `path` when the block ends without an error.

    Where another process was first and `path` is there already, that one stays.
    """
    path = Path(path)
    partial = _beside(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
