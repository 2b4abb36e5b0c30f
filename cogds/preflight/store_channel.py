"""Messages between ranks through the store of the process group, which needs neither NCCL nor gloo.

Every wait has a time limit, and rank 0 knows which ranks did not answer.
"""

import json
import time
from typing import Any

import torch.distributed as dist

from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.preflight.findings import format_ranges

PREFIX = "preflight"
RANK0_DELAY_S = 60.0  # how much longer the other ranks wait for rank 0 than rank 0 waits for them
POLL_S = 0.2
CLOSE_TIMEOUT_S = 10.0


class StoreChannel:
    """Gathers on rank 0 and broadcasts from rank 0. Every rank calls the same methods in the same order."""

    def __init__(self, world: World, store: dist.Store | None):
        """store: from `process_group.open_store`; None if there is only one rank."""
        self.world, self.store = world, store
        self.missing_ranks: set[int] = set()
        self._round = 0

    def _key(self, suffix: int | str) -> str:
        return f"{PREFIX}/{self._round}/{suffix}"

    def gather(self, value: Any, timeout_s: float) -> list[Any]:
        """Return every rank's value in rank order on rank 0, and [] on the other ranks.

        A rank that does not answer within `timeout_s` is added to `missing_ranks`; its value is None, and later calls
        do not wait for it.

        Args:
            value: this rank's value, in types that JSON supports.
        """
        self._round += 1
        if self.store is None:
            return [value]
        if self.world.rank:
            self.store.set(self._key(self.world.rank), json.dumps(value))
            return []
        expected = [rank for rank in range(1, self.world.size) if rank not in self.missing_ranks]
        if not self._wait([self._key(rank) for rank in expected], timeout_s):
            self.missing_ranks |= {rank for rank in expected if not self.store.check([self._key(rank)])}
        values: list[Any] = [value] + [None] * (self.world.size - 1)
        for rank in expected:
            if rank not in self.missing_ranks:
                values[rank] = json.loads(self.store.get(self._key(rank)))
        return values

    def _wait(self, keys: list[str], timeout_s: float) -> bool:
        """Return whether all keys are set within `timeout_s`. Polls, because torch's own wait logs its timeouts."""
        assert self.store is not None
        deadline = time.monotonic() + timeout_s
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def broadcast(self, value: Any, timeout_s: float) -> Any:
        """Return rank 0's value on every rank.

        Args:
            timeout_s: how long rank 0 may wait for the other ranks before it gets here.

        Raises:
            UserError: Rank 0 has ended or does not answer.
        """
        self._round += 1
        if self.store is None:
            return value
        if self.world.rank == 0:
            self.store.set(self._key("all"), json.dumps(value))
            return value
        try:
            if self._wait([self._key("all")], timeout_s + RANK0_DELAY_S):
                return json.loads(self.store.get(self._key("all")))
        except dist.DistError:
            raise UserError(
                "rank 0: its process, or the process that holds the store, has ended. Check the output of rank 0."
            ) from None
        raise UserError(f"rank 0: no answer within {timeout_s + RANK0_DELAY_S:g} s. Check the output of rank 0.")

    def gather_hosts(self, host: str, timeout_s: float) -> list[str]:
        """Return the host of every rank, on every rank.

        Raises:
            UserError: Some ranks did not answer within `timeout_s`. Raised on every rank that did.
        """
        hosts = self.broadcast(self.gather(host, timeout_s), timeout_s)
        missing = [rank for rank, name in enumerate(hosts) if name is None]
        if missing:
            raise UserError(
                f"ranks {format_ranges(missing)}: {len(missing)} of {self.world.size} ranks did not answer within "
                f"{timeout_s:g} s. The other ranks are on {', '.join(dict.fromkeys(filter(None, hosts)))}. Check the "
                "launcher's output, or increase --wait.",
                shared=self.world.rank > 0,
            )
        return hosts

    def abort(self, check: str) -> None:
        """Tell the other ranks that this rank has failed in a collective check, so that they stop waiting for it."""
        if self.store is not None:
            self.store.set(f"{PREFIX}/aborted/{check}", str(self.world.rank))

    def is_aborted(self, check: str) -> bool:
        """Return whether any rank has aborted this check."""
        return self.store is not None and self.store.check([f"{PREFIX}/aborted/{check}"])

    def close(self) -> None:
        """Wait on rank 0, whose process may hold the store, until the other ranks have read all messages."""
        self.gather("done", CLOSE_TIMEOUT_S)
