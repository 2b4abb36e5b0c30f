"""Rank facts in one value: who this process is among how many, whatever launcher started it.

The only reader of environment variables. `deepspeed` and `torchrun` set RANK and its kin; `srun` sets SLURM's, which
are mapped to them; a plain `python` is a world of one.
"""

import functools
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cogds.config import NetworkConfig
from cogds.errors import BugReported, Interrupted, UserError
from cogds.runtime.builds import announce_build, clear_builds
from cogds.runtime.chatter import leave_out, without_printed
from cogds.runtime.network import interface_addresses, network_env, replaced

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Global and node-local rank and size. Sizes count processes; one process drives one GPU.

    sequence: how many neighbouring ranks share each clip. Together they are one rank of data parallelism, which is what
    the plan, the sampler and the draws count.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    sequence: int = 1

    @property
    def data_rank(self) -> int:
        """Which of the clips trained at the same moment is this rank's."""
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        """How many ranks or groups of ranks train clips of their own."""
        return self.size // self.sequence

    @property
    def sequence_rank(self) -> int:
        """This rank's place among those that share its clip."""
        return self.rank % self.sequence

    @property
    def device(self) -> torch.device:
        """This rank's GPU, or the CPU where there is none. SLURM may show each task one GPU only: hence the modulo."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


def first_slurm_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[07-09,12],login1` -> `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist)
    if not match:
        raise UserError(f"SLURM_STEP_NODELIST is '{nodelist}', which is no node list: export MASTER_ADDR yourself")
    return "".join(part or "" for part in match.groups())


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """Rank facts from the launcher's environment; a world of one where no launcher left any.

    SLURM's variables count only inside `srun` (SLURM_STEP_NUM_TASKS): a batch script has SLURM_NTASKS too, but is one
    process. Raises UserError where the variables contradict each other.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        defaults = ("0", "1", "0", environ.get("LOCAL_SIZE", "1"))
    elif "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        defaults = ("0", "1", "0", "1")
    else:
        return World(0, 1, 0, 1)
    values = [environ.get(name, default) for name, default in zip(names, defaults)]
    try:
        # SLURM writes tasks per node as "4(x2),3": the first figure is the first nodes'.
        rank, size, local_rank, local_size = (int(re.split(r"[(,]", value)[0]) for value in values)
    except ValueError:
        raise UserError(f"the launcher set {dict(zip(names, values))}: each must be a number") from None
    if not 0 <= rank < size:
        raise UserError(f"the launcher set {names[0]}={rank} and {names[1]}={size}: a rank is below the world size")
    return World(rank, size, local_rank, max(local_size, 1))


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def export_rendezvous(world: World, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that DeepSpeed's `init_distributed` reads, where the launcher did not."""
    slurm = "RANK" not in environ and world.size > 1
    if slurm:
        job = int(environ.get("SLURM_JOB_ID", "0")) * 16 + int(environ.get("SLURM_STEP_ID", "0"))
        host, port = first_slurm_host(environ.get("SLURM_STEP_NODELIST", "")), 20000 + job % 12000
    else:
        host, port = "127.0.0.1", 0
    environ.setdefault("MASTER_ADDR", host)
    if "MASTER_PORT" not in environ:
        environ["MASTER_PORT"] = str(port or _free_port())
    environ["RANK"], environ["WORLD_SIZE"] = str(world.rank), str(world.size)
    # DeepSpeed takes it for the index of the GPU, of which a task may be shown only its own.
    environ["LOCAL_RANK"] = str(world.device.index if world.device.type == "cuda" else world.local_rank)


def set_network(world: World, network: NetworkConfig, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what the run config says of the network. What the environment had otherwise is said once, by rank 0."""
    place = f"rank {world.rank} on {socket.gethostname()}"
    wanted = network_env(network.interface, network.env, interface_addresses(), place)
    if world.rank == 0:
        for sentence in replaced(wanted, environ):
            print(sentence, flush=True)
    environ.update(wanted)


def settings(*prefixes: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables whose names begin so."""
    return {name: value for name, value in sorted(environ.items()) if name.startswith(prefixes)}


def open_store(world: World, timeout_s: float, environ: MutableMapping[str, str] = os.environ) -> dist.Store | None:
    """The key-value store behind the process group, before there is one: works where NCCL and gloo do not.

    None in a world of one. On rank 0 it must be kept until `connect`, which shares it. Raises UserError where rank 0
    does not answer for `timeout_s`.
    """
    if world.size == 1:
        return None
    export_rendezvous(world, environ)
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    # torchrun keeps the store in a process of its own.
    serves = world.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    trouble = "" if serves else _unreachable(host, port, timeout_s)
    if not trouble:
        try:
            return dist.TCPStore(
                host, port, None, serves, timedelta(seconds=timeout_s), wait_for_workers=False, multi_tenant=True
            )
        except dist.DistError as error:
            trouble = str(error).splitlines()[0]
    raise UserError(
        f"{host}:{port} (MASTER_ADDR and MASTER_PORT) cannot be {'opened by' if serves else 'reached from'} rank "
        f"{world.rank} on {socket.gethostname()} ({trouble}): rank 0 must be running there, the port be free, and no "
        "firewall stand between"
    )


def _unreachable(host: str, port: int, timeout_s: float) -> str:
    """Why nothing answers there within `timeout_s`; "" as soon as something does."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return ""
        except OSError as error:
            if time.monotonic() > deadline:
                return error.strerror or str(error)
        time.sleep(0.2)


_timeout = timedelta(minutes=30)


def connect(world: World, timeout_s: float, network: NetworkConfig = NetworkConfig()) -> None:  # noqa: B008 (frozen)
    """Join the process group (NCCL on GPUs, gloo on CPUs). Collectives fail after `timeout_s` without an answer."""
    import deepspeed  # not by what never joins a process group

    leave_out()
    set_network(world, network)
    export_rendezvous(world)
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    clear_builds(built)
    if world.device.type == "cpu" and world.local_rank == 0:
        announce_build(built, "deepspeed_shm_comm")
    if world.device.type == "cuda":
        # Clips of every length tear the allocator's memory into pieces. Read at the first allocation; not yet measured.
        if not settings("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        torch.cuda.set_device(world.device)
    with without_printed():
        deepspeed.init_distributed(
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=timeout_s),
            verbose=False,
            rank=world.rank,
            world_size=world.size,
        )
    global _timeout
    _timeout = timedelta(seconds=timeout_s)
    if world.size > 1:  # where gloo cannot connect, that is said now and not after the first step
        _on_cpus()
        _for_objects()


def any_rank(world: World, *flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether it is set on any rank. Collective, once a step: on CPUs, so no GPU is waited for."""
    if world.size == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_on_cpus())
    return tuple(map(bool, votes.tolist()))


def disagreeing(world: World, value: int) -> list[int]:
    """The data-parallel ranks within which not all have the same value. Collective, on CPUs, where clips are shared."""
    if world.sequence == 1:
        return []
    votes = torch.full((2, world.data_size), torch.iinfo(torch.int64).min)
    votes[:, world.data_rank] = torch.tensor([value, -value])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_on_cpus())
    return [number for number, (most, least) in enumerate(votes.T.tolist()) if most != -least]


