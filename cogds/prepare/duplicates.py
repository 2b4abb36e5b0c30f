"""Near duplicates among scenes, such as other encodings and sizes of the same scene."""

from collections import defaultdict
from collections.abc import Sequence

# Two scenes are duplicates if their hashes differ in at most this many bits (of 256), and their lengths by this share.
# Other sizes and strong compression change up to 10 bits; different scenes differ in about 128.
MAX_BITS = 24
MAX_LENGTH_DIFFERENCE = 0.2
_BAND_BYTES = 2
# Originals that a scene is compared with for each equal band, so that thousands of similar scenes take no longer.
_MAX_COMPARED = 64


def find_duplicates(hashes: Sequence[bytes | None], lengths_s: Sequence[float | None]) -> list[int | None]:
    """For each scene, the index of the first scene that it duplicates, or None.

    Scenes without hashes, or whose pictures are all flat, have no duplicates. Hashes that differ in at most 15 bits
    have one of 16 bands of 16 bits in common, and almost all that differ in 24, so only those are compared.
    """
    originals: list[int | None] = []
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for index, own in enumerate(hashes):
        original = None
        if own is not None and any(own):
            bands = [(start, own[start : start + _BAND_BYTES]) for start in range(0, len(own), _BAND_BYTES)]
            candidates = sorted({other for band in bands for other in buckets[band][:_MAX_COMPARED]})
            original = next((other for other in candidates if _is_near(index, other, hashes, lengths_s)), None)
            if original is None:
                for band in bands:
                    buckets[band].append(index)
        originals.append(original)
    return originals


def _is_near(one: int, other: int, hashes: Sequence[bytes | None], lengths_s: Sequence[float | None]) -> bool:
    length, other_length = lengths_s[one], lengths_s[other]
    if (length is None) != (other_length is None):  # an image and a video
        return False
    if abs((length or 0.0) - (other_length or 0.0)) > MAX_LENGTH_DIFFERENCE * max(length or 0.0, other_length or 0.0):
        return False
    left, right = (int.from_bytes(hashes[index] or b"") for index in (one, other))
    return (left ^ right).bit_count() <= MAX_BITS
