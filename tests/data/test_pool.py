import contextlib
import ctypes
import gc
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogds.data.pool import OUT_OF_BAND_BYTES, STOP_SIGNALS, ChildError, Failure, GuardedPool, deaf_children
from cogds.data.video import DecodeError

ROOT = Path(__file__).resolve().parents[2]


def act(task: Any) -> Any:
    """What the children of these tests do."""
    match task:
        case "pid":
            return os.getpid()
        case "exit":
            os._exit(7)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(600)
        case "hold the lock":
            ctypes.PyDLL(None).sleep(600)
        case "eat slowly":
            eaten = []
            while True:
                eaten.append(np.ones(25_000_000, np.uint8))
                time.sleep(0.05)
        case "eat shared":  # which a limit on private memory does not see
            shared = mmap.mmap(-1, 1 << 34)
            while True:
                shared.write(bytes(25_000_000))
                time.sleep(0.05)
        case "eat at once":
            return np.ones(1 << 40, np.uint8)
        case "keep":
            act.kept = np.ones(200_000_000, np.uint8)  # type: ignore[attr-defined]
        case "decode error":
            raise DecodeError("it is no video")
        case "stale":
            raise OSError("stale file handle")
        case TypeError() | AttributeError() | ValueError():
            raise task
        case "unpicklable":
            return lambda: None
        case "modules":
            return sorted(sys.modules)
        case ("big", int(n)):
            return {"a": np.full((n, 1_000_000), n, np.uint8), "b": np.arange(500_000), "c": "text"}
        case ("write", str(path)):
            Path(path).write_text(str(os.getpid()))
            time.sleep(600)
        case ("tell", str(path)):
            Path(path).write_text(str(os.getpid()))
            assert until(Path(path).with_name("go").exists)
            return "told"
        case float(seconds):
            time.sleep(seconds)
    return task


@pytest.fixture(scope="module")
def pool() -> Iterator[GuardedPool[Any, Any]]:
    with GuardedPool(act, 2, timeout_s=60, memory_bytes=1 << 30) as pool:
        yield pool


def run(pool: GuardedPool[Any, Any], *tasks: Any) -> list[Any]:
    return list(pool.imap(tasks))


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        # The main thread may be gone while another is still dying: only then can it be waited for.
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    return False


def until(condition: Any, bound_s: float = 20.0) -> bool:
    deadline = time.monotonic() + bound_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def test_order_is_that_of_the_tasks(pool: GuardedPool[Any, Any]) -> None:
    tasks = [0.3, 0.0, 0.2, 0.0, 0.1] + [float(k) / 1000 for k in range(50)]
    assert list(pool.imap(tasks, ahead=3)) == tasks
    assert run(pool) == []


def test_tasks_are_drawn_as_they_are_needed(pool: GuardedPool[Any, Any]) -> None:
    drawn: list[int] = []

    def endless() -> Iterator[int]:
        k = 0
        while True:
            drawn.append(k)
            yield k
            k += 1

    for ahead in (0, 3):
        drawn.clear()
        outcomes = pool.imap(endless(), ahead)
        for k in range(20):
            assert next(outcomes) == k
            assert len(drawn) == 1 + k + 2 + ahead  # given out, and begun or waiting
        outcomes.close()  # type: ignore[attr-defined]
        assert run(pool, 1, 2) == [1, 2]


def test_children_go_on_while_the_caller_is_busy(pool: GuardedPool[Any, Any], tmp_path: Path) -> None:
    outcomes = pool.imap([0, 1, ("touch", 1), ("write", str(tmp_path / "begun"))])
    next(outcomes)
    next(outcomes)
    assert until((tmp_path / "begun").exists)
    outcomes.close()  # type: ignore[attr-defined]
    # What hangs is replaced at its own time; here it is ended so that the pool's other tests go on.
    os.kill(int((tmp_path / "begun").read_text()), signal.SIGKILL)


def test_children_are_few_and_serve_all_calls() -> None:
    with GuardedPool(act, 2, timeout_s=60, memory_bytes=1 << 30) as pool:
        pids = set(run(pool, *["pid"] * 40)) | set(run(pool, *["pid"] * 40))
        assert 1 <= len(pids) <= 2
        assert os.getpid() not in pids
        assert all(map(alive, pids))
    assert not any(map(alive, pids))
    with pytest.raises(ValueError, match="closed"):
        pool.imap([1])
    pool.close()


