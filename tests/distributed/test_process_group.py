"""The address where ranks meet, and the error if it cannot be reached."""

import pytest
import torch

from cogds.distributed.process_group import export_rendezvous, first_slurm_host, open_store
from cogds.distributed.world import World, read_world
from cogds.errors import UserError
from tests.conftest import free_port
from tests.distributed.test_world import SLURM


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


def test_an_empty_node_list_is_refused():
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST"):
        first_slurm_host("")


def test_rendezvous_under_srun_is_the_same_on_every_rank():
    exported = []
    for rank in (0, 5):
        environ = {**SLURM, "SLURM_PROCID": str(rank)}
        export_rendezvous(read_world(environ), environ)
        exported.append((environ["MASTER_ADDR"], environ["MASTER_PORT"], environ["RANK"], environ["WORLD_SIZE"]))
    assert exported[0][:2] == exported[1][:2] == ("gpu07", str(20000 + 4211 * 16 % 12000))
    assert [variables[2:] for variables in exported] == [("0", "8"), ("5", "8")]


def test_rendezvous_keeps_what_the_launcher_set():
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "123"}
    export_rendezvous(read_world(environ), environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("n1", "123")


@pytest.mark.parametrize("num_visible_gpus, index", [(1, 0), (2, 1)])
def test_deepspeed_gets_the_index_of_this_ranks_gpu(monkeypatch, num_visible_gpus, index):
    """Under SLURM, a task may see only its own GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_visible_gpus)
    environ = dict(SLURM)
    world = read_world(environ)
    export_rendezvous(world, environ)
    assert world.local_rank == 1
    assert world.device == torch.device("cuda", index)
    assert environ["LOCAL_RANK"] == str(index)


def test_an_error_about_an_unreachable_store_names_its_address():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.raises(UserError, match=rf"MASTER_PORT: rank 1 .*127\.0\.0\.1:{environ['MASTER_PORT']}"):
        open_store(World(1, 2, 1, 2), 0.2, environ)
    assert open_store(World(0, 1, 0, 1), 0.2, {}) is None
