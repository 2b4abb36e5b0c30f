"""The parts of DeepSpeed that cogds uses although its documentation does not promise them.

No other module touches these attributes. Each function says why it needs them. They are those of DeepSpeed 0.19.8.
tests/engine/test_state.py and tests/dist fail if a version changes one of them.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed.ops
import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from cogds.process.host_memory import HostBuffer

# ------------------------------------------------------------------------------------------------ start


def skip_shared_memory_op() -> None:
    """Keep `init_distributed` from compiling DeepSpeed's all-reduce through shared memory. Call it before, on CPUs.

    DeepSpeed uses the op only for inference. Compiling it takes minutes and needs a C++ compiler and the Python
    headers, and each rank would keep a buffer of 69 MB in /dev/shm. DeepSpeed has no setting for it: this is the table
    that it asks whether an op can be built (deepspeed/comm/torch.py, `build_shm_op`). On GPUs there is no such op, and
    the first access to the table would try compilers for all ops on every rank.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# ------------------------------------------------------------------------------------------------ parameters


def full_shape(parameter: Any) -> torch.Size:
    """Return the shape of a parameter. At stage 3, the parameter itself is an empty tensor, and `ds_shape` has it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def local_master_weight(parameter: Any, rank: int) -> torch.Tensor:
    """Return this rank's part of a parameter's float32 master weight, flat, without padding.

    The parts of all ranks together are the whole weight, once. `safe_get_full_fp32_param` would gather it on every
    rank, and `safe_get_local_fp32_param` exists for stage 3 only and returns the padding too.
    """
    if hasattr(parameter, "ds_tensor"):  # stage 3
        part = safe_get_local_fp32_param(parameter).flatten()
        start = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
        return part[: max(0, min(part.numel(), parameter.ds_numel - start))]
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2: None if no part of it is in this rank's partition
        mapping = parameter._hp_mapping
        return mapping.get_hp_fragment().detach().flatten() if mapping is not None else torch.empty(0)
    return parameter.detach().float().flatten()[: parameter.numel() if rank == 0 else 0]  # stage 0: every rank has all


def local_range(parameter: Any) -> range:
    """Return the elements of a parameter, in flat order, whose master weights this rank holds (stages 1 to 3)."""
    if hasattr(parameter, "ds_tensor"):
        size, numel = parameter.ds_tensor.ds_numel, parameter.ds_numel
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        return range(min(start, numel), min(start + size, numel))
    mapping = parameter._hp_mapping
    if mapping is None:
        return range(0)
    address = mapping.lp_fragment_address
    return range(address.start, address.start + address.numel)


def local_part(parameter: Any, state: str | None = None) -> torch.Tensor:
    """Return this rank's part of a float32 master weight, or of the optimizer state of that name: `local_range`, flat.

    May be a view.
    """
    if hasattr(parameter, "ds_tensor"):
        whole = (
            safe_get_local_fp32_param(parameter) if state is None else safe_get_local_optimizer_state(parameter, state)
        )
        return whole.flatten()[: len(local_range(parameter))]
    return parameter._hp_mapping.get_hp_fragment(state).detach().flatten()


def set_local_part(parameter: Any, value: torch.Tensor, state: str | None = None) -> None:
    """Set what `local_part` returns. `update_model_weights` then updates the model's own copies."""
    if not hasattr(parameter, "ds_tensor"):
        parameter._hp_mapping.get_hp_fragment(state).data.copy_(value)
        return
    padded = torch.nn.functional.pad(value, (0, parameter.ds_tensor.ds_numel - value.numel()))
    if state is None:
        safe_set_local_fp32_param(parameter, padded)
    else:
        safe_set_local_optimizer_state(parameter, padded, state)


def model_part(parameter: Any) -> torch.Tensor:
    """Return the same elements as `local_part` of the weight that the model computes with."""
    part = local_range(parameter)
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.detach().flatten()[: len(part)]
    return parameter.detach().flatten()[part.start : part.stop]


