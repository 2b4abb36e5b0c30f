"""Ranks telling one another things through the store behind the process group, where NCCL and gloo need not work.

Every wait is bounded, and who did not answer is known.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from cogds.distributed.world import World
from cogds.errors import BUGS, UserError, brief
from cogds.preflight.finding import runs

PREFIX = "preflight"
ANSWER_S = 60.0  # how much longer ranks wait for rank 0 than rank 0 waits for them
POLL_S = 0.2
FAREWELL_S = 10.0
GIVEN_UP = "given up, because another rank failed"


@dataclass(frozen=True)
class Outcome:
    """What became of a call: its value, or in words what went wrong. hung: its thread is still at it.

    bug: the exception, if it comes from the code and not from the machine.
    """

    value: Any = None
    error: str = ""
    hung: bool = False
    bug: Exception | None = None


def bounded(function: Callable[[], Any], limit_s: float, stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Call `function` in a thread, and wait no longer than `limit_s`, nor once `stop()` says so.

    A thread cannot be ended: one that hangs (a dead network disk, a collective without an answer) is left behind, and
    the process must end by itself (`hung`).
    """
    outcomes: list[Outcome] = []

    def call() -> None:
        try:
            outcomes.append(Outcome(function()))
        except UserError as error:
            outcomes.append(Outcome(error=str(error)))
        except BUGS as error:
            outcomes.append(Outcome(error=f"this check has a bug, see its traceback: {brief(error)}", bug=error))
        except Exception as error:  # whatever it is, it is reported and the other checks go on
            outcomes.append(Outcome(error=brief(error)))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    deadline = time.monotonic() + limit_s
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(POLL_S)
        if thread.is_alive() and stop():
            thread.join(1.0)  # it may have failed at the same moment
            return outcomes[0] if outcomes else Outcome(error=GIVEN_UP, hung=True)
    return outcomes[0] if outcomes else Outcome(error=f"no answer within {limit_s:g} s", hung=True)


class Roster:
    """The ranks of a run as rank 0 calls them up. Every rank calls the same methods in the same order."""

    def __init__(self, world: World, store: dist.Store | None):
        """store: from `world.open_store`; None in a world of one."""
        self.world, self.store = world, store
        self.absent: set[int] = set()
        self._round = 0

    def _key(self, who: int | str) -> str:
        return f"{PREFIX}/{self._round}/{who}"

    def gather(self, value: Any, timeout_s: float) -> list[Any]:
        """On rank 0 every rank's value (JSON-able), in rank order, None for those in `absent`; [] on the others.

        Ranks that do not answer within `timeout_s` become absent, and are not waited for again.
        """
        self._round += 1
        if self.store is None:
            return [value]
        if self.world.rank:
            self.store.set(self._key(self.world.rank), json.dumps(value))
            return []
        expected = [rank for rank in range(1, self.world.size) if rank not in self.absent]
        if not self._wait([self._key(rank) for rank in expected], timeout_s):
            self.absent |= {rank for rank in expected if not self.store.check([self._key(rank)])}
        values: list[Any] = [value] + [None] * (self.world.size - 1)
        for rank in expected:
            if rank not in self.absent:
                values[rank] = json.loads(self.store.get(self._key(rank)))
        return values

    def _wait(self, keys: list[str], timeout_s: float) -> bool:
        """Whether all keys are set within `timeout_s`. Asked again and again: torch's own wait is loud when it ends."""
        assert self.store is not None
        deadline = time.monotonic() + timeout_s
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def share(self, value: Any, timeout_s: float) -> Any:
        """Rank 0's value on every rank. timeout_s: what rank 0 may have waited for the others before."""
        self._round += 1
        if self.store is None:
            return value
        if self.world.rank == 0:
            self.store.set(self._key("all"), json.dumps(value))
            return value
        try:
            if self._wait([self._key("all")], timeout_s + ANSWER_S):
                return json.loads(self.store.get(self._key("all")))
        except dist.DistError:
            raise UserError("rank 0, or the process that holds its store, has ended: look at its output") from None
        raise UserError(f"rank 0 did not answer for {timeout_s + ANSWER_S:g} s: look at its output")

    def call(self, host: str, timeout_s: float) -> list[str]:
        """The node of every rank. Raises UserError, on all ranks, naming those that are not there in time."""
        nodes = self.gather(host, timeout_s)
        nodes = self.share(nodes, timeout_s)
        missing = [rank for rank, node in enumerate(nodes) if node is None]
        if missing:
            raise UserError(
                f"{len(missing)} of {self.world.size} ranks did not answer within {timeout_s:g} s: {runs(missing)}; "
                f"those that did are on {', '.join(dict.fromkeys(filter(None, nodes)))}: look at the launcher's "
                "output, or give --wait more seconds",
                shared=self.world.rank > 0,
            )
        return nodes

    def give_up(self, what: str) -> None:
        """Tell the others that this rank cannot go on with `what`, so that they do not wait for it in a collective."""
        if self.store is not None:
            self.store.set(f"{PREFIX}/given up/{what}", str(self.world.rank))

    def given_up(self, what: str) -> bool:
        """Whether any rank has given up `what`."""
        return self.store is not None and self.store.check([f"{PREFIX}/given up/{what}"])

    def leave(self) -> None:
        """The last word: rank 0, whose process may hold the store, waits until all others have heard everything."""
        self.gather("heard", FAREWELL_S)
