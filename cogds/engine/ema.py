"""The exponential moving average (EMA) of the weights of a full fine-tune, sharded over the ranks like the masters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cogds.distributed.deepspeed_internals import local_part, local_range, set_local_part, update_model_weights
from cogds.engine.state import trainable


class Ema:
    """The average of this rank's part of the float32 master weights. parts: flat tensors by name of the weight."""

    def __init__(self, engine: Any, decay: float, device: torch.device):
        """Begin with the current weights. device: where the average is kept."""
        self._engine, self._decay = engine, decay
        self._parameters = {name: weight for name, weight in trainable(engine).items() if local_range(weight)}
        self.parts = {name: local_part(weight).to(device, copy=True) for name, weight in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimizer step `step` (0 is the first).

        The decay begins at 0.1 and grows to the one that is set. Otherwise, the first averages would be the base model.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, weight in self._parameters.items():
            part = self.parts[name]
            part.lerp_(local_part(weight).to(part.device), 1 - decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the averages into the model while the block runs. Collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._parameters.items():
            live = local_part(weight).clone()
            set_local_part(weight, self.parts[name].to(live.device))
            self.parts[name].copy_(live)
        update_model_weights(self._engine)
