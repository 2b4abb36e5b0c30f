"""The live transformer as the pipeline calls it: every rank makes the same number of calls, whatever befalls it.

At ZeRO-3 each call brings the weights together, which takes all ranks; ranks that share a video's tokens need one
another in every layer. So a rank that has no video, or whose own work has failed, goes on calling for the others'
sake. Before every call the ranks tell one another what they have met, on CPUs.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from cogds.distributed.collectives import any_rank
from cogds.distributed.world import World
from cogds.model.evaluation_mode import call_module


class Stopped(Exception):
    """The run was asked to stop; raised on all ranks before the same call."""


class Lockstep:
    """Stands for the transformer in a pipeline, for `num_calls` calls; `finish` makes those that are left.

    in_forward: whether the transformer is at work, or has failed at it: nothing makes up for a call that was half made
    where it takes all ranks (`needs_all`).
    """

    def __init__(
        self,
        engine: Any,
        world: World,
        num_calls: int,
        idle_inputs: Mapping[str, Any] | None = None,
        begin_call: Callable[[int], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
    ):
        """idle_inputs: of calls whose output nobody needs; None where a call does not take all ranks.

        begin_call: is told how many calls have been made. stopping: whether this rank has been asked to stop.
        """
        self.config = engine.module.config
        self.in_forward = False
        self._engine, self._world, self._idle_inputs = engine, world, idle_inputs
        self._begin_call, self._stopping = begin_call, stopping
        self._num_left, self._num_calls, self._agreed = num_calls, num_calls, False

    @property
    def needs_all(self) -> bool:
        """Whether a call that fails on one rank leaves others waiting in it."""
        return self._idle_inputs is not None or self._world.sequence_size > 1

    def cache_context(self, _name: str) -> contextlib.AbstractContextManager[None]:
        """For the pipeline; nothing is cached here."""
        return contextlib.nullcontext()

    def __call__(self, **inputs: Any) -> Any:
        if not self._num_left:
            raise RuntimeError(f"the pipeline wants more than {self._num_calls} calls of the transformer")
        self._agree(failed=False)
        return self._forward(inputs)

    def finish(self, failed: bool) -> None:
        """Make the calls that are left. failed: this rank has no use for them any more. Raises Stopped."""
        while self._num_left:
            if not self._agreed:
                self._agree(failed)
            if self._idle_inputs is None:
                self._made()
            else:
                self._forward(self._idle_inputs)

    def _agree(self, failed: bool) -> None:
        """What has any rank met? Raises Stopped, and RuntimeError where one that shares this video has failed."""
        self._begin_call(self._num_calls - self._num_left)
        world = self._world
        lost = [failed and number == world.data_rank for number in range(world.data_size)]
        stop, *lost = any_rank(world, self._stopping(), *(lost if world.sequence_size > 1 else ()))
        self._agreed = True
        if stop:
            raise Stopped
        if lost and lost[world.data_rank] and not failed:
            raise RuntimeError("a rank that shares it has failed")

    def _forward(self, inputs: Mapping[str, Any]) -> Any:
        self.in_forward = True
        output = call_module(self._engine, self._world.device, inputs)
        self.in_forward = False
        self._made()
        return output

    def _made(self) -> None:
        self._num_left -= 1
        self._agreed = False
