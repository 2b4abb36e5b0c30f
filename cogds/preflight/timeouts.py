"""Function calls with a time limit, for functions that may hang."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cogds.errors import BUGS, UserError, brief

POLL_S = 0.2
STOP_GRACE_S = 1.0
STOPPED = "stopped because another rank failed"


@dataclass(frozen=True)
class CallResult:
    """The outcome of a call with a time limit.

    Attributes:
        value: what the function returned, None if it failed.
        error: why it failed, "" if it did not.
        is_hung: whether its thread is still running.
        bug: the exception, if it comes from the code and not from the machine.
    """

    value: Any = None
    error: str = ""
    is_hung: bool = False
    bug: Exception | None = None


def call_with_timeout(
    function: Callable[[], Any], timeout_s: float, should_stop: Callable[[], bool] = lambda: False
) -> CallResult:
    """Call `function` in a thread and wait until it returns, `timeout_s` has passed, or `should_stop()` is true.

    A thread cannot be killed. If it hangs, in a dead network disk or a collective for example, it keeps running
    (`is_hung`), and the caller must end the process with os._exit.
    """
    results: list[CallResult] = []

    def call() -> None:
        try:
            results.append(CallResult(function()))
        except UserError as error:
            results.append(CallResult(error=str(error)))
        except BUGS as error:
            results.append(CallResult(error=f"this check has a bug, see its traceback: {brief(error)}", bug=error))
        except Exception as error:  # any failure becomes a finding, and the other checks continue
            results.append(CallResult(error=brief(error)))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout_s
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(POLL_S)
        if thread.is_alive() and should_stop():
            thread.join(STOP_GRACE_S)  # it may be failing at this moment, with an error of its own
            return results[0] if results else CallResult(error=STOPPED, is_hung=True)
    return results[0] if results else CallResult(error=f"no result within {timeout_s:g} s", is_hung=True)
