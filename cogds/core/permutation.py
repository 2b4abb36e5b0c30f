"""A keyed shuffle of [0, size) that is computed one index at a time, and is the same on every machine.

Reshuffling 100 million clips with a table would take 100 million integers on every rank. This takes no memory.
"""

from hashlib import blake2b
from math import isqrt

# Total variation distance from uniform of the joint position of any three indices, computed exactly for ideal round
# functions: 1e-3 for a 4x5 grid and 6e-5 for 8x8 after 12 rounds. Two more rounds divide it by at least 4.
NUM_ROUNDS = 12

# On a grid of 2x2 or 3x2, two rounds gain only a factor of 2. Small sizes are sorted by hash instead, which is exactly
# uniform and, up to this size, no slower than the rounds.
MAX_SORTED_SIZE = 16


def keyed_hash(purpose: str, *key: int) -> int:
    """Hash a purpose (at most 16 bytes) and integers to 64 uniform bits with BLAKE2b (RFC 7693)."""
    digest = blake2b(_encode(key), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little")


def permute(index: int, size: int, *key: int) -> int:
    """Return the position of `index` after shuffling [0, size) with the integers `key`: a bijection for every key.

    A generalized Feistel network (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 5). An index
    is a cell (l, r) of an a x b grid, with a = ceil(sqrt(size)) and b = ceil(size / a). In alternating rounds, a hash
    of r is added to l and a hash of l to r, modulo the side. If the result is not below `size`, the rounds are applied
    again (cycle walking, section 3). Raises ValueError if index is not in [0, size).
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is not in [0, {size})")
    state = blake2b(_encode(key), digest_size=8, person=b"cogds.permute")

    def round_hash(*message: int) -> int:
        # Copying the keyed state takes half the time of keying a new one.
        copy = state.copy()
        copy.update(b"%d,%d" % message)
        return int.from_bytes(copy.digest(), "little")

    if size <= MAX_SORTED_SIZE:
        return sorted(range(size), key=lambda i: (round_hash(0, i), i))[index]

    a = isqrt(size - 1) + 1
    b = -(-size // a)
    while True:
        r, l = divmod(index, a)  # noqa: E741 (names from the paper)
        for number in range(0, NUM_ROUNDS, 2):
            l = (l + round_hash(number, r)) % a  # noqa: E741
            r = (r + round_hash(number + 1, l)) % b
        index = r * a + l
        if index < size:
            return index


def _encode(key: tuple[int, ...]) -> bytes:
    # %d formats numpy integers like Python's. The final separator keeps a key distinct from the message after it.
    return b"".join(b"%d;" % part for part in key)
