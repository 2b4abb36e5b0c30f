import math

import pytest
import torch

from cogds.metrics.step_metrics import Norms, OwnValues, StepLosses, Tally

LABELS = ["bucket=a", "bucket=b"]


def tally(loss, own, squares=None):
    losses = StepLosses(2, torch.device("cpu"))
    losses.add(torch.tensor(loss), torch.tensor([loss]), 1, torch.tensor([3]))
    norms = None if squares is None else Norms(["lora/a", "lora/b"], torch.tensor(squares, dtype=torch.float64))
    return Tally({"step": 1}, losses.vector, own, norms)


def together(*ranks):
    sums = sum(one.vector(rank, len(ranks)) for rank, one in enumerate(ranks))
    return ranks[0].named(sums.tolist(), len(ranks), LABELS)


def test_one_sum_brings_together_what_three_ranks_know():
    found = together(
        tally(1.0, OwnValues(2.0, 3e9, 7e9), [9.0, 1.0]),
        tally(2.0, OwnValues(3.0, 5e9, 6e9), [16.0, 0.0]),
        tally(3.0, OwnValues(6.0, 4e9, 8e9), [0.0, 0.0]),
    )
    assert found == {
        "train/loss": 6.0,
        "train/loss/bucket=b": 2.0,
        "train/loss/t_q4": 2.0,
        "lora/a": 5.0,
        "lora/b": 1.0,
        "perf/rank_skew": 2.0,
        "perf/peak_memory_gb": 5.0,
        "perf/peak_host_memory_gb": 8.0,
    }


def test_what_one_rank_does_not_know_yet_is_left_out():
    found = together(tally(1.0, OwnValues(2.0, 3e9, 7e9)), tally(1.0, OwnValues(math.nan, 5e9, 6e9)))
    assert "perf/rank_skew" not in found
    assert found["perf/peak_memory_gb"] == 5.0


def test_one_rank_has_nobody_to_be_slower_than():
    assert "perf/rank_skew" not in together(tally(1.0, OwnValues(2.0, 1e9, 1e9)))


def test_bytes_are_not_rounded():
    assert together(tally(0.0, OwnValues(1.0, 80_123_456_789.0, 1.0)))["perf/peak_memory_gb"] == pytest.approx(
        80.123456789, rel=1e-12
    )
