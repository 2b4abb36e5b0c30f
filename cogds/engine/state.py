"""The training state, gathered from any ZeRO stage, world size and offload setting, and restored into any other.

It holds the float32 master weight and the optimizer's states (two moments for AdamW) of every trainable parameter. For
a LoRA, this is small enough for a copy in the host memory of rank 0.
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
from cogds.distributed.deepspeed_internals import (
    full_shape,
    make_optimizer_states,
    optimizer_states,
    set_native_step_counter,
    set_zero3_partition,
)
from cogds.distributed.world import World
from cogds.engine.start import gathered
from cogds.errors import UserError

WEIGHT = "weight"
STEP_COUNTER = "step"  # name of the optimizers' number of steps taken
ADVICE = "Set lora.* as in the checkpoint, or start a new run with checkpoint.resume=none."


@dataclass(frozen=True)
class TrainState:
    """The training state.

    tensors: `KIND/NAME` -> float32 on the CPU. KIND is `weight` or a state of the optimizer, such as `exp_avg`.
    num_updates: number of steps that the optimizer has taken, without skipped steps.
    """

    tensors: dict[str, torch.Tensor]
    num_updates: float = 0

    @property
    def kinds(self) -> list[str]:
        """The kinds of tensors, `weight` first."""
        return sorted({name.partition("/")[0] for name in self.tensors}, key=lambda kind: (kind != WEIGHT, kind))

    def weights(self, like: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        """Return the weights by parameter name, in the model's own dtypes."""
        return {name: self.tensors[f"{WEIGHT}/{name}"].to(dtype) for name, dtype in like.items()}


def trainable(engine: Any) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def state_bytes(engine: Any) -> int:
    """Return the size of a state with two moments, which is about that of a checkpoint."""
    return sum(12 * full_shape(parameter).numel() for parameter in trainable(engine).values())


def gather_state(engine: Any, world: World) -> TrainState:
    """Return the current state on rank 0, and an empty one on the other ranks. Collective."""
    kinds, num_updates = optimizer_kinds(engine)
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
        raise RuntimeError(f"{type(engine.basic_optimizer).__name__} has taken steps, but its states are not found")
    return TrainState(tensors, num_updates)


def _check_same(name: str, parameter: torch.nn.Parameter, master: torch.Tensor) -> None:
    """Refuse to save a master weight that is not the model's, for example another parameter's or only a part of it."""
    if not torch.equal(master.to(parameter.dtype), parameter.detach().cpu()):
        raise RuntimeError(f"DeepSpeed's master weight of '{name}' is not the model's weight; nothing is saved")


def restore_state(engine: Any, state: TrainState, world: World) -> None:
    """Restore rank 0's state into a new engine. The argument of the other ranks is ignored. Collective.

    Raises:
        UserError: The state belongs to other parameters.
    """
    parameters = trainable(engine)

    def check() -> tuple[list[str], float]:
        expected = {f"{kind}/{name}" for kind in state.kinds for name in parameters}
        if different := sorted(expected ^ set(state.tensors)):
            where = "checkpoint" if different[0] in state.tensors else "run"
            raise UserError(
                f"checkpoint.resume: the checkpoint has a different LoRA: '{different[0]}' is only in the {where}. "
                f"{ADVICE}"
            )
        for name, parameter in parameters.items():
            saved, expected_shape = tuple(state.tensors[f"{WEIGHT}/{name}"].shape), tuple(full_shape(parameter))
            if saved != expected_shape:
                raise UserError(
                    f"checkpoint.resume: the checkpoint has a different LoRA: '{name}' has shape {saved} instead of "
                    f"{expected_shape}. {ADVICE}"
                )
        return state.kinds, state.num_updates

    kinds, num_updates = on_rank0(world, check)
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
    set_counters(engine, num_updates)


def _set(engine: Any, parameter: Any, kind: str, value: torch.Tensor, world: World) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 3:
        set_zero3_partition(parameter, value, world.rank, world.size, None if kind == WEIGHT else kind)
    elif kind == WEIGHT:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)
    if kind == WEIGHT:  # the model's own copy
        with gathered([parameter], stage, modifier_rank=0), torch.no_grad():
            if stage < 3 or world.rank == 0:
                parameter.data.copy_(value)


def optimizer_kinds(engine: Any) -> tuple[list[str], float]:
    """Return the names of the optimizer's states and its number of steps: none and 0 before the first step."""
    for partition, states in optimizer_states(engine):
        kinds = [name for name, value in states.items() if torch.is_tensor(value) and value.shape == partition.shape]
        holders = [states, *engine.basic_optimizer.param_groups]
        counters = [float(holder[STEP_COUNTER]) for holder in holders if holder.get(STEP_COUNTER) is not None]
        return sorted(kinds), max(counters, default=0.0)
    return [], 0.0


def set_counters(engine: Any, num_updates: float) -> None:
    """Set the optimizer's number of steps."""
    holders = [*(states for _, states in optimizer_states(engine)), *engine.basic_optimizer.param_groups]
    for holder in holders:
        if torch.is_tensor(holder.get(STEP_COUNTER)):
            holder[STEP_COUNTER].fill_(num_updates)
        elif STEP_COUNTER in holder:
            holder[STEP_COUNTER] = type(holder[STEP_COUNTER])(num_updates)
    set_native_step_counter(engine, int(num_updates))
