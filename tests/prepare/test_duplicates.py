"""Near duplicates among hashes."""

import numpy as np

from cogds.prepare.duplicates import find_duplicates

NUM_BYTES = 32


def random_hashes(num, seed=0):
    return [row.tobytes() for row in np.random.default_rng(seed).integers(0, 256, (num, NUM_BYTES), np.uint8)]


def flip(value, num_bits, seed=0):
    bits = np.unpackbits(np.frombuffer(value, np.uint8))
    bits[np.random.default_rng(seed).choice(len(bits), num_bits, replace=False)] ^= 1
    return np.packbits(bits).tobytes()


def test_copies_name_the_first_of_them():
    first, other = random_hashes(2)
    hashes = [first, other, flip(first, 4), flip(first, 10), flip(other, 0)]
    assert find_duplicates(hashes, [2.0] * 5) == [None, None, 0, 0, 1]


def test_any_fifteen_bits_are_found_and_forty_are_not():
    hashes = random_hashes(300)
    copies = [flip(value, 15, seed) for seed, value in enumerate(hashes)]
    assert find_duplicates(hashes + copies, [2.0] * 600) == [None] * 300 + list(range(300))
    others = [flip(value, 40, seed) for seed, value in enumerate(hashes)]
    assert find_duplicates(hashes + others, [2.0] * 600) == [None] * 600


def test_other_lengths_images_and_flat_scenes_are_no_duplicates():
    (value,) = random_hashes(1)
    assert find_duplicates([value, value, value], [2.0, 4.0, None]) == [None, None, None]
    assert find_duplicates([value, value], [None, None]) == [None, 0]
    assert find_duplicates([bytes(NUM_BYTES)] * 2 + [None] * 2, [2.0] * 4) == [None] * 4