@functools.cache
def _on_cpus() -> Any:
    """A process group over CPUs, made when it is first asked for, by all ranks together. The watchdog bounds it."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


@functools.cache
def _for_objects() -> Any:
    """Another one, with the timeout that `connect` was given: what is pickled does not go through a GPU's memory."""
    return dist.new_group(backend="gloo", timeout=_timeout)


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error says that another rank has died or cannot be reached. Gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def contact_sentence(world: World, error: RuntimeError, environ: Mapping[str, str] = os.environ) -> str:
    """What is told of an error of which `lost_contact` is true."""
    place = f"rank {world.rank} ({socket.gethostname()})"
    if "EADDRINUSE" in str(error):
        return (
            f"{place} cannot open port {environ.get('MASTER_PORT')} (MASTER_PORT), where the ranks of a job meet: "
            "another process has it, such as another run on this machine; give this one a port of its own "
            "(deepspeed --master_port 29501; under srun, export MASTER_PORT), or wait until that one has ended"
        )
    return (
        f"{place} lost contact with another rank, which has died or can no longer be reached: the job ends here, and "
        f"the same command goes on from the last checkpoint: {error}"
    )


def connected() -> bool:
    """Whether this process has joined the process group."""
    return dist.is_initialized()


def disconnect() -> None:
    """Leave the process group together: without the barrier, one run in five aborts at exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def on_rank0(world: World, function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and give its result to every rank; where it raises, every rank does.

    So that a question with one answer is asked once, and a failure never leaves the others waiting. A UserError and
    Interrupted are raised on every rank, anything else as BugReported on the other ranks.
    """
    outcome: list[Any] = [None, None]
    own: Exception | None = None
    if world.rank == 0:
        try:
            outcome[0] = function()
        except (UserError, Interrupted) as error:  # carried to the other ranks, then raised
            own = outcome[1] = error
        except Exception as error:
            own, outcome[1] = error, BugReported(f"rank 0 failed: {type(error).__name__}: {error}")
    if world.size > 1:
        dist.broadcast_object_list(outcome, src=0, group=_for_objects())
    if own is not None:
        raise own
    if outcome[1] is not None:
        if isinstance(outcome[1], UserError):
            outcome[1].shared = True
        raise outcome[1]
    return outcome[0]


def dealt_by_rank0(world: World, function: Callable[[], list[T]]) -> T:
    """Run `function` on rank 0, which gives one value for every rank, and give each rank its own. Collective.

    What it raises is raised on every rank.
    """
    dealt: list[T] = []
    on_rank0(world, lambda: dealt.extend(function()))
    if world.size == 1:
        return dealt[0]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, dealt if world.rank == 0 else None, src=0, group=_for_objects())
    return mine[0]


def on_all_ranks(world: World, function: Callable[[], T]) -> list[T]:
    """Run `function` on every rank and give every rank all results, in rank order. Collective.

    Where it raises on one rank, all ranks raise: that one its own error, the others a shared UserError if that is what
    another rank raised, else BugReported.
    """
    result: Any = None
    own: Exception | None = None
    try:
        result = function()
    except Exception as error:  # told below, once every rank has got here
        own = error
    results = all_gather(world, (result, own and f"{type(own).__name__}: {own}", isinstance(own, UserError)))
    if own is not None:
        raise own
    for rank, (_, failure, is_users) in enumerate(results):
        if failure and not is_users:
            raise BugReported(f"rank {rank} failed: {failure}")
    for rank, (_, failure, _) in enumerate(results):
        if failure:
            elsewhere = UserError(f"rank {rank} failed: {failure}")
            elsewhere.shared = True
            raise elsewhere
    return [one for one, _, _ in results]


def all_gather(world: World, value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=_for_objects())
    return values


def broadcast(world: World, rank: int, value: T) -> T:
    """The value that this rank gave, on every rank. Collective."""
    if world.size == 1:
        return value
    outcome = [value if world.rank == rank else None]
    dist.broadcast_object_list(outcome, src=rank, group=_for_objects())
    return outcome[0]  # type: ignore[return-value]


def all_reduce_sum(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        dist.barrier()
