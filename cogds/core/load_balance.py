"""Work dealt to ranks by its cost."""

from collections.abc import Sequence
from heapq import heapify, heapreplace

import numpy as np


def deal(costs: Sequence[float] | np.ndarray, num_ranks: int) -> np.ndarray:
    """The rank of every piece of work, int32: the dearest first, each to the rank that has the least so far.

    No rank has more than another by the cost of one piece (Graham 1969, "Bounds on multiprocessing timing
    anomalies"). Every rank that asks gets the same answer.
    """
    costs = np.asarray(costs, np.float64)
    ranks = np.zeros(len(costs), np.int32)
    loads = [(0.0, rank) for rank in range(num_ranks)]
    heapify(loads)
    for piece in np.argsort(-costs, kind="stable").tolist():
        load, rank = loads[0]
        ranks[piece] = rank
        heapreplace(loads, (load + float(costs[piece]), rank))
    return ranks
