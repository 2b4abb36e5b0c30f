"""Output folders, and files and folders that are complete or absent: written under a temporary name, then renamed.

A killed process leaves at most a `.tmp` file beside the final one, never half a file under the final name.
"""

import functools
import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cogds.errors import UserError

ABANDONED_AFTER_S = 86400.0  # age at which a file of a process on another machine counts as abandoned


def make_folders(folders: Mapping[str, str]) -> None:
    """Create the folders that a command writes to.

    folders: config key -> folder. Raises UserError, naming the key, if a folder cannot be written to.
    """
    for key, folder in folders.items():
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{key}: cannot write to {folder} ({reason}). Choose another folder.") from None


def check_creatable(key: str, folder: str) -> None:
    """Raise UserError, naming the key, if a folder cannot be created or written to. Leaves nothing behind."""
    make_folders({key: str(existing_parent(folder))})


def existing_parent(path: Path | str) -> Path:
    """Return the path itself or its nearest parent that exists."""
    path = Path(path).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def apply_umask(file: Path) -> None:
    """Give a file the mode that the umask allows. safetensors and temporary files allow only the owner.

    The umask is read from /proc, because `os.umask` would change it for the other threads for a moment.
    """
    umask = re.search(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    file.chmod(0o666 & ~(int(umask[1], 8) if umask else 0o022))  # some sandboxes do not say it


def process_tag() -> str:
    """`<host>@<process id>`, for names of files by which `is_abandoned` recognizes the process that owns them."""
    return f"{_host_tag()}@{os.getpid()}"


@functools.cache
def _host_tag() -> str:
    # Containers on one machine may share its host name but not its process ids.
    host = f"{os.uname().nodename} {os.readlink('/proc/self/ns/pid')}"
    return hashlib.blake2b(host.encode(), digest_size=4).hexdigest()


def is_abandoned(path: Path | str) -> bool:
    """Whether the process named in a file's name has ended, or cannot be checked and the file is a day old."""
    match = re.search(r"([0-9a-f]{8})@(\d+)", os.path.basename(path))
    if match and match[1] == _host_tag():
        return not os.path.exists(f"/proc/{match[2]}")
    try:
        return time.time() - os.stat(path).st_mtime > ABANDONED_AFTER_S
    except FileNotFoundError:
        return False


def is_temporary(path: Path | str) -> bool:
    """Whether a file or folder has a name of `temporary_name`."""
    return ".tmp" in os.path.basename(path)


def remove_abandoned(folder: Path | str) -> None:
    """Remove the temporary files and folders that killed processes left in a folder."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in (Path(folder, name) for name in names if is_temporary(name)):
        if is_abandoned(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A new name beside `path`, with its suffix, that tells `is_abandoned` which process owns it."""
    return path.with_name(f"{path.stem}.{process_tag()}-{uuid.uuid4().hex[:8]}.tmp{path.suffix}")


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_name(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder to fill; it becomes `path` if the block ends without an error.

    If another process was faster and `path` exists by then, that folder is kept.
    """
    path = Path(path)
    partial = temporary_name(path)
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
