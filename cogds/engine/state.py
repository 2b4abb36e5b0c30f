"""What training changes, whole: taken out of any ZeRO stage, world size and offload, and put back into any other.

Of every trainable parameter, by name and in float32: its master weight, and what the optimizer keeps of it (AdamW: two
moments). A LoRA's are small enough for one copy in the host memory of rank 0, whatever they were spread over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from cogds.distributed.collectives import on_rank0
from cogds.distributed.world import World
from cogds.engine.deepspeed_internals import (
    full_shape,
    make_optimizer_states,
    optimizer_states,
    set_native_step_counter,
    set_zero3_partition,
)
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
    return sum(12 * full_shape(parameter).numel() for parameter in trainable(engine).values())


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
            found, wanted = tuple(state.tensors[f"{WEIGHT}/{name}"].shape), tuple(full_shape(parameter))
            if found != wanted:
                raise UserError(f"the checkpoint is of another LoRA: '{name}' is {found}, not {wanted}")
        return state.kinds, state.num_updates

    kinds, num_updates = on_rank0(world, checked)
    if len(kinds) > 1:
        make_optimizer_states(engine)
    for name, parameter in parameters.items():
        for kind in kinds:
            value = torch.empty(full_shape(parameter), device=world.device)
            if world.rank == 0:
                value.copy_(state.tensors[f"{kind}/{name}"])
            if world.size > 1:
                dist.broadcast(value, src=0)
            _set(engine, parameter, kind, value, world)
    _set_counters(engine, num_updates)


def _set(engine: Any, parameter: Any, kind: str, value: torch.Tensor, world: World) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 3:
        set_zero3_partition(parameter, value, world.rank, world.size, None if kind == WEIGHT else kind)
    elif kind == WEIGHT:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)
    if kind == WEIGHT:  # the copy that the model computes with
        with gathered([parameter], stage, modifier_rank=0), torch.no_grad():
            if stage < 3 or world.rank == 0:
                parameter.data.copy_(value)


def _optimizer_kinds(engine: Any) -> tuple[list[str], float]:
    """What the optimizer keeps of every weight, and how many steps it has taken. Nothing before the first."""
    for partition, kept in optimizer_states(engine):
        kinds = [key for key, value in kept.items() if torch.is_tensor(value) and value.shape == partition.shape]
        counters = [kept.get(COUNTER), *(group.get(COUNTER) for group in engine.basic_optimizer.param_groups)]
        return sorted(kinds), max((float(one) for one in counters if one is not None), default=0.0)
    return [], 0.0


def _set_counters(engine: Any, num_updates: float) -> None:
    holders = [*(kept for _, kept in optimizer_states(engine)), *engine.basic_optimizer.param_groups]
    for holder in holders:
        if torch.is_tensor(holder.get(COUNTER)):
            holder[COUNTER].fill_(num_updates)
        elif COUNTER in holder:
            holder[COUNTER] = type(holder[COUNTER])(num_updates)
    set_native_step_counter(engine, int(num_updates))
