import pytest
import torch

from cogds.distributed.world import (
    World,
    all_gather,
    export_rendezvous,
    first_slurm_host,
    on_all_ranks,
    on_rank0,
    read_world,
)
from cogds.errors import UserError

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4211",
    "SLURM_STEP_ID": "0",
}


@pytest.mark.parametrize(
    "environ, world",
    [
        ({}, World(0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, World(3, 4, 1, 2)),  # torchrun
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, World(1, 2, 1, 2)),  # deepspeed
        (SLURM, World(5, 8, 1, 4)),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "2"}, World(0, 2, 0, 1)),  # a launcher inside srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, World(0, 1, 0, 1)),  # a batch script is one process
    ],
)
def test_every_launcher_is_understood(environ, world):
    assert read_world(environ) == world


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 and WORLD_SIZE=4"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "must be a number"),
    ],
)
def test_contradictions_are_named(environ, message):
    with pytest.raises(UserError, match=message):
        read_world(environ)


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a5,b[1-3]", "a5"),
        ("rack[3,5]-ib", "rack3-ib"),
    ],
)
def test_first_host_of_a_slurm_list(nodelist, host):
    assert first_slurm_host(nodelist) == host


def test_an_empty_node_list_is_named():
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        first_slurm_host("")


def test_rendezvous_under_srun_is_the_same_on_every_rank():
    exported = []
    for rank in (0, 5):
        environ = {**SLURM, "SLURM_PROCID": str(rank)}
        export_rendezvous(read_world(environ), environ)
        exported.append((environ["MASTER_ADDR"], environ["MASTER_PORT"], environ["RANK"], environ["WORLD_SIZE"]))
    assert exported[0][:2] == exported[1][:2] == ("gpu07", str(20000 + 4211 * 16 % 12000))
    assert [one[2:] for one in exported] == [("0", "8"), ("5", "8")]


def test_rendezvous_keeps_what_the_launcher_set():
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "123"}
    export_rendezvous(read_world(environ), environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("n1", "123")


@pytest.mark.parametrize("shown, expected", [(1, "0"), (2, "1")])
def test_the_gpu_that_deepspeed_takes_is_ours_where_a_task_sees_its_own_alone(monkeypatch, shown, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: shown)
    environ = dict(SLURM)
    world = read_world(environ)
    export_rendezvous(world, environ)
    assert world.local_rank == 1
    assert environ["LOCAL_RANK"] == expected == str(world.device.index)


def test_alone_every_collective_is_the_identity():
    world = World(0, 1, 0, 1)
    assert on_rank0(world, lambda: 5) == 5
    assert all_gather(world, "x") == ["x"]
    assert on_all_ranks(world, lambda: 6) == [6]
    with pytest.raises(OSError, match="full"):
        on_all_ranks(world, lambda: (_ for _ in ()).throw(OSError("full")))
    assert world.device == (torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    with pytest.raises(UserError, match="no"):
        on_rank0(world, lambda: (_ for _ in ()).throw(UserError("no")))
