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
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogds.data.video.media import DecodeError
from cogds.process.signals import STOP_SIGNALS, block_stop_signals
from cogds.process.worker_pool import OUT_OF_BAND_BYTES, TaskFailure, WorkerError, WorkerPool
from tests.process.processes import ROOT, is_alive, wait_until


def act(task: Any) -> Any:
    """The function of the workers. The task names the behavior."""
    match task:
        case "pid":
            return os.getpid()
        case "exit":
            os._exit(7)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(600)
        case "hold the GIL":
            ctypes.PyDLL(None).sleep(600)
        case "allocate slowly":
            arrays = []
            while True:
                arrays.append(np.ones(25_000_000, np.uint8))
                time.sleep(0.05)
        case "allocate shared":  # a limit on private memory does not apply
            shared = mmap.mmap(-1, 1 << 34)
            while True:
                shared.write(bytes(25_000_000))
                time.sleep(0.05)
        case "allocate at once":
            return np.ones(1 << 40, np.uint8)
        case "keep":
            act.kept = np.ones(200_000_000, np.uint8)
        case "decode error":
            raise DecodeError("not a video")
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
        case ("write pid and hang", str(path)):
            Path(path).write_text(str(os.getpid()))
            time.sleep(600)
        case ("write pid and wait", str(path)):
            Path(path).write_text(str(os.getpid()))
            assert wait_until(Path(path).with_name("continue").exists)
            return "done"
        case float(seconds):
            time.sleep(seconds)
    return task


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool[Any, Any]]:
    with WorkerPool(act, 2, timeout_s=60, memory_bytes=1 << 30) as pool:
        yield pool


def run(pool: WorkerPool[Any, Any], *tasks: Any) -> list[Any]:
    return list(pool.imap(tasks))


def read_pid(file: Path) -> int:
    """Wait for a task to write its process id."""
    assert wait_until(lambda: file.exists() and bool(file.read_text()))
    return int(file.read_text())


def test_outcomes_are_in_the_order_of_the_tasks(pool):
    tasks = [0.3, 0.0, 0.2, 0.0, 0.1] + [float(k) / 1000 for k in range(50)]
    assert list(pool.imap(tasks, ahead=3)) == tasks
    assert run(pool) == []


def test_tasks_are_drawn_as_they_are_needed(pool):
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
            assert len(drawn) == (k + 1) + 2 + ahead  # two workers
        outcomes.close()
        assert run(pool, 1, 2) == [1, 2]


def test_workers_continue_while_the_caller_is_busy(pool, tmp_path):
    outcomes = pool.imap([0, 1, 2, ("write pid and hang", str(tmp_path / "pid"))])
    next(outcomes)
    next(outcomes)
    pid = read_pid(tmp_path / "pid")
    outcomes.close()
    os.kill(pid, signal.SIGKILL)  # the other tests need the worker


def test_workers_serve_all_calls():
    with WorkerPool(act, 2, timeout_s=60, memory_bytes=1 << 30) as pool:
        pids = set(run(pool, *["pid"] * 40)) | set(run(pool, *["pid"] * 40))
        assert 1 <= len(pids) <= 2
        assert os.getpid() not in pids
        assert all(map(is_alive, pids))
    assert not any(map(is_alive, pids))
    with pytest.raises(ValueError, match="closed"):
        pool.imap([1])
    pool.close()


def test_a_worker_imports_neither_torch_nor_a_decoder():
    """It imports only the pool's and the function's modules."""
    modules = "cogds.process.worker_pool, cogds.data.video.media"
    code = f"import sys, {modules}; print({{'torch', 'av', 'decord', 'PIL'}} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60, cwd=ROOT).strip() == "set()"
    with WorkerPool(act, 1, timeout_s=60, memory_bytes=1 << 30) as pool:
        (modules,) = pool.imap(["modules"])
    assert "cogds.process.worker_pool" in modules
    assert "torch" not in modules


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_each_failure_loses_only_its_own_task(num_workers):
    tasks = ["exit", 1, "segfault", 2, "allocate slowly", 3, "allocate at once", 4, "decode error", 5, "stale", 6,
             "exit", 7, "allocate shared", 8]  # fmt: skip
    with WorkerPool(act, num_workers, 60, 400_000_000, (DecodeError,)) as pool:
        outcomes = run(pool, *tasks)
    assert outcomes[1::2] == list(range(1, 9))
    exited, segfault, slow, at_once, decode, stale, again, shared = outcomes[::2]
    assert exited == again == TaskFailure("crashed its process (code 7)")
    assert segfault == TaskFailure("crashed its process (code -11)")
    assert slow == at_once == shared == TaskFailure("needed more than 0.4 GB of memory")
    assert decode == TaskFailure("not a video", is_permanent=True)
    assert stale == TaskFailure("failed: OSError: stale file handle")


@pytest.mark.parametrize("error", [TypeError("planted"), AttributeError("planted"), ValueError("planted")])
def test_a_bug_is_raised_with_its_traceback(pool, error):
    with pytest.raises(WorkerError) as caught:
        run(pool, 1, error, 2)
    text = str(caught.value)
    assert repr(error) in text  # the task
    assert text.rstrip().endswith(f"{type(error).__name__}: planted")
    assert "in act\n" in text
    assert run(pool, 3, 4) == [3, 4]
    with WorkerPool(act, 0, 60, 1 << 30) as alone, pytest.raises(type(error), match="planted"):
        run(alone, 1, error)


def test_a_result_that_cannot_be_pickled_is_a_bug(pool):
    with pytest.raises(WorkerError, match="pickle"):
        run(pool, "unpicklable")
    assert run(pool, 1) == [1]


