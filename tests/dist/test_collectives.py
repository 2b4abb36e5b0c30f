"""Collectives with two real processes."""

import json

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SCRIPT = """
import json
import torch
import torch.distributed as dist
from cogds.distributed.collectives import (
    all_gather, all_reduce_sum, any_rank, broadcast, on_all_ranks, on_rank0, rank0_only, scatter_from_rank0
)
from cogds.distributed.world import read_world
from cogds.errors import BugReported, UserError

world = read_world()
dist.init_process_group("gloo")

def fail_on(rank, error=UserError("the disk is full")):
    if world.rank == rank:
        raise error
    return world.rank * 10

def check():
    assert all_gather(world, world.rank) == [0, 1]
    assert all_reduce_sum(world, torch.tensor([1.0 + world.rank])).item() == 3
    assert broadcast(world, 1, world.rank) == 1
    assert any_rank(world, world.rank == 1, False) == (True, False)
    assert on_rank0(world, lambda: world.rank) == 0
    assert scatter_from_rank0(world, lambda: ["a", "b"]) == "ab"[world.rank]
    assert on_all_ranks(world, lambda: fail_on(None)) == [0, 10]
    unpicklable = rank0_only(world, lambda: lambda: "value")
    assert unpicklable() == "value" if world.rank == 0 else unpicklable is None

check()
for name, case in {
    "on_all_ranks": lambda: on_all_ranks(world, lambda: fail_on(1)),
    "on_rank0": lambda: on_rank0(world, lambda: fail_on(0)),
    "rank0_only": lambda: rank0_only(world, lambda: fail_on(0)),
    "scatter_from_rank0": lambda: scatter_from_rank0(world, lambda: fail_on(0)),
    "a bug, on_all_ranks": lambda: on_all_ranks(world, lambda: fail_on(1, TypeError("planted"))),
    "a bug, on_rank0": lambda: on_rank0(world, lambda: fail_on(0, TypeError("planted"))),
}.items():
    try:
        case()
    except UserError as error:
        outcome = "follows" if error.shared else f"reports {error}"
    except (TypeError, BugReported) as error:
        outcome = type(error).__name__
    else:
        outcome = "went on"
    outcomes = all_gather(world, outcome)
    if world.rank == 0:
        print(json.dumps([name, *outcomes]), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_results_are_correct_and_a_failure_on_one_rank_is_raised_on_all(warm, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = warm(script, [], ranks=2, timeout_s=60)
    assert done.returncode == 0, done.stdout
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    from_rank0 = ["reports the disk is full", "follows"]
    assert outcomes == [
        ["on_all_ranks", *from_rank0[::-1]],
        *([name, *from_rank0] for name in ("on_rank0", "rank0_only", "scatter_from_rank0")),
        ["a bug, on_all_ranks", "BugReported", "TypeError"],
        ["a bug, on_rank0", "TypeError", "BugReported"],
    ]
