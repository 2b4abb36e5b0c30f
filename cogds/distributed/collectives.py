"""Operations that all ranks take part in. Every function is collective, and the identity in a world of one rank.

Small values travel over gloo on the CPU, so no rank waits for its GPU. `all_reduce_sum` uses the default group.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cogds.distributed.process_group import gloo_groups
from cogds.distributed.world import World
from cogds.errors import BugReported, Interrupted, UserError, brief

T = TypeVar("T")


def on_rank0(world: World, function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and return its result on every rank.

    An exception is raised on every rank: UserError and Interrupted unchanged, any other as BugReported on the other
    ranks.
    """
    result, own_error = _try_on_rank0(world, function)
    result, error = broadcast(world, 0, (result, _error_elsewhere(own_error)))
    _raise(own_error or error)
    return result  # type: ignore[return-value]


def rank0_only(world: World, function: Callable[[], T]) -> T | None:
    """Run `function` on rank 0 and return its result on rank 0 only; the other ranks get None.

    The result need not be picklable. Errors are raised on every rank, as by `on_rank0`.
    """
    result, own_error = _try_on_rank0(world, function)
    error = broadcast(world, 0, _error_elsewhere(own_error))
    _raise(own_error or error)
    return result


def _try_on_rank0(world: World, function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    if world.rank > 0:
        return None, None
    try:
        return function(), None
    except Exception as error:  # raised when the other ranks know
        return None, error


def _error_elsewhere(error: Exception | None) -> Exception | None:
    """Return the exception for the other ranks if this rank raises `error`. Only this rank reports it."""
    if isinstance(error, UserError):
        return error.as_shared()
    if error is None or isinstance(error, Interrupted):
        return error
    return BugReported(f"another rank failed: {brief(error)}")


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def scatter_from_rank0(world: World, function: Callable[[], list[T]]) -> T:
    """Run `function` on rank 0 and give each rank its own element of the list that it returns.

    Errors are raised on every rank, as by `on_rank0`.
    """
    values = rank0_only(world, function)
    if values is not None and world.size == 1:
        return values[0]
    own: list[Any] = [None]
    dist.scatter_object_list(own, values, src=0, group=gloo_groups.objects)
    return own[0]


def on_all_ranks(world: World, function: Callable[[], T]) -> list[T]:
    """Run `function` on every rank and return all results, in rank order, on every rank.

    If it fails on any rank, every rank raises: a failed rank its own error, and the others BugReported if any error is
    a bug, otherwise a shared UserError.
    """
    result: Any = None
    own_error: Exception | None = None
    try:
        result = function()
    except Exception as error:  # raised below, when every rank knows
        own_error = error
    outcomes = all_gather(world, (result, own_error and brief(own_error), isinstance(own_error, UserError)))
    _raise(own_error)
    failures = [
        (f"rank {rank} failed: {message}", is_user_error)
        for rank, (_, message, is_user_error) in enumerate(outcomes)
        if message
    ]
    for message, is_user_error in sorted(failures, key=lambda failure: failure[1]):  # a bug first
        raise UserError(message, shared=True) if is_user_error else BugReported(message)
    return [value for value, _, _ in outcomes]


def all_gather(world: World, value: T) -> list[T]:
    """Return every rank's value, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=gloo_groups.objects)
    return values


def broadcast(world: World, rank: int, value: T) -> T:
    """Return the value of that rank on every rank; the other ranks' values are ignored."""
    if world.size == 1:
        return value
    values = [value if world.rank == rank else None]
    dist.broadcast_object_list(values, src=rank, group=gloo_groups.objects)
    return values[0]  # type: ignore[return-value]


def any_rank(world: World, *flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is set on any rank."""
    if world.size == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=gloo_groups.flags)
    return tuple(map(bool, votes.tolist()))


def disagreeing_data_ranks(world: World, value: int) -> list[int]:
    """Return the data-parallel ranks whose sequence-parallel ranks do not all have the same value."""
    if world.sequence_size == 1:
        return []
    votes = torch.full((2, world.data_size), torch.iinfo(torch.int64).min)
    votes[:, world.data_rank] = torch.tensor([value, -value])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=gloo_groups.flags)
    return [data_rank for data_rank, (largest, smallest) in enumerate(votes.T.tolist()) if largest != -smallest]


def all_reduce_sum(world: World, tensor: torch.Tensor) -> torch.Tensor:
    """Sum the tensor over ranks, in place, and return it."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        dist.barrier()
