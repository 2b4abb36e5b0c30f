"""Use of the transformer outside of a training step, without any effect on training."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def call_module(engine: Any, device: torch.device, inputs: Mapping[str, Any]) -> Any:
    """Call the engine's module under the same autocast as in the engine's forward pass.

    Calling the engine itself would count a micro-step.
    """
    with torch.autocast(device.type, dtype=engine.torch_autocast_dtype(), enabled=engine.torch_autocast_enabled()):
        return engine.module(**inputs)


@contextlib.contextmanager
def evaluation_mode(transformer: Any, device: torch.device) -> Iterator[None]:
    """Context manager for evaluating the trained transformer, without dropout or gradients.

    Afterwards, every module's mode, every block's activation checkpointing and the random states are restored.
    """
    modes = [(module, module.training) for module in transformer.modules()]
    checkpointing_modes = [(block, block.checkpointing) for block in transformer.transformer_blocks]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        transformer.eval()
        transformer.set_checkpointing("none")
        try:
            yield
        finally:
            for block, checkpointing in checkpointing_modes:
                block.checkpointing = checkpointing
            for module, training in modes:
                module.training = training
