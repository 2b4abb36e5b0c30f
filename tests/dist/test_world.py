"""Collectives with real processes: what one rank meets, every rank ends with."""

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, free_port, run_command

pytestmark = pytest.mark.dist

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
from cogds.cli import run
from cogds.errors import UserError
from cogds.runtime.world import all_gather, all_reduce_sum, on_all_ranks, on_rank0, read_world
import torch
world = read_world()
dist.init_process_group("gloo")

what, kind = sys.argv[1:]

def fail_on(rank):
    if world.rank == rank:
        raise UserError(f"rank {{rank}} has no disk left") if kind == "user" else TypeError("planted")
    return world.rank * 10

assert all_gather(world, world.rank) == [0, 1]
assert all_reduce_sum(world, torch.tensor([1.0 + world.rank])).item() == 3
assert on_rank0(world, lambda: world.rank) == 0
assert on_all_ranks(world, lambda: fail_on(None)) == [0, 10]
try:
    code = run(lambda: on_all_ranks(world, lambda: fail_on(1)) if what == "all" else on_rank0(world, lambda: fail_on(0)))
except TypeError as error:
    code = 1
    print(f"rank {{world.rank}} raised {{error!r}}")
print(f"code of rank {{world.rank}}: {{code}}", flush=True)
sys.exit(code)
"""


def launch(folder, *words):
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    torchrun = Path(sys.executable).parent / "torchrun"
    return run_command([torchrun, "--nproc_per_node", 2, "--master_port", free_port(), script, *words], 60)


@pytest.mark.parametrize("what, says", [("all", "error on rank 1"), ("rank0", "error: rank 0 has no disk left")])
def test_a_failure_on_one_rank_ends_all_and_is_told_once(tmp_path, what, says):
    done = launch(tmp_path, what, "user")
    assert done.returncode != 0
    assert done.stdout.count("no disk left") == 1
    assert says in done.stdout


@pytest.mark.parametrize("what, rank", [("all", 1), ("rank0", 0)])
def test_a_bug_on_one_rank_is_nobodys_user_error(tmp_path, what, rank):
    done = launch(tmp_path, what, "bug")
    assert done.returncode != 0
    assert f"rank {rank} raised TypeError('planted')" in done.stdout
    assert done.stdout.count("raised") == 1
    # The launcher may end the other rank before it has said its own code.
    assert "code of rank 0: 2" not in done.stdout
    assert "code of rank 1: 2" not in done.stdout
