"""Choose held-out files and evaluation clips by hashes of file names.

The files with the smallest hashes are held out, as many as the share says. A hash depends only on the path relative to
the dataset's folder, so moving the dataset changes nothing. Adding or removing files changes the choice only as far as
their number requires it. A larger share holds out the same files and more.
"""

import math
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


def held_out_limit(hashes: Sequence[int] | np.ndarray, share: float) -> int | None:
    """Return the largest hash that is held out: round(share x number of files) files have at most this hash.

    hashes: of the files, with repetitions. Returns None if no file is held out.
    """
    distinct = np.unique(np.asarray(hashes, np.uint64))
    num = math.floor(share * len(distinct) + 0.5)
    return int(distinct[num - 1]) if num else None


def limit_of_fixed_share(share: float) -> int | None:
    """Return the limit of runs by cogds 0.1, which held out each file with this probability."""
    return math.ceil(share * 2**64) - 1 if share > 0 else None


def min_held_out_share(num_files: int) -> float:
    """Return the smallest share, in steps of 0.001, that holds out one of this many files."""
    return max(1, math.ceil(500 / num_files)) / 1000


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
