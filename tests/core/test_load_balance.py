import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cogds.core.load_balance import assign_by_cost


@given(st.lists(st.floats(0.01, 1e6), max_size=200), st.integers(1, 70))
def test_loads_differ_by_at_most_one_item(costs, num_ranks):
    ranks = assign_by_cost(costs, num_ranks)
    assert len(ranks) == len(costs)
    assert all(0 <= rank < num_ranks for rank in ranks)
    loads = np.bincount(ranks, weights=costs, minlength=num_ranks)
    assert loads.max() - loads.min() <= max(costs, default=0) * (1 + 1e-9)


def test_loads_are_balanced_by_cost_and_not_by_count():
    costs = [8, 1, 1, 1, 1, 1, 1, 1, 1]
    assert sorted(np.bincount(assign_by_cost(costs, 2), weights=costs)) == [8, 8]