def update_model_weights(engine: Any) -> None:
    """Set the weights that the model computes with from the float32 masters of all ranks. Collective.

    DeepSpeed does this at the end of its own step, at stage 3 also for the small parameters that every rank keeps
    (stage3.py, `_post_step`).
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    for model, master in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat):
        model.data.copy_(master.data)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def set_zero3_partition(parameter: Any, value: torch.Tensor, rank: int, num_ranks: int, state: str | None) -> None:
    """Set this rank's partition of a master weight, or of the optimizer state of that name, from the whole tensor.

    `safe_set_full_*` fails if the world size does not divide the parameter, because the last partition is padded.
    """
    size = parameter.ds_tensor.numel()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * num_ranks - value.numel()))
    own = padded[size * rank : size * (rank + 1)]
    if state is None:
        safe_set_local_fp32_param(parameter, own)
    else:
        safe_set_local_optimizer_state(parameter, own, state)


# Start of each weight in the buffer of `merge_offloaded_weights`, in bytes, as in torch's own allocator on CPUs.
WEIGHT_ALIGNMENT = 64


def merge_offloaded_weights(module: torch.nn.Module) -> HostBuffer | None:
    """Move this rank's partitions of frozen weights that are in host memory into one buffer. It is not pinned.

    DeepSpeed pins every partition by itself, which torch rounds up to a power of two: on one GPU 19.8 GB instead of
    11.1 GB for CogVideoX-1.5-5B. (DS_PIN_MEMORY_BACKEND=native does not round up, but compiles an extension.) DeepSpeed
    only copies from and to the partition of a frozen weight, and makes those of trained weights views itself
    (stage3.py, `_move_to_flat_buffer`). Weights below the persistence threshold stay on the GPU.

    Returns the buffer, which the caller must keep as long as the module; None if there are no such weights.
    """
    frozen: list[Any] = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    partitions = [parameter.ds_tensor for parameter in frozen if parameter.ds_tensor.device.type == "cpu"]
    sizes = [-(-partition.nbytes // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT for partition in partitions]
    if not partitions:
        return None
    buffer = HostBuffer(sum(sizes))
    for partition, space in zip(partitions, buffer.bytes[: sum(sizes)].split(sizes)):
        view = space[: partition.nbytes].view(partition.dtype)
        partition.data = view.copy_(partition)  # frees its own memory, so there are never two copies of all weights
    return buffer


# ------------------------------------------------------------------------------------------------ the optimizer


def master_partitions(engine: Any) -> list[torch.Tensor]:
    """Return this rank's part of the float32 master weights: flat tensors, which are the optimizer's parameters.

    The public functions work on single parameters and cannot access step counters or create missing states.
    """
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def optimizer_states(engine: Any) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Yield each master partition with its optimizer state, which is empty before the first step."""
    for partition in master_partitions(engine):
        yield partition, engine.basic_optimizer.state.get(partition, {})


def has_optimizer_states(engine: Any) -> bool:
    """Whether the optimizer has already created its states."""
    return bool(engine.basic_optimizer.state)


def make_optimizer_states(engine: Any) -> None:
    """Make the optimizer create its states with a step that changes nothing: learning rate 0, gradients 0.

    Optimizers create states in their first step, and `safe_set_*_optimizer_state` sets only states that exist.
    """
    groups = engine.basic_optimizer.param_groups
    learning_rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    for number, partition in enumerate(master_partitions(engine)):
        has_no_gradient = partition.grad is None
        if has_no_gradient:
            partition.grad = torch.zeros_like(partition)
        engine.optimizer._optimizer_step(number)
        if has_no_gradient:
            partition.grad = None
    for group, learning_rate in zip(groups, learning_rates):
        group["lr"] = learning_rate


def set_native_step_counter(engine: Any, num_updates: int) -> None:
    """Set the step counter of DeepSpeed's CPU Adam, which is in C++. Do nothing for other optimizers.

    CPU Adam multiplies powers of the betas step by step. If it skips steps, it computes the powers directly, which
    rounds differently. So this function lets it count from the first step, on tensors that are not weights.
    """
    optimizer = engine.basic_optimizer
    native = getattr(optimizer, "ds_opt_adam", None)
    if native is None:
        return
    group, unused = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
    for step in range(1, num_updates + 1):
        native.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"], *unused
        )


# ------------------------------------------------------------------------------------------------ the engine


@contextmanager
def without_zero3_backward_hooks(module: torch.nn.Module, stage: int) -> Iterator[None]:
    """Run a forward and backward pass without ZeRO-3's backward hooks on blocks. No effect at the other stages.

    With `torch.autograd.grad`, no gradient is accumulated, and the hooks would create gradients of zeros and reduce
    them. Forward hooks still run, and so do the hooks that gather weights for the backward pass. There is no public way
    to disable the hooks.
    """
    if stage < 3:
        yield
        return
    hooked = [(child, child._backward_hooks) for child in module.modules() if child._backward_hooks]
    try:
        for child, _ in hooked:
            child._backward_hooks = OrderedDict()
        yield
    finally:
        for child, hooks in hooked:
            child._backward_hooks = hooks


def release_gathered_weights(engine: Any) -> None:
    """Release the weights that are still gathered after a backward pass without hooks (stage 3 only)."""
    engine.optimizer.parameter_offload.release_backward_leftovers()


def detach_monitor(engine: Any) -> Any | None:
    """Return the engine's monitor (W&B, Comet, CSV) and stop the engine from writing to it; None if there is none.

    The engine would write only the learning rate, and count samples instead of steps.
    """
    if not engine.monitor.enabled:
        return None
    engine.monitor.enabled = False
    return engine.monitor
