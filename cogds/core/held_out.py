"""Choose held-out files and evaluation clips by hashes of file names.

The choice for a file depends only on its path relative to the dataset's folder. It does not change when other files
are added or removed, or when the dataset is moved. A larger share holds out the same files and more.
"""

import os
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


def portable_name(path: str, roots: Sequence[str]) -> str:
    """Return a file name that is the same on every machine.

    This is the path relative to the innermost dataset folder that contains the file. A file outside of all of them
    keeps its parent folder.

    Args:
        path: absolute path of the file.
        roots: absolute paths of the dataset folders.
    """
    parts = path.split(os.sep)
    starts = [root.rstrip(os.sep).split(os.sep) for root in roots]
    within = max((len(start) for start in starts if parts[: len(start)] == start), default=len(parts) - 2)
    # macOS decomposes accented letters into two characters. Linux keeps names as written.
    return unicodedata.normalize("NFC", "/".join(parts[max(0, within) :]))


def name_hash(name: str, part: str = "") -> int:
    """Hash a file name, or a named part of a file, to 64 uniform bits."""
    message = f"{name}\0{part}".encode(errors="surrogatepass")
    return int.from_bytes(blake2b(message, digest_size=8, person=b"held out").digest(), "little")


def is_held_out(name: str, share: float) -> bool:
    """Whether the file with this portable name is held out, if this share of all files is held out."""
    return name_hash(name) < share * 2**64


def min_held_out_share(name: str) -> float:
    """The smallest share, in steps of 0.001, for which this file is held out."""
    return (name_hash(name) * 1000 // 2**64 + 1) / 1000


def spread(buckets: Sequence[int] | np.ndarray, hashes: Sequence[int] | np.ndarray, num: int) -> np.ndarray:
    """Return the indices of up to `num` clips, spread over the buckets as evenly as possible, in ascending order.

    Every bucket contributes its clip with the smallest hash, then its second, and so on. In the last round, the
    smallest hashes win.

    Args:
        buckets, hashes: of every clip.
    """
    hashes = np.asarray(hashes, np.uint64)
    by_hash = np.argsort(hashes, kind="stable")
    rounds, last_round = np.zeros(len(hashes), np.int64), dict[int, int]()
    for clip in by_hash.tolist():
        bucket = int(buckets[clip])
        rounds[clip] = last_round[bucket] = last_round.get(bucket, -1) + 1
    return np.sort(np.lexsort((hashes, rounds))[:num])