@pytest.mark.parametrize("task", ["hang", pytest.param("hold the GIL", marks=pytest.mark.slow)])
def test_a_hang_loses_only_its_own_task(task):
    with WorkerPool(act, 2, timeout_s=1.0, memory_bytes=1 << 30) as pool:
        assert run(pool, 1, task, 2, 3) == [1, TaskFailure("took more than 1 s"), 2, 3]


def test_workers_survive_signals_to_the_whole_process_tree(pool, tmp_path):
    """Idle and running workers survive, and so do processes that have just started."""
    (idle,) = pool.imap(["pid"])
    with ThreadPoolExecutor(1) as executor:
        outcomes = executor.submit(run, pool, ("write pid and wait", str(tmp_path / "pid")), 1)
        running = read_pid(tmp_path / "pid")
        for number in STOP_SIGNALS:
            for pid in {idle, running}:
                os.kill(pid, number)
        (tmp_path / "continue").touch()
        assert outcomes.result(60) == ["done", 1]
    with block_stop_signals():
        process = subprocess.Popen([sys.executable, "-c", "print('started')"], stdout=subprocess.PIPE)
        for number in STOP_SIGNALS:
            process.send_signal(number)
        assert process.communicate(timeout=60) == (b"started\n", None)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


def test_a_worker_that_keeps_its_memory_is_replaced():
    with WorkerPool(act, 1, timeout_s=60, memory_bytes=350_000_000) as pool:
        outcomes = run(pool, "pid", "pid", "keep", "pid", "keep", "pid")
    assert outcomes[0] == outcomes[1]
    assert len({outcomes[1], outcomes[3], outcomes[5]}) == 3
    assert not any(isinstance(outcome, TaskFailure) for outcome in outcomes)


def test_a_worker_that_dies_idle_loses_no_task(pool):
    for pid in set(run(pool, *["pid"] * 10)):
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda pid=pid: not is_alive(pid))
    assert run(pool, 1, 2, 3, 4) == [1, 2, 3, 4]


def test_large_arrays_arrive_whole_and_writable_and_are_released(pool):
    def num_memory_files() -> int:
        gc.collect()
        links = [f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd")]
        return sum("memfd:outcome" in os.readlink(link) for link in links if os.path.lexists(link))

    before = num_memory_files()
    for n, outcome in zip((1, 100, 2, 60), pool.imap([("big", n) for n in (1, 100, 2, 60)])):
        assert outcome["a"].shape == (n, 1_000_000)
        assert (outcome["a"][0] == n).all()
        assert (outcome["a"][-1] == n).all()
        assert outcome["b"].tolist() == list(range(500_000))
        assert outcome["c"] == "text"
        outcome["a"][:] = outcome["b"][:] = 0  # writable
    del outcome
    assert num_memory_files() == before
    assert OUT_OF_BAND_BYTES < 500_000 * 8


def test_torch_takes_the_arrays_without_a_warning(pool, recwarn):
    import torch

    (outcome,) = pool.imap([("big", 2)])
    assert torch.from_numpy(outcome["a"]).sum() == 4_000_000
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_without_workers_tasks_run_in_this_process():
    with WorkerPool(act, 0, 1, 1, (DecodeError,)) as pool:
        assert run(pool, "pid", "decode error", 2) == [os.getpid(), TaskFailure("not a video", is_permanent=True), 2]


def test_a_worker_that_cannot_start_is_an_error(capfd):
    pool: WorkerPool[Any, Any] = WorkerPool(_Unloadable(), 2, timeout_s=60, memory_bytes=1 << 30)
    with pool, pytest.raises(RuntimeError, match="could not start"):
        run(pool, 1, 2, 3)
    assert "cannot be loaded" in capfd.readouterr().err


class _Unloadable:
    def __call__(self, task: Any) -> Any:
        return task

    def __reduce__(self) -> Any:
        return _raise, ("cannot be loaded",)


def _raise(text: str) -> None:
    raise ImportError(text)


def test_an_error_of_the_task_iterator_is_raised_to_the_caller(pool):
    def failing_tasks() -> Iterator[int]:
        yield 1
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        list(pool.imap(failing_tasks()))
    assert run(pool, 1, 2) == [1, 2]


def test_closing_kills_a_hung_worker_and_abandons_its_outcomes(tmp_path):
    pool = WorkerPool(act, 2, timeout_s=600, memory_bytes=1 << 30)

    def wait() -> None:
        with contextlib.suppress(CancelledError, ValueError):
            run(pool, ("write pid and hang", str(tmp_path / "pid")), 1, 2, 3, 4)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    pid = read_pid(tmp_path / "pid")
    pool.close()
    assert not is_alive(pid)
    waiter.join(timeout=20)
    assert not waiter.is_alive()


@pytest.mark.parametrize(
    "state", ["hang", *(pytest.param(s, marks=pytest.mark.slow) for s in ("idle", "hold the GIL"))]
)
def test_workers_end_with_a_killed_parent(state):
    """Even if another process, forked by the parent, keeps the parent's end of the socket open."""
    code = f"""
        import os, sys, threading, time
        from pathlib import Path
        from cogds.process.worker_pool import WorkerPool
        from tests.process.test_worker_pool import act
        pool = WorkerPool(act, 2, timeout_s=5, memory_bytes=1 << 30)
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
    fork, *pids = map(int, parent.stdout.readline().split())
    try:
        assert pids
        assert all(map(is_alive, pids))
        parent.kill()
        parent.wait()
        # If the GIL is held, the kernel's timer ends the worker ten seconds after the task's limit.
        assert wait_until(lambda: not any(map(is_alive, pids)), 30 if state == "hold the GIL" else 10)
    finally:
        parent.kill()
        os.kill(fork, signal.SIGKILL)
        parent.stdout.close()
