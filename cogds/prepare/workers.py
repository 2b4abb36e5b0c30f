"""Limits of the worker processes that read files."""

from typing import NamedTuple


class Workers(NamedTuple):
    """How many processes a rank starts, and what one file may cost in each."""

    num: int
    timeout_s: float
    memory_bytes: int

    def limits(self, num_tasks: int) -> tuple[int, float, int]:
        """Arguments of a WorkerPool for a number of tasks."""
        return min(self.num, num_tasks), self.timeout_s, self.memory_bytes
