"""The training transformer inside a diffusers pipeline, called equally often on every rank.

At ZeRO stage 3, each call gathers the weights from all ranks. With sequence parallelism, each layer exchanges data
between the ranks that share a video. So a rank that has no video to make, or whose video has failed, must keep making
the calls that the other ranks are in. Before each call the ranks agree, over the CPU, on whether to stop.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from cogds.distributed.collectives import any_rank
from cogds.distributed.world import World
from cogds.model.evaluation_mode import call_module


class Stopped(Exception):
    """The run was asked to stop. All ranks raise this before the same call."""


class LockstepTransformer:
    """Replaces the transformer of a pipeline for `num_calls` calls. `finish` makes the remaining ones.

    in_forward: whether a call is running or has failed. If calls need all ranks (`needs_all_ranks`), nothing can make
    up for a call that failed halfway.
    """

    def __init__(
        self,
        engine: Any,
        world: World,
        num_calls: int,
        *,
        idle_inputs: Mapping[str, Any] | None = None,
        on_call: Callable[[int], None] = lambda _: None,
        is_stopping: Callable[[], bool] = lambda: False,
    ):
        """idle_inputs: inputs of calls whose output is discarded; None if a call does not need all ranks.

        on_call: called before each call with the number of calls made so far. is_stopping: whether this rank was asked
        to stop.
        """
        self.config = engine.module.config
        self.in_forward = False
        self._engine, self._world, self._idle_inputs = engine, world, idle_inputs
        self._on_call, self._is_stopping = on_call, is_stopping
        self._num_left, self._num_calls, self._has_agreed = num_calls, num_calls, False

    @property
    def needs_all_ranks(self) -> bool:
        """Whether other ranks wait in a call that fails on one rank."""
        return self._idle_inputs is not None or self._world.sequence_size > 1

    def cache_context(self, _name: str) -> contextlib.AbstractContextManager[None]:
        """Do nothing. The pipeline requires this method; nothing is cached here."""
        return contextlib.nullcontext()

    def __call__(self, **inputs: Any) -> Any:
        if not self._num_left:
            raise RuntimeError(f"the pipeline made more than {self._num_calls} calls of the transformer")
        self._agree(has_failed=False)
        return self._forward(inputs)

    def finish(self, *, has_failed: bool) -> None:
        """Make the remaining calls. has_failed: this rank does not need their outputs. Raises Stopped."""
        while self._num_left:
            if not self._has_agreed:
                self._agree(has_failed)
            if self._idle_inputs is None:
                self._count_call()
            else:
                self._forward(self._idle_inputs)

    def _agree(self, has_failed: bool) -> None:
        """Exchange stop requests and failures. Raises Stopped, and RuntimeError if a rank sharing the video failed."""
        self._on_call(self._num_calls - self._num_left)
        world = self._world
        failures = [has_failed and number == world.data_rank for number in range(world.data_size)]
        stop, *failures = any_rank(world, self._is_stopping(), *(failures if world.sequence_size > 1 else ()))
        self._has_agreed = True
        if stop:
            raise Stopped
        if failures and failures[world.data_rank] and not has_failed:
            raise RuntimeError("another rank that shares this video has failed")

    def _forward(self, inputs: Mapping[str, Any]) -> Any:
        self.in_forward = True
        output = call_module(self._engine, self._world.device, inputs)
        self.in_forward = False
        self._count_call()
        return output

    def _count_call(self) -> None:
        self._num_left -= 1
        self._has_agreed = False
