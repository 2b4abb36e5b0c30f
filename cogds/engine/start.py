"""DeepSpeed around the transformer: loading under each ZeRO stage, the engine, parameter gathering."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch

from cogds.config.deepspeed import zero_stage
from cogds.distributed.world import World
from cogds.model.load import ModelFolder, build_transformer, fill_transformer, load_transformer
from cogds.model.transformer.forward import Block, Transformer


@contextmanager
def gathered(parameters: Sequence[torch.nn.Parameter], stage: int, modifier_rank: int | None = None) -> Iterator[None]:
    """Parameters whole inside the block, on every rank; with `modifier_rank`, what that rank wrote reaches the others.

    Collective at stage 3, nothing at the other stages.
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
) -> Transformer:
    """The frozen transformer with random weights: whole on `device` below stage 3, partitioned over the ranks at stage
    3. Collective.

    A block is one unit of ZeRO-3: its weights come together before it runs, forward and backward.
    quantization, fp8_matmul: of the blocks' weights (`model.quantize`); none at stage 3 (`check_quantization`).
    """
    if zero_stage(ds_config) < 3:
        return build_transformer(model, dtype, device, quantization, fp8_matmul)
    # The dtype goes in through the config: `zero.Init(dtype=...)` ignores it where the accelerator has no fp16.
    init_config = {**ds_config, "bf16": {"enabled": dtype is torch.bfloat16}}
    with deepspeed.zero.Init(config_dict_or_path=init_config):
        transformer = build_transformer(model, dtype)
    deepspeed.utils.set_z3_leaf_modules(transformer, [Block])
    transformer.make_blocks_alike()
    return transformer


def load_for_stage(
    model: ModelFolder,
    dtype: torch.dtype,
    ds_config: dict[str, Any],
    world: World,
    quantization: str = "none",
    fp8_matmul: bool = False,
) -> Transformer:
    """`build_for_stage` with the model's weights, filled one by one: no process holds all of them in host memory.

    (diffusers' `from_pretrained` does, and cannot run under `zero.Init`, where it sees parameters of size 0.)
    Raises UserError where the files and the config disagree on a weight. Collective.
    """
    if zero_stage(ds_config) < 3:
        return load_transformer(model, dtype, world.device, quantization, fp8_matmul)
    transformer = build_for_stage(model, dtype, ds_config, world.device)

    def put(tensor: torch.Tensor, weight: Any) -> None:
        if not isinstance(tensor, torch.nn.Parameter):  # a buffer is whole everywhere
            tensor.copy_(weight[:])
            return
        with gathered([tensor], 3, modifier_rank=0):
            if world.rank == 0:
                tensor.data.copy_(weight[:])

    fill_transformer(transformer, model, put)
    return transformer


def start_engine(transformer: Any, parameters: Sequence[torch.nn.Parameter], ds_config: dict[str, Any]) -> Any:
    """A DeepSpeed engine that trains `parameters` of `transformer`, with the optimizer that the config names."""
    engine, *_ = deepspeed.initialize(model=transformer, model_parameters=list(parameters), config=ds_config)
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """The learning rate of the next optimizer step. It follows from the step number, so DeepSpeed schedules nothing."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
