"""Load the transformer for a ZeRO stage, create the DeepSpeed engine, and gather parameters."""

import copy
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch

from cogds.config.deepspeed import compiles_extension, zero_stage
from cogds.distributed.deepspeed_internals import merge_offloaded_weights
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.model.load import ModelFolder, build_transformer, fill_transformer, load_transformer
from cogds.model.trained_weights import train_weights
from cogds.model.transformer.forward import Block, Transformer
from cogds.process.environment import extensions_folder, find_ninja
from cogds.process.extension_locks import remove_stale_locks
from cogds.process.host_memory import HostBuffer

logger = logging.getLogger(__name__)


@contextmanager
def gathered(parameters: Sequence[torch.nn.Parameter], stage: int, modifier_rank: int | None = None) -> Iterator[None]:
    """Gather whole parameters on every rank while the block runs. Collective at stage 3, no effect at other stages.

    modifier_rank: the rank whose changes are sent to the others at the end.
    """
    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank, enabled=stage == 3):
        yield


def build_for_stage(
    model: ModelFolder,
    dtype: torch.dtype,
    ds_config: dict[str, Any],
    device: torch.device,
    quantization: str = "none",
    fp8_matmul: bool = False,
    trained: Collection[str] = (),
) -> Transformer:
    """Build the transformer with random weights. Collective.

    It is whole on `device` below stage 3, and partitioned over the ranks at stage 3. A block is a unit of ZeRO-3: its
    weights are gathered together before its forward and its backward pass.

    quantization, fp8_matmul: of the blocks' weights (`model.quantize`); not at stage 3 (`check_quantization`).
    trained: names of the weights that are trained; all others are frozen.
    """
    prepare_extensions(ds_config)
    if zero_stage(ds_config) < 3:
        return train_weights(build_transformer(model, dtype, device, quantization, fp8_matmul), trained)
    # The dtype is passed in the config: `zero.Init(dtype=...)` ignores it if the accelerator has no fp16.
    init_config = {**copy.deepcopy(ds_config), "bf16": {"enabled": dtype is torch.bfloat16}}
    offload = init_config["zero_optimization"].get("offload_param") or {}
    is_pinned = offload.get("device") == "cpu" and offload.pop("pin_memory", False)
    with deepspeed.zero.Init(config_dict_or_path=init_config):
        transformer = train_weights(build_transformer(model, dtype), trained)
    transformer.compute_positions()
    if is_pinned:
        transformer.offloaded_weights = _pin_in_one_piece(transformer, device)
    prepare_for_zero3(transformer)
    return transformer


def prepare_extensions(ds_config: dict[str, Any]) -> None:
    """Get ready to compile the extensions of this config. `zero.Init` may already compile one, for weights on NVMe."""
    if compiles_extension(ds_config):
        logger.info(
            "DeepSpeed compiles an extension for this config at its first use, which takes a minute or more. The "
            "shipped configs need none (optimizer.params.torch_adam=true)."
        )
        find_ninja()
        remove_stale_locks(extensions_folder())


def prepare_for_zero3(transformer: Transformer) -> None:
    """Make each block a unit of ZeRO-3. Call this before the engine is created."""
    deepspeed.utils.set_z3_leaf_modules(transformer, [Block])
    transformer.require_input_grad()


def _pin_in_one_piece(transformer: Transformer, device: torch.device) -> HostBuffer | None:
    """Move the weights in host memory into one buffer and, for a GPU, pin it. Raises UserError if that fails."""
    try:
        buffer = merge_offloaded_weights(transformer)
        if buffer is not None and device.type == "cuda":
            buffer.pin()
    except (OSError, torch.cuda.CudaError) as error:
        raise UserError(
            f"zero_optimization.offload_param.pin_memory: cannot pin this rank's weights in host memory ({error}). Set "
            "it to false in the DeepSpeed config, use fewer ranks per node, or give the job more memory."
        ) from None
    return buffer


def load_for_stage(
    model: ModelFolder,
    dtype: torch.dtype,
    ds_config: dict[str, Any],
    world: World,
    quantization: str = "none",
    fp8_matmul: bool = False,
    trained: Collection[str] = (),
) -> Transformer:
    """Build the transformer as `build_for_stage` does and load the model's weights. Collective.

    Weights are loaded one by one, so that no process holds all of them in host memory. diffusers' `from_pretrained`
    holds all of them, and cannot run under `zero.Init`, where parameters have size 0.

    Raises:
        UserError: The files and the config disagree on a weight.
    """
    if zero_stage(ds_config) < 3:
        prepare_extensions(ds_config)
        return train_weights(load_transformer(model, dtype, world.device, quantization, fp8_matmul), trained)
    transformer = build_for_stage(model, dtype, ds_config, world.device, trained=trained)

    def load_weight(tensor: torch.Tensor, weight: Any) -> None:
        if not isinstance(tensor, torch.nn.Parameter):  # a buffer is not partitioned
            tensor.copy_(weight[:])
            return
        with gathered([tensor], 3, modifier_rank=0), torch.no_grad():
            if world.rank == 0:
                tensor.data.copy_(weight[:])

    fill_transformer(transformer, model, load_weight)
    return transformer


def start_engine(transformer: Any, parameters: Sequence[torch.nn.Parameter], ds_config: dict[str, Any]) -> Any:
    """Create a DeepSpeed engine that trains `parameters` of `transformer` with the optimizer of the config."""
    engine, *_ = deepspeed.initialize(model=transformer, model_parameters=list(parameters), config=ds_config)
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the learning rate of the next optimizer step. It depends only on the step, so no scheduler is used."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
