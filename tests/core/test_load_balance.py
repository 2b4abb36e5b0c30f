import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cogds.core.load_balance import deal


@given(st.lists(st.floats(0.01, 1e6), max_size=200), st.integers(1, 70))
def test_no_rank_has_more_than_another_by_one_piece(costs, num_ranks):
    ranks = deal(costs, num_ranks)
    assert len(ranks) == len(costs)
    assert all(0 <= rank < num_ranks for rank in ranks)
    loads = np.bincount(ranks, weights=costs, minlength=num_ranks)
    assert loads.max() - loads.min() <= max(costs, default=0) * (1 + 1e-9)


def test_cost_counts_and_not_number():
    assert sorted(np.bincount(deal([8, 1, 1, 1, 1, 1, 1, 1, 1], 2), weights=[8, 1, 1, 1, 1, 1, 1, 1, 1])) == [8, 8]
