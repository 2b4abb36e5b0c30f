"""What training changes, whole: taken out of any ZeRO stage, world size and offload, and put back into any other.

Of every trainable parameter, by name and in float32: its master weight, and what the optimizer keeps of it (AdamW: two
moments). A LoRA's are small enough for one copy in the host memory of rank 0, whatever they were spread over.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from cogds.distributed.collectives import on_rank0
from cogds.distributed.world import World
from cogds.engine.start import gathered
from cogds.errors import UserError

WEIGHT = "weight"
COUNTER = "step"  # what optimizers call the number of steps they have taken


@dataclass(frozen=True)
class TrainState:
    """tensors: `KIND/NAME` -> float32, on the CPU; kinds are `weight` and the optimizer's own, such as `exp_avg`.

    num_updates: steps that the optimizer has taken; skipped ones are not among them.
    """

    tensors: dict[str, torch.Tensor]
    num_updates: float = 0

    @property
    def kinds(self) -> list[str]:
        """The kinds, the weight first."""
        return sorted({name.partition("/")[0] for name in self.tensors}, key=lambda kind: (kind != WEIGHT, kind))

    def weights(self, like: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        """The weights by parameter name, in the dtypes that the model computes with."""
        return {name: self.tensors[f"{WEIGHT}/{name}"].to(dtype) for name, dtype in like.items()}


def trainable(engine: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def state_bytes(engine: Any) -> int:
    """Size of the state with two moments: what a checkpoint takes."""
    return sum(12 * _shape(parameter).numel() for parameter in trainable(engine).values())


def gather_state(engine: Any, world: World) -> TrainState:
    """The state as it is now, on rank 0; the others get an empty one. Collective."""
    kinds, num_updates = _optimizer_kinds(engine)
    tensors = {}
    for name, parameter in trainable(engine).items():
        for kind in (WEIGHT, *kinds):
            if kind == WEIGHT:
                whole = safe_get_full_fp32_param(parameter)
            else:
                whole = safe_get_full_optimizer_state(parameter, kind)
            if world.rank == 0:
                tensors[f"{kind}/{name}"] = whole.detach().float().cpu().clone()
        if world.rank == 0 and engine.zero_optimization_stage() < 3:
            _check_same(name, parameter, tensors[f"{WEIGHT}/{name}"])
    if not kinds and engine.global_steps > engine.skipped_steps:
        raise RuntimeError(
            f"{type(engine.basic_optimizer).__name__} has taken steps, but keeps nothing where it should"
        )
    return TrainState(tensors, num_updates)


def _check_same(name: str, parameter: torch.nn.Parameter, master: torch.Tensor) -> None:
    """A master weight that is not the model's own would be another parameter's, or a part of one: never save that."""
    if not torch.equal(master.to(parameter.dtype), parameter.detach().cpu()):
        raise RuntimeError(f"what DeepSpeed gives for '{name}' is not what the model computes with: nothing was saved")


def restore_state(engine: Any, state: TrainState, world: World) -> None:
    """Give a fresh engine the state that rank 0 has; what the others give is not looked at. Collective.

    Raises UserError where the state is not of these parameters.
    """
    parameters = trainable(engine)

    def checked() -> tuple[list[str], float]:
        expected = {f"{kind}/{name}" for kind in state.kinds for name in parameters}
        if odd := sorted(expected ^ set(state.tensors)):
            raise UserError(f"the checkpoint is of another LoRA: '{odd[0]}' is only in one of them")
        for name, parameter in parameters.items():
            found, wanted = tuple(state.tensors[f"{WEIGHT}/{name}"].shape), tuple(_shape(parameter))
            if found != wanted:
                raise UserError(f"the checkpoint is of another LoRA: '{name}' is {found}, not {wanted}")
        return state.kinds, state.num_updates

    kinds, num_updates = on_rank0(world, checked)
    if len(kinds) > 1:
        _make_optimizer_states(engine)
    for name, parameter in parameters.items():
        for kind in kinds:
            value = torch.empty(_shape(parameter), device=world.device)
            if world.rank == 0:
                value.copy_(state.tensors[f"{kind}/{name}"])
            if world.size > 1:
                dist.broadcast(value, src=0)
            _set(engine, parameter, kind, value, world)
    _set_counters(engine, num_updates)


def _shape(parameter: Any) -> torch.Size:
    # At stage 3 the parameter itself is an empty tensor.
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _set(engine: Any, parameter: Any, kind: str, value: torch.Tensor, world: World) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 3:
        # `safe_set_full_*` fails where the world size does not divide the parameter: the last share is padded.
        share = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, share * world.size - value.numel()))
        own = padded[share * world.rank : share * (world.rank + 1)]
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, kind)
    elif kind == WEIGHT:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)
    if kind == WEIGHT:  # the copy that the model computes with
        with gathered([parameter], stage, modifier_rank=0), torch.no_grad():
            if stage < 3 or world.rank == 0:
                parameter.data.copy_(value)


def _partitions(engine: Any) -> list[torch.Tensor]:
    """This rank's share of the float32 weights, in flat tensors that the optimizer knows as its parameters."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def _optimizer_states(engine: Any) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    for partition in _partitions(engine):
        yield partition, engine.basic_optimizer.state.get(partition, {})


def _optimizer_kinds(engine: Any) -> tuple[list[str], float]:
    """What the optimizer keeps of every weight, and how many steps it has taken. Nothing before the first."""
    for partition, kept in _optimizer_states(engine):
        kinds = [key for key, value in kept.items() if torch.is_tensor(value) and value.shape == partition.shape]
        counters = [kept.get(COUNTER), *(group.get(COUNTER) for group in engine.basic_optimizer.param_groups)]
        return sorted(kinds), max((float(one) for one in counters if one is not None), default=0.0)
    return [], 0.0


def _set_counters(engine: Any, num_updates: float) -> None:
    holders = [*(kept for _, kept in _optimizer_states(engine)), *engine.basic_optimizer.param_groups]
    for holder in holders:
        if torch.is_tensor(holder.get(COUNTER)):
            holder[COUNTER].fill_(num_updates)
        elif COUNTER in holder:
            holder[COUNTER] = type(holder[COUNTER])(num_updates)
    native = getattr(engine.basic_optimizer, "ds_opt_adam", None)
    if native is not None:
        _count_natively(native, engine.basic_optimizer, int(num_updates))


def _count_natively(native: Any, optimizer: Any, num_updates: int) -> None:
    """DeepSpeed's Adam on CPUs has a counter of its own, and multiplies powers of the betas step by step. Told a later
    step it would raise them to it, which rounds otherwise: so it counts from the first, on a number that is no weight.
    """
    group, nothing = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
    for step in range(1, num_updates + 1):
        native.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"], *nothing
        )


def _make_optimizer_states(engine: Any) -> None:
    """Optimizers make their states at their first step: take one that changes nothing."""
    groups = engine.basic_optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    for number, partition in enumerate(_partitions(engine)):
        lent = partition.grad is None
        if lent:
            partition.grad = torch.zeros_like(partition)
        engine.optimizer._optimizer_step(number)
        if lent:
            partition.grad = None
    for group, rate in zip(groups, rates):
        group["lr"] = rate
