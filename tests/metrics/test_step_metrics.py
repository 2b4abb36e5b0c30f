import math

import pytest
import torch

from cogds.metrics.step_metrics import RankValues, SquaredNorms, StepLosses, StepMetrics

LABELS = ["bucket=a", "bucket=b"]


def metrics(loss, values, squares=None):
    losses = StepLosses(2, torch.device("cpu"))
    losses.add(torch.tensor(loss), torch.tensor([loss]), 1, torch.tensor([3]))
    norms = None if squares is None else SquaredNorms(["lora/a", "lora/b"], torch.tensor(squares, dtype=torch.float64))
    return StepMetrics(1, {}, losses.vector, values, norms)


def reduce(*ranks):
    sums = sum(metrics.to_vector(rank, len(ranks)) for rank, metrics in enumerate(ranks))
    return ranks[0].reduced(sums.tolist(), len(ranks), LABELS)


def test_one_sum_over_ranks_reduces_everything():
    scalars = reduce(
        metrics(1.0, RankValues(2.0, 3e9, 7e9), [9.0, 1.0]),
        metrics(2.0, RankValues(3.0, 5e9, 6e9), [16.0, 0.0]),
        metrics(3.0, RankValues(6.0, 4e9, 8e9), [0.0, 0.0]),
    )
    assert scalars == {
        "train/loss": 6.0,
        "train/loss/bucket=b": 2.0,
        "train/loss/t_q4": 2.0,
        "lora/a": 5.0,
        "lora/b": 1.0,
        "perf/rank_skew": 2.0,
        "perf/peak_memory_gb": 5.0,
        "perf/peak_host_memory_gb": 8.0,
    }


def test_a_value_that_is_unknown_on_one_rank_is_omitted():
    scalars = reduce(metrics(1.0, RankValues(2.0, 3e9, 7e9)), metrics(1.0, RankValues(math.nan, 5e9, 6e9)))
    assert "perf/rank_skew" not in scalars
    assert scalars["perf/peak_memory_gb"] == 5.0


def test_a_single_rank_has_no_skew():
    assert "perf/rank_skew" not in reduce(metrics(1.0, RankValues(2.0, 1e9, 1e9)))


def test_bytes_are_not_rounded():
    assert reduce(metrics(0.0, RankValues(1.0, 80_123_456_789.0, 1.0)))["perf/peak_memory_gb"] == pytest.approx(
        80.123456789, rel=1e-12
    )
