"""The process group: how ranks meet, join and leave, and how a lost connection is recognized.

connect(world, timeout_s, network)
...
disconnect()
"""

import os
import re
import socket
import time
from collections.abc import MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist

from cogds.config.schema import NetworkConfig
from cogds.distributed.network import set_network
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.process.log_filters import filter_stdout, install_log_filters


class GlooGroups:
    """Gloo process groups in addition to the default group. All ranks together create each group at its first use."""

    def __init__(self) -> None:
        self.reset(timeout_s=1800.0)

    def reset(self, timeout_s: float) -> None:
        """Forget the groups. `timeout_s` is the time limit of the next `objects` group."""
        self._timeout_s = timeout_s
        self._groups: dict[str, dist.ProcessGroup] = {}

    @property
    def flags(self) -> dist.ProcessGroup:
        """For flags that are compared at every step. Only the watchdog limits the wait."""
        return self._group("flags", timedelta(days=1))

    @property
    def objects(self) -> dist.ProcessGroup:
        """For pickled objects, which would otherwise go through a GPU's memory. Has the time limit of `connect`."""
        return self._group("objects", timedelta(seconds=self._timeout_s))

    def _group(self, name: str, timeout: timedelta) -> dist.ProcessGroup:
        if name not in self._groups:
            self._groups[name] = dist.new_group(backend="gloo", timeout=timeout)
        return self._groups[name]


gloo_groups = GlooGroups()


# ------------------------------------------------------------------------------------------------ where ranks meet


def first_slurm_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: `gpu[07-09,12],login1` -> `gpu07`.

    Raises:
        UserError: The text is not a node list.
    """
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist)
    if not match:
        raise UserError(f"SLURM_STEP_NODELIST: '{nodelist}' is not a node list. Export MASTER_ADDR yourself.")
    return "".join(part or "" for part in match.groups())


def export_rendezvous(world: World, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that DeepSpeed's `init_distributed` reads, unless the launcher has set them."""
    if "RANK" not in environ and world.size > 1:  # started by srun
        job = int(environ.get("SLURM_JOB_ID", "0")) * 16 + int(environ.get("SLURM_STEP_ID", "0"))
        host, port = first_slurm_host(environ.get("SLURM_STEP_NODELIST", "")), 20000 + job % 12000
    else:
        host, port = "127.0.0.1", 0
    environ.setdefault("MASTER_ADDR", host)
    if "MASTER_PORT" not in environ:
        environ["MASTER_PORT"] = str(port or _free_port())
    environ["RANK"], environ["WORLD_SIZE"] = str(world.rank), str(world.size)
    # DeepSpeed uses it as the index of the GPU, but under SLURM a task may see only its own GPU.
    environ["LOCAL_RANK"] = str(world.device.index if world.device.type == "cuda" else world.local_rank)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def open_store(world: World, timeout_s: float, environ: MutableMapping[str, str] = os.environ) -> dist.Store | None:
    """Open the key-value store behind the process group, which needs neither NCCL nor gloo.

    Returns None in a world of one rank. Rank 0 must keep the store until `connect`, which shares it.

    Raises:
        UserError: Rank 0 does not answer within `timeout_s`, or its port is taken.
    """
    if world.size == 1:
        return None
    export_rendezvous(world, environ)
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    # torchrun keeps the store in a process of its own.
    is_server = world.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    problem = "" if is_server else _unreachable(host, port, timeout_s)
    if not problem:
        try:
            return dist.TCPStore(
                host, port, None, is_server, timedelta(seconds=timeout_s), wait_for_workers=False, multi_tenant=True
            )
        except dist.DistError as error:
            problem = str(error).splitlines()[0]
    raise UserError(
        f"MASTER_ADDR, MASTER_PORT: rank {world.rank} on {socket.gethostname()} cannot "
        f"{'open' if is_server else 'reach'} {host}:{port} ({problem}). Check that rank 0 runs on that host, that the "
        "port is free, and that no firewall blocks it."
    )


def _unreachable(host: str, port: int, timeout_s: float) -> str:
    """Return why no process accepts connections within `timeout_s`, or "" as soon as one does."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return ""
        except OSError as error:
            if time.monotonic() > deadline:
                return error.strerror or str(error)
        time.sleep(0.2)


# ------------------------------------------------------------------------------------------------ join and leave


def connect(world: World, timeout_s: float, network: NetworkConfig = NetworkConfig()) -> None:  # noqa: B008 (frozen)
    """Join the process group (NCCL on GPUs, gloo on CPUs). Collectives fail after `timeout_s` without an answer."""
    # Slow to import, and many users of this module never join a process group.
    import deepspeed

    from cogds.distributed.deepspeed_internals import skip_shared_memory_op

    install_log_filters()
    set_network(world, network)
    export_rendezvous(world)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        skip_shared_memory_op()
    with filter_stdout():
        deepspeed.init_distributed(
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=timeout_s),
            verbose=False,
            rank=world.rank,
            world_size=world.size,
        )
    gloo_groups.reset(timeout_s)
    if world.size > 1:  # if gloo cannot connect, fail now and not after the first step
        _ = gloo_groups.flags, gloo_groups.objects


def is_connected() -> bool:
    """Whether this process has joined the process group."""
    return dist.is_initialized()


def disconnect() -> None:
    """Leave the process group. Collective. Without the barrier, one run in five aborts at exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ lost connections


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether the error says that another rank died or cannot be reached. Gloo has no exception class for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def lost_connection_message(world: World, error: RuntimeError) -> str:
    """Return the message for an error that `is_lost_connection` recognizes."""
    place = f"rank {world.rank} ({socket.gethostname()})"
    if "EADDRINUSE" in str(error):
        return (
            f"MASTER_PORT: {place} cannot open port {os.environ.get('MASTER_PORT')}: another process uses it, for "
            "example another run on this machine. Choose another port (deepspeed --master_port 29501; under srun, "
            "export MASTER_PORT), or wait until the other process has ended."
        )
    return (
        f"{place} lost its connection to another rank, which died or cannot be reached, and the job ends: {error}. Run "
        "the same command again to continue from the last checkpoint."
    )
