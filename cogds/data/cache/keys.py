"""Cache keys: the digest of everything that made an entry.

If any of it changes, the key changes. Nothing stale is ever read, and nothing is encoded twice.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cogds.files import whole_file

# Increase this if the same pixels or the same text would give other tensors. For other pixels of the same file, there
# is `media.PIXELS_VERSION`.
ENCODING_VERSION = 2


def cache_key(fields: Mapping[str, Any]) -> str:
    """The key of an entry, 32 hex digits, from the fields that determine it and ENCODING_VERSION."""
    text = json.dumps({**fields, "encoding_version": ENCODING_VERSION}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest_file(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return None


def digest_files(paths: Sequence[str], memo_file: Path) -> dict[str, str]:
    """Digest the content of files; those that cannot be read are missing from the result.

    Args:
        memo_file: JSON file of digests. A file whose size and modification time are listed there is not read again.
    """
    try:
        memo = json.loads(memo_file.read_text())
    except (FileNotFoundError, ValueError):
        memo = {}
    stamps = {}
    for path in dict.fromkeys(paths):
        with contextlib.suppress(OSError):
            stat = os.stat(path)
            stamps[path] = [stat.st_size, stat.st_mtime_ns]
    changed = [path for path, stamp in stamps.items() if memo.get(path, [])[:2] != stamp]
    with ThreadPoolExecutor(8) as threads:  # hashing and reading both release the GIL
        new = {path: digest for path, digest in zip(changed, threads.map(_digest_file, changed)) if digest}
    if new:
        memo |= {path: [*stamps[path], digest] for path, digest in new.items()}
        with whole_file(memo_file) as partial:
            partial.write_text(json.dumps(memo))
    return {path: memo[path][2] for path in stamps if path in new or path not in changed}
