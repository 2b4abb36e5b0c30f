"""The transformer with random weights, wherever a ZeRO stage puts the real ones: to try a step without reading them."""

from typing import Any

import deepspeed
import torch

from cogds.model.load import ModelFolder, build_transformer
from cogds.runtime.engine import zero_stage


def build_for_stage(
    model: ModelFolder, dtype: torch.dtype, ds_config: dict[str, Any], device: torch.device
) -> torch.nn.Module:
    """The frozen transformer: whole on `device` below stage 3, partitioned over the ranks at stage 3. Collective."""
    if zero_stage(ds_config) == 3:
        # As in `engine.load_for_stage`: the dtype goes in through the config.
        with deepspeed.zero.Init(config_dict_or_path={**ds_config, "bf16": {"enabled": dtype is torch.bfloat16}}):
            return build_transformer(model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a float32 copy of it might not fit
    try:
        with torch.device(device):
            return build_transformer(model)
    finally:
        torch.set_default_dtype(before)