def test_a_child_imports_neither_torch_nor_a_decoder() -> None:
    """Its code is this package's and the function's module; the main module is not run again."""
    code = "import sys, cogds.data.pool, cogds.data.video; print({'torch', 'av', 'decord', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60, cwd=ROOT).strip() == "set()"
    with GuardedPool(act, 1, timeout_s=60, memory_bytes=1 << 30) as pool:
        (modules,) = pool.imap(["modules"])
    assert "cogds.data.pool" in modules
    assert "torch" not in modules


@pytest.mark.parametrize("num_children", [1, 2])
def test_each_misfortune_costs_its_task_and_nothing_else(num_children: int) -> None:
    tasks = ["exit", 1, "segfault", 2, "eat slowly", 3, "eat at once", 4, "decode error", 5, "stale", 6, "exit", 7,
             "eat shared", 8]  # fmt: skip
    with GuardedPool(act, num_children, timeout_s=60, memory_bytes=400_000_000) as pool:
        outcomes = run(pool, *tasks)
        assert outcomes[1::2] == list(range(1, 9))
        exited, segfault, slow, at_once, decode, stale, again, shared = outcomes[::2]
        assert exited == again == Failure("crashed its process (code 7)")
        assert segfault == Failure("crashed its process (code -11)")
        assert slow == at_once == shared == Failure("needed more than 0.4 GB of memory")
        assert decode == Failure("it is no video", is_verdict=True)
        assert stale == Failure("failed: OSError: stale file handle")


@pytest.mark.parametrize("error", [TypeError("planted"), AttributeError("planted"), ValueError("planted")])
def test_a_bug_is_raised_with_its_traceback(pool: GuardedPool[Any, Any], error: Exception) -> None:
    with pytest.raises(ChildError) as caught:
        run(pool, 1, error, 2)
    text = str(caught.value)
    assert repr(error) in text  # the task
    assert text.rstrip().endswith(f"{type(error).__name__}: planted")
    assert "in act\n" in text
    assert run(pool, 3, 4) == [3, 4]
    with GuardedPool(act, 0, timeout_s=60, memory_bytes=1 << 30) as alone, pytest.raises(type(error), match="planted"):
        run(alone, 1, error)


def test_a_result_that_cannot_be_sent_is_a_bug(pool: GuardedPool[Any, Any]) -> None:
    with pytest.raises(ChildError, match="pickle"):
        run(pool, "unpicklable")
    assert run(pool, 1) == [1]


@pytest.mark.parametrize("task", ["hang", "hold the lock"])
def test_a_hang_costs_its_task_and_nothing_else(task: str) -> None:
    with GuardedPool(act, 2, timeout_s=1.0, memory_bytes=1 << 30) as pool:
        assert run(pool, 1, task, 2, 3) == [1, Failure("took more than 1 s"), 2, 3]


def test_children_outlive_what_asks_the_whole_tree_to_stop(pool: GuardedPool[Any, Any], tmp_path: Path) -> None:
    """Idle, at work, and from their first moment on: a run that saves first still needs them."""
    (before,) = pool.imap(["pid"])
    outcomes = pool.imap([("tell", str(tmp_path / "begun")), 1])
    waiter = threading.Thread(target=lambda: tmp_path.joinpath("outcomes").write_text(repr(list(outcomes))))
    waiter.start()
    assert until(lambda: (tmp_path / "begun").exists() and (tmp_path / "begun").read_text())
    for number in STOP_SIGNALS:
        for pid in {before, int((tmp_path / "begun").read_text())}:
            os.kill(pid, number)
    (tmp_path / "go").touch()
    waiter.join(60)
    assert (tmp_path / "outcomes").read_text() == "['told', 1]"
    with deaf_children():
        newborn = subprocess.Popen([sys.executable, "-c", "print('born')"], stdout=subprocess.PIPE)
        for number in STOP_SIGNALS:
            newborn.send_signal(number)
        assert newborn.communicate(timeout=60) == (b"born\n", None)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


def test_a_child_that_keeps_its_memory_is_replaced() -> None:
    with GuardedPool(act, 1, timeout_s=60, memory_bytes=350_000_000) as pool:
        outcomes = run(pool, "pid", "pid", "keep", "pid", "keep", "pid")
    assert outcomes[0] == outcomes[1]
    assert len({outcomes[1], outcomes[3], outcomes[5]}) == 3
    assert not any(isinstance(outcome, Failure) for outcome in outcomes)


def test_a_child_that_died_idle_costs_no_task(pool: GuardedPool[Any, Any]) -> None:
    for pid in set(run(pool, *["pid"] * 10)):
        os.kill(pid, signal.SIGKILL)
        assert until(lambda pid=pid: not alive(pid))
    assert run(pool, 1, 2, 3, 4) == [1, 2, 3, 4]


