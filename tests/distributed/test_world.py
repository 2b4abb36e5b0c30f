"""Rank and world size from the variables of each launcher."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogds.distributed.world import World, is_launched, read_world, refuse_missing_tasks
from cogds.errors import UserError
from tests.conftest import ROOT

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
def test_the_variables_of_every_launcher_are_read(environ, world):
    assert read_world(environ) == world


@pytest.mark.parametrize(
    "command, is_task",
    [
        (["sh"], False),
        (["bash", "--norc", "-i"], False),
        (["sh", "-c", "read line; exit"], True),  # all tasks run it
        ([sys.executable, "-c", "input()"], True),
    ],
)
def test_what_is_typed_in_a_shell_of_srun_is_not_a_task(command, is_task):
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as task:
        while not Path(f"/proc/{task.pid}/cmdline").read_bytes():  # its program is being loaded
            time.sleep(0.01)
        environ = {**SLURM, "SLURM_PROCID": "0", "SLURM_PTY_PORT": "40123", "SLURM_TASK_PID": str(task.pid)}
        assert is_launched(environ) is is_task
        assert read_world(environ) == (World(0, 8, 1, 4) if is_task else World(0, 1, 0, 1))
        if is_task:
            refuse_missing_tasks(environ)
        else:
            with pytest.raises(UserError, match="--ntasks=8"):
                refuse_missing_tasks(environ)
        refuse_missing_tasks({**environ, "RANK": "0", "WORLD_SIZE": "2"})
        refuse_missing_tasks({**environ, "SLURM_STEP_NUM_TASKS": "1"})
        del environ["SLURM_PTY_PORT"]
        assert is_launched(environ)
        task.stdin.close()


@pytest.mark.parametrize("environ", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x", "WORLD_SIZE": "4"}])
def test_an_error_about_a_contradiction_names_the_variable(environ):
    with pytest.raises(UserError, match=f"RANK=.*{environ['RANK']}"):
        read_world(environ)


def test_neighboring_ranks_that_share_a_clip_are_one_data_parallel_rank():
    worlds = [World(rank, 6, 0, 6, sequence_size=2) for rank in range(6)]
    assert [world.data_rank for world in worlds] == [0, 0, 1, 1, 2, 2]
    assert [world.sequence_rank for world in worlds] == [0, 1] * 3
    assert {world.data_size for world in worlds} == {3}
    alone = World(3, 6, 0, 6)
    assert (alone.data_rank, alone.data_size, alone.sequence_rank) == (3, 6, 0)


def test_the_command_line_reads_the_world_without_importing_torch():
    code = "import cogds.distributed.world, cogds.process.environment, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
