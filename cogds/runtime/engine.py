"""DeepSpeed around the transformer: loading under each ZeRO stage, the engine, parameter gathering."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch

from cogds.errors import UserError
from cogds.model.load import ModelFolder, build_transformer, load_transformer, transformer_weights


def zero_stage(ds_config: dict[str, Any]) -> int:
    """ZeRO stage of a resolved DeepSpeed config."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


@contextmanager
def gathered(parameters: Sequence[torch.nn.Parameter], stage: int, modifier_rank: int | None = None) -> Iterator[None]:
    """Parameters whole inside the block, on every rank; with `modifier_rank`, what that rank wrote reaches the others.

    Collective at stage 3, nothing at the other stages.
    """
    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank, enabled=stage == 3):
        yield


def load_for_stage(model: ModelFolder, dtype: torch.dtype, ds_config: dict[str, Any], rank: int) -> Any:
    """The frozen transformer: whole below stage 3, partitioned over the ranks at stage 3.

    diffusers' `from_pretrained` cannot run under `zero.Init` (it sees parameters of size 0), so the partitioned model
    is built from its config and filled weight by weight: no process ever holds all of it.
    Raises UserError where the files and the config disagree on a weight.
    """
    if zero_stage(ds_config) < 3:
        return load_transformer(model, dtype)
    # The dtype goes in through the config: `zero.Init(dtype=...)` ignores it where the accelerator has no fp16.
    init_config = {**ds_config, "bf16": {"enabled": dtype is torch.bfloat16}}
    with deepspeed.zero.Init(config_dict_or_path=init_config):
        transformer = build_transformer(model)
    parameters, buffers = dict(transformer.named_parameters()), dict(transformer.named_buffers())
    missing = set(parameters)
    for name, weight in transformer_weights(model):
        if name in buffers:
            buffers[name].copy_(weight[:])
            continue
        if name not in parameters:
            raise UserError(
                f"the transformer's files in {model.path} hold '{name}', which its config.json does not have"
            )
        shape = tuple(parameters[name].ds_shape)
        if shape != tuple(weight.get_shape()):
            raise UserError(
                f"weight '{name}' in {model.path} is {tuple(weight.get_shape())}, config.json says {shape}: "
                "fetch the model again"
            )
        with gathered([parameters[name]], 3, modifier_rank=0):
            if rank == 0:
                parameters[name].data.copy_(weight[:])
        missing.discard(name)
    if missing:
        raise UserError(
            f"the transformer's files in {model.path} lack {len(missing)} weights, such as '{min(missing)}'"
        )
    return transformer


def start_engine(transformer: Any, parameters: Sequence[torch.nn.Parameter], ds_config: dict[str, Any]) -> Any:
    """A DeepSpeed engine that trains `parameters` of `transformer`, with the optimizer that the config names."""
    engine, *_ = deepspeed.initialize(model=transformer, model_parameters=list(parameters), config=ds_config)
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """The learning rate of the next optimizer step. It follows from the step number, so DeepSpeed schedules nothing."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