def test_large_arrays_come_whole_writable_and_are_let_go(pool: GuardedPool[Any, Any]) -> None:
    def descriptors() -> int:
        """Those of the memory that arrays travel in: others come and go in a process of many tests."""
        gc.collect()
        links = [f"/proc/self/fd/{one}" for one in os.listdir("/proc/self/fd")]
        return sum("memfd:result" in os.readlink(one) for one in links if os.path.lexists(one))

    run(pool, 1, 2)
    before = descriptors()
    for n, outcome in zip((1, 200, 2, 120), pool.imap([("big", n) for n in (1, 200, 2, 120)])):
        assert outcome["a"].shape == (n, 1_000_000)
        assert (outcome["a"][0] == n).all()
        assert (outcome["a"][-1] == n).all()
        assert outcome["b"].tolist() == list(range(500_000))
        assert outcome["c"] == "text"
        outcome["a"][:] = outcome["b"][:] = 0  # writable
    del outcome
    assert descriptors() == before
    assert OUT_OF_BAND_BYTES < 500_000 * 8


def test_torch_takes_the_arrays_without_a_warning(
    pool: GuardedPool[Any, Any], recwarn: pytest.WarningsRecorder
) -> None:
    import torch

    (outcome,) = pool.imap([("big", 2)])
    assert torch.from_numpy(outcome["a"]).sum() == 4_000_000
    assert not [one for one in recwarn if "writable" in str(one.message)]


def test_no_children_means_this_process() -> None:
    with GuardedPool(act, 0, timeout_s=1, memory_bytes=1) as pool:
        assert run(pool, "pid", "decode error", 2) == [os.getpid(), Failure("it is no video", is_verdict=True), 2]


def test_a_child_that_cannot_start_stops_the_caller(capfd: pytest.CaptureFixture[str]) -> None:
    pool: GuardedPool[Any, Any] = GuardedPool(_Unloadable(), 2, timeout_s=60, memory_bytes=1 << 30)
    with pool, pytest.raises(RuntimeError, match="could not start"):
        run(pool, 1, 2, 3)
    assert "no such luck" in capfd.readouterr().err


class _Unloadable:
    def __call__(self, task: Any) -> Any:
        return task

    def __reduce__(self) -> Any:
        return _raise, ("no such luck",)


def _raise(text: str) -> None:
    raise ImportError(text)


def test_an_error_of_the_task_list_is_the_callers(pool: GuardedPool[Any, Any]) -> None:
    def torn() -> Iterator[int]:
        yield 1
        raise KeyError("list")

    with pytest.raises(KeyError, match="list"):
        list(pool.imap(torn()))
    assert run(pool, 1, 2) == [1, 2]


def test_closing_ends_a_hung_child_and_abandoned_outcomes(tmp_path: Path) -> None:
    pool = GuardedPool(act, 2, timeout_s=600, memory_bytes=1 << 30)
    outcomes = pool.imap([("write", str(tmp_path / "pid")), 1, 2, 3, 4])

    def wait() -> None:
        with contextlib.suppress(CancelledError, ValueError):
            list(outcomes)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    assert until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pool.close()
    assert not alive(int((tmp_path / "pid").read_text()))
    waiter.join(timeout=20)
    assert not waiter.is_alive()


@pytest.mark.parametrize("state", ["idle", "hang", pytest.param("hold the lock", marks=pytest.mark.slow)])
def test_children_die_with_a_killed_parent(state: str) -> None:
    """Also where another process, forked by the parent, holds the parent's end of the socket open."""
    code = f"""
        import os, sys, threading, time
        from pathlib import Path
        from cogds.data.pool import GuardedPool
        from tests.data.test_pool import act
        pool = GuardedPool(act, 2, timeout_s=5, memory_bytes=1 << 30)
        pids = set(pool.imap(["pid"] * 20))
        if {state!r} != "idle":
            threading.Thread(target=lambda: list(pool.imap([{state!r}] * 2)), daemon=True).start()
            time.sleep(0.3)
        child = os.fork()
        if child:
            print(child, *pids, flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    fork, *pids = map(int, parent.stdout.readline().split())
    try:
        assert pids
        assert all(map(alive, pids))
        parent.kill()
        parent.wait()
        # Where the lock is held only the kernel's clock ends it, ten seconds after the task's time.
        assert until(lambda: not any(map(alive, pids)), bound_s=30 if state == "hold the lock" else 10)
    finally:
        parent.kill()
        os.kill(fork, signal.SIGKILL)
        parent.stdout.close()
