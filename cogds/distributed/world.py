"""Rank and world size of this process, read from the variables that the launcher sets.

`deepspeed` and `torchrun` set RANK and WORLD_SIZE, `srun` sets its own variables, and a plain `python` sets none and
is a world of one rank. Importing this module does not import torch, because the command line reads the world first.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cogds.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class World:
    """Global and node-local rank and size. Sizes count processes; each process drives one GPU.

    sequence_size: number of neighboring ranks that share each clip (sequence parallelism). Together they are one
    data-parallel rank: the plan, the sampler and the random draws count data-parallel ranks.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    sequence_size: int = 1

    @property
    def data_rank(self) -> int:
        """Data-parallel rank: the index of this rank's clip among those trained at the same time."""
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.size // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        """Index of this rank among those that share its clip."""
        return self.rank % self.sequence_size

    @property
    def device(self) -> "torch.device":
        """This rank's GPU, or the CPU if there is none. SLURM may show each task only its own GPU, hence the modulo."""
        import torch

        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


def gpu_memory(device: "torch.device") -> float | None:
    """Return the memory of a GPU [bytes], or None for a CPU."""
    import torch

    return float(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else None


def is_launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of its ranks: `deepspeed`, `torchrun` or `srun`."""
    return {"RANK", "WORLD_SIZE"} <= environ.keys() or _is_slurm_task(environ)


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Whether `srun` started this process as one of its tasks, rather than the shell in which it was typed.

    SLURM's variables count only inside a step (SLURM_STEP_NUM_TASKS): a batch script has SLURM_NTASKS too, but it is a
    single process.
    """
    return {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= environ.keys() and not _is_in_slurm_shell(environ)


def _is_in_slurm_shell(environ: Mapping[str, str]) -> bool:
    """Whether this process was typed in an interactive shell of `srun --pty`.

    The shell, or a program such as tmux, is then the task, and has no script or command among its arguments. Only the
    first task has a terminal. The other shells have ended, because they had nothing to read.
    """
    if "SLURM_PTY_PORT" not in environ:
        return False
    try:
        task = Path(f"/proc/{environ['SLURM_TASK_PID']}/cmdline").read_bytes().rstrip(b"\0")
    except (KeyError, OSError):
        return False
    return bool(task) and all(word.startswith(b"-") for word in task.split(b"\0")[1:])


def refuse_missing_tasks(environ: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if this is one of several SLURM tasks and the others were not started."""
    num_tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if num_tasks != "1" and "RANK" not in environ and _is_in_slurm_shell(environ):
        raise UserError(
            f"SLURM_STEP_NUM_TASKS: this is the shell of `srun --pty` with {num_tasks} tasks, and only the first of "
            f"them runs what you type. Start all ranks with `srun --overlap --ntasks={num_tasks} python "
            "launch/train.py ...`, or those of this machine with `cogds train --num-gpus N ...`."
        )


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """Read rank and world size from the launcher's variables; without a launcher, return a world of one rank.

    Raises:
        UserError: The variables are not numbers, or contradict each other.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        defaults = ("0", "1", "0", environ.get("LOCAL_SIZE", "1"))
    elif _is_slurm_task(environ):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        defaults = ("0", "1", "0", "1")
    else:
        return World(0, 1, 0, 1)
    values = [environ.get(name, default) for name, default in zip(names, defaults)]
    try:
        # SLURM writes tasks per node as "4(x2),3". The first number is that of the first nodes.
        rank, size, local_rank, local_size = (int(re.split(r"[(,]", value)[0]) for value in values)
    except ValueError:
        settings = ", ".join(f"{name}={value}" for name, value in zip(names, values))
        raise UserError(
            f"{names[0]}: the launcher set {settings}, but each must be a number. Check the launcher."
        ) from None
    if not 0 <= rank < size:
        raise UserError(
            f"{names[0]}: the launcher set {names[0]}={rank} and {names[1]}={size}, but ranks are numbered from 0 to "
            "the world size minus 1. Check the launcher."
        )
    return World(rank, size, local_rank, max(local_size, 1))
