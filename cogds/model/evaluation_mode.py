"""The live transformer beside its training: called past the engine, and left as it was."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def call_aside(engine: Any, device: torch.device, inputs: Mapping[str, Any]) -> Any:
    """What the engine's module gives, under the autocast that the engine's own forward puts around it.

    The module and not the engine, which would count micro-steps.
    """
    with torch.autocast(device.type, dtype=engine.torch_autocast_dtype(), enabled=engine.torch_autocast_enabled()):
        return engine.module(**inputs)


@contextlib.contextmanager
def undisturbed(transformer: Any, device: torch.device) -> Iterator[None]:
    """Inside, a transformer that is trained computes without dropout and keeps nothing; after it all is as it was:
    every module's mode, every block's activation checkpointing, the random states."""
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
