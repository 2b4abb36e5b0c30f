"""Distribution of work to ranks by cost."""

from collections.abc import Sequence
from heapq import heapify, heapreplace

import numpy as np


def assign_by_cost(costs: Sequence[float] | np.ndarray, num_ranks: int) -> np.ndarray:
    """Assign work items to ranks: int32 [N]. The most expensive item goes first, each to the least loaded rank.

    The loads of two ranks differ by at most the cost of one item (Graham 1969, "Bounds on multiprocessing timing
    anomalies"). The result is deterministic, so every rank can compute it.
    """
    costs = np.asarray(costs, np.float64)
    ranks = np.zeros(len(costs), np.int32)
    loads = [(0.0, rank) for rank in range(num_ranks)]
    heapify(loads)
    for item in np.argsort(-costs, kind="stable").tolist():
        load, rank = loads[0]
        ranks[item] = rank
        heapreplace(loads, (load + float(costs[item]), rank))
    return ranks
