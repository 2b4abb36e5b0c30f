"""`permute` is a bijection, uniform, and never changes. Keys are fixed, so the chi-square tests are deterministic."""

import math
from collections import Counter
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogds.core.permutation import MAX_SORTED_SIZE, keyed_hash, permute


def assert_uniform(observed: Counter, cells: int) -> None:
    """Check that Pearson's chi-square is within 5 standard deviations of its mean. By chance, 1 in a million is not."""
    expected = observed.total() / cells
    assert len(observed) <= cells
    chi2 = sum((count - expected) ** 2 for count in observed.values()) / expected + (cells - len(observed)) * expected
    freedom = cells - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), f"chi-square {chi2:.0f} for {freedom} degrees of freedom"


@given(st.integers(1, 400), st.lists(st.integers(-(2**70), 2**70), max_size=4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_key_gives_a_bijection(size, key):
    assert sorted(permute(i, size, *key) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [MAX_SORTED_SIZE, MAX_SORTED_SIZE + 1, 1023, 1024, 1025, 9_973])
def test_bijection_at_the_edges_of_the_grid(size):
    assert {permute(i, size, 1) for i in range(size)} == set(range(size))


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_orders_of_a_small_range_are_equally_likely(size):
    orders = Counter(tuple(permute(i, size, 11, key) for i in range(size)) for key in range(80 * math.factorial(size)))
    assert set(orders) == set(permutations(range(size)))
    assert_uniform(orders, math.factorial(size))


@pytest.mark.parametrize("size, num_keys", [(10, 3000), (97, 500)])
def test_every_index_lands_everywhere_equally_often(size, num_keys):
    landed = Counter((i, permute(i, size, 12, key)) for key in range(num_keys) for i in range(size))
    # Every key fills one cell in each row and column. This makes the variance n / (n - 1) times that of random cells.
    expected = num_keys / size
    chi2 = sum((landed[cell] - expected) ** 2 for cell in product(range(size), repeat=2)) / expected
    chi2 *= (size - 1) / size
    freedom = (size - 1) ** 2
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("i", [0, 1, 31, 500, 999])
def test_one_index_of_a_thousand_lands_everywhere_equally_often(i):
    assert_uniform(Counter(permute(i, 1000, 13, key) for key in range(10_000)), 1000)


@pytest.mark.parametrize("size, num_keys", [(10, 5_000), (17, 7_000), (20, 14_000)])
@pytest.mark.parametrize("i, j", [(0, 1), (0, 5)])
def test_two_indices_land_on_all_pairs_equally_often(size, num_keys, i, j):
    # On the grids of 17 and 20, (0, 1) share a row and (0, 5) a column. Too few rounds would keep these pairs together.
    landed = Counter((permute(i, size, 14, key), permute(j, size, 14, key)) for key in range(num_keys))
    assert_uniform(landed, size * (size - 1))
    # A sharper test with fewer cells: how often the two land in the same row or column.
    for row_or_column in (lambda x: x // 5, lambda x: x % 5):
        pairs = list(permutations(range(size), 2))
        p = sum(row_or_column(x) == row_or_column(y) for x, y in pairs) / len(pairs)
        together = sum(count for (x, y), count in landed.items() if row_or_column(x) == row_or_column(y))
        assert abs(together - num_keys * p) < 5 * math.sqrt(num_keys * p * (1 - p))


@pytest.mark.parametrize("gap", [1, 32, 500])
def test_neighbors_are_separated_in_a_large_domain(gap):
    gaps = Counter((permute(gap, 1000, 15, key) - permute(0, 1000, 15, key)) % 1000 for key in range(10_000))
    assert_uniform(gaps, 999)


def test_values_do_not_change_between_versions():
    # If these values change, a run cannot be resumed with a new version of cogds.
    assert [permute(i, 10, 0, 1, 2) for i in range(10)] == [7, 1, 9, 8, 4, 5, 0, 2, 3, 6]
    assert [permute(i, 10_000_000, 42, 3, 7) for i in range(5)] == [4282962, 8511068, 816953, 2240758, 4756216]
    assert keyed_hash("purpose", 1, 2, 3) == 8356565435317875266


def test_keys_do_not_collide():
    def order(*key):
        return tuple(permute(i, 1000, *key) for i in range(20))

    keys = [(), (0,), (1,), (-1,), (1, 2), (12,), (1, 23), (12, 3), (2, 1), (1, 2, 0), (2**64 + 1,)]
    assert len({order(*key) for key in keys}) == len(keys)
    assert keyed_hash("a", 1) != keyed_hash("b", 1)


@pytest.mark.parametrize("index, size", [(0, 0), (-1, 3), (3, 3), (0, -1)])
def test_an_index_out_of_range_is_refused(index, size):
    with pytest.raises(ValueError, match="not in"):
        permute(index, size, 0)
