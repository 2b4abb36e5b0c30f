"""Worker processes that can be killed. One that crashes, hangs or runs out of memory loses only its own task.

    with WorkerPool(decode, 4, timeout_s=120, memory_bytes=4 << 30, permanent_errors=(DecodeError,)) as pool:
        for outcome in pool.imap(tasks):  # a result of `decode`, or a TaskFailure

Why not a library: concurrent.futures cannot end a worker that hangs, and one crash fails every task in flight. pebble
handles both, but its workers share one pipe for results: a decoded clip (254 MB) takes 5 times as long as through the
anonymous memory used here. They also run the main module again. A worker here is a new interpreter that imports the
module of the function and nothing else: importing torch would take seconds and half a gigabyte in each.

In this process, each worker has a thread that sends tasks, waits, and watches and replaces the worker. Large arrays
come back in anonymous memory (memfd) whose descriptor travels over the socket. So a killed worker leaves nothing
behind, and a container's small /dev/shm is no limit.
"""

import contextlib
import json
import mmap
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from cogds.process.signals import block_stop_signals

Task = TypeVar("Task")
Result = TypeVar("Result")

POLL_INTERVAL_S = 0.1  # between checks of a worker's time and memory
START_TIMEOUT_S = 300.0  # imports from a busy network disk
OUT_OF_BAND_BYTES = 1 << 20  # buffers of this size and larger travel as memory instead of in a pickle
_ALIGNMENT = 64
_WORKER_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from cogds.process.worker_pool import _work; _work(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class TaskFailure:
    """Why a task has no result, if that is not a bug.

    reason: "took more than 120 s", "crashed its process (code -11)", "needed more than 4 GB of memory", the message of
    a permanent error, or "failed: Type: message" for an OSError. is_permanent: the function raised a permanent error,
    which lies in the task itself. Other failures may come from the machine and not happen again.
    """

    reason: str
    is_permanent: bool = False


class WorkerError(Exception):
    """A bug in the function of a task. The message has the worker's traceback."""


@dataclass(frozen=True)
class _Bug:
    """The outcome of a task whose function has a bug."""

    traceback: str


@dataclass(frozen=True)
class _Job:
    """The function that a worker runs on each task, and its limits."""

    function: Callable[[Any], Any]
    timeout_s: float
    memory_bytes: int
    permanent_errors: tuple[type[Exception], ...]

    def run(self, task: Any) -> Any:
        """Return the outcome of a task. Raises only bugs."""
        try:
            return self.function(task)
        except Exception as error:
            if (failure := self.failure(error)) is None:
                raise
            return failure

    def failure(self, error: Exception) -> TaskFailure | None:
        """Return the failure for an exception, or None for a bug."""
        match error:
            case _ if isinstance(error, self.permanent_errors):
                return TaskFailure(str(error), is_permanent=True)
            case MemoryError():
                return self.out_of_memory()
            case OSError():
                return TaskFailure(f"failed: {type(error).__name__}: {error}")
        return None

    def out_of_memory(self) -> TaskFailure:
        return TaskFailure(f"needed more than {self.memory_bytes / 1e9:.3g} GB of memory")

    def timed_out(self) -> TaskFailure:
        return TaskFailure(f"took more than {self.timeout_s:g} s")


class WorkerPool(Generic[Task, Result]):
    """Runs `function` on many tasks in worker processes, which start with the first task and serve all calls.

    Args:
        function: Importable by name from a module other than `__main__`, or a functools.partial of such a function.
        num_workers: Number of processes. With 0, tasks run in this process, one after another, without any limit.
        timeout_s: Limit for one task.
        memory_bytes: Limit for a worker's resident memory, including its interpreter and libraries (about 0.1 GB), and
            for the memory that it allocates after its start. A worker that holds more than half of it between two
            tasks is replaced.
        permanent_errors: Exceptions of `function` whose cause lies in the task itself.
    """

    def __init__(
        self,
        function: Callable[[Task], Result],
        num_workers: int,
        timeout_s: float,
        memory_bytes: int,
        permanent_errors: tuple[type[Exception], ...] = (),
    ) -> None:
        if getattr(getattr(function, "func", function), "__module__", None) == "__main__" and num_workers > 0:
            raise ValueError("the function of a WorkerPool must be in a module that a worker can import")
        self._job, self._num_workers = _Job(function, timeout_s, memory_bytes, permanent_errors), max(0, num_workers)
        self._queue: queue.SimpleQueue[tuple[Future[Result | TaskFailure], Task] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # protects the attributes below
        self._threads: list[threading.Thread] = []
        self._workers: set[_Worker] = set()
        self._is_closed = False

    def imap(self, tasks: Iterable[Task], ahead: int = 0) -> Iterator[Result | TaskFailure]:
        """Yield the outcome of each task, in the order of the tasks.

        Tasks are drawn in the caller's thread. Besides the outcome that was yielded last, at most num_workers + ahead
        tasks are queued, running or finished. Workers continue while the caller is busy. If the iterator is closed
        early, the results of running tasks are dropped and the pool stays usable.

        Raises:
            WorkerError: `function` has a bug (without workers, the exception itself).
            RuntimeError: A worker cannot start.
        """
        if self._is_closed:
            raise ValueError("the pool is closed")
        if not self._num_workers:
            return map(self._job.run, tasks)
        return self._imap_in_workers(tasks, self._num_workers + max(0, ahead))

    def close(self) -> None:
        """Kill the workers, even if they are running tasks. May be called twice."""
        with self._lock:
            self._is_closed = True
            threads, self._threads = self._threads, []
            for worker in self._workers:
                worker.process.kill()
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                if (item := self._queue.get_nowait()) is not None:
                    item[0].cancel()

    def __enter__(self) -> "WorkerPool[Task, Result]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _imap_in_workers(self, tasks: Iterable[Task], num_outstanding: int) -> Iterator[Result | TaskFailure]:
        pending: deque[Future[Result | TaskFailure]] = deque()
        remaining = iter(tasks)

        def submit_tasks() -> None:
            while len(pending) < num_outstanding:
                try:
                    task = next(remaining)
                except StopIteration:
                    return
                pending.append(self._submit(task, len(pending) + 1))

        try:
            submit_tasks()
            while pending:
                outcome = pending.popleft().result()
                submit_tasks()  # before the caller gets busy with this outcome
                yield outcome
                del outcome  # may be a gigabyte, and the caller may be done with it
        finally:
            for future in pending:
                future.cancel()

    def _submit(self, task: Task, num_pending: int) -> "Future[Result | TaskFailure]":
        future: Future[Result | TaskFailure] = Future()
        with self._lock:
            if self._is_closed:
                raise ValueError("the pool is closed")
            if len(self._threads) < min(self._num_workers, num_pending):
                # A daemon thread does not keep the interpreter alive. The workers notice when this process has ended.
                self._threads.append(threading.Thread(target=self._serve_worker, daemon=True, name="worker-pool"))
                self._threads[-1].start()
            self._queue.put((future, task))
        return future

    # ------------------------------------------------------------------------------------- in the thread of a worker

    def _serve_worker(self) -> None:
        """Run tasks in one worker, which is replaced if it dies, until the pool is closed."""
        worker: _Worker | None = None
        while (item := self._queue.get()) is not None and not self._is_closed:
            future, task = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if worker is None or worker.needs_replacement():
                    self._end(worker)
                    worker = self._start()
                outcome = worker.run(task)
            except BaseException as error:
                future.set_exception(error)
                self._end(worker)
                worker = None
                continue
            if isinstance(outcome, _Bug):
                future.set_exception(WorkerError(f"{task!r} ran into a bug in a worker process:\n{outcome.traceback}"))
            else:
                future.set_result(outcome)
            del item, future, task, outcome
        if item is not None:
            item[0].cancel()
        self._end(worker)

    def _start(self) -> "_Worker":
        worker = _Worker(self._job)
        with self._lock:
            self._workers.add(worker)
            if self._is_closed:
                worker.process.kill()
        try:
            worker.wait_until_ready()
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: "_Worker | None") -> None:
        if worker is not None:
            with self._lock:
                self._workers.discard(worker)
            worker.end()


class _Worker:
    """A worker process, seen from this process."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.connection, worker_end = Pipe()
        # This process closes the worker's end, so that it reads the end of the stream if the worker dies.
        with worker_end, block_stop_signals():
            self.process = subprocess.Popen(
                [sys.executable, "-c", _WORKER_CODE, str(worker_end.fileno()), json.dumps(sys.path)],
                pass_fds=[worker_end.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def wait_until_ready(self) -> None:
        """Send the job and wait for the imports, whose time must not count for the first task.

        Raises:
            RuntimeError: The worker cannot start.
        """
        try:
            self.connection.send((self.job, os.getpid()))
            if not self.connection.poll(START_TIMEOUT_S):
                raise TimeoutError
            self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.kill()
            raise RuntimeError(
                f"a worker process could not start (exit code {self.process.wait()}, {type(error).__name__}); see its "
                "output above"
            ) from None

    def run(self, task: Any) -> Any:
        """Return the outcome of a task. The process has ended afterwards if it crashed or went beyond a limit."""
        deadline = time.monotonic() + self.job.timeout_s
        try:
            self.connection.send(task)
            while not self.connection.poll(POLL_INTERVAL_S):
                if self.resident_bytes() > self.job.memory_bytes:
                    self.end()
                    return self.job.out_of_memory()
                if time.monotonic() > deadline:
                    self.end()
                    return self.job.timed_out()
            return _receive_outcome(self.connection)
        except (EOFError, ConnectionError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                # It closed the connection and is about to exit. Its own exit code says more than that of a kill.
                self.process.wait(timeout=5.0)
            self.end()
            return TaskFailure(f"crashed its process (code {self.process.returncode})")

    def needs_replacement(self) -> bool:
        """Whether the process has ended, or holds so much memory that the next task might not fit."""
        return self.process.poll() is not None or self.resident_bytes() > self.job.memory_bytes // 2

    def resident_bytes(self) -> int:
        """Return the worker's resident memory, or 0 if the process is gone."""
        try:
            with open(f"/proc/{self.process.pid}/statm") as file:
                return int(file.read().split()[1]) * mmap.PAGESIZE
        except (OSError, IndexError):
            return 0

    def end(self) -> None:
        """Kill the process. May be called twice."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


# ------------------------------------------------------------------------------------------------ in the worker


def _work(descriptor: int) -> None:
    """Run tasks until the other end closes or the parent is gone."""
    connection = Connection(descriptor)
    try:
        job, parent = connection.recv()
    except (EOFError, ConnectionError):
        return
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    _limit_memory(job.memory_bytes)
    connection.send(None)
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):
            return
        # A task that hangs and holds the GIL also stops `_exit_with`. The kernel's timer then ends the process.
        signal.setitimer(signal.ITIMER_REAL, job.timeout_s + 10.0)
        try:
            outcome = job.run(task)
        except Exception:
            outcome = _Bug(traceback.format_exc())
        del task
        try:
            _send_outcome(connection, outcome)
        except BrokenPipeError:
            return
        except Exception as error:  # it cannot be pickled, or memory is short; nothing has been sent yet
            _send_outcome(connection, job.failure(error) or _Bug(traceback.format_exc()))
        del outcome
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _exit_with(parent: int) -> None:
    """Exit when the parent process has ended.

    PR_SET_PDEATHSIG would kill this process when the thread that started it ends. The end of the stream is not a
    reliable sign: a process that the parent forked may hold the other end open, and a busy worker does not read.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _limit_memory(num_bytes: int) -> None:
    """Limit the private memory that this process allocates from now on.

    The parent checks ten times per second, but a process can allocate a gigabyte in 0.1 s.
    """
    with open("/proc/self/statm") as file:
        allocated_bytes = int(file.read().split()[5]) * mmap.PAGESIZE  # what RLIMIT_DATA counts
    limit, hard = allocated_bytes + num_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


# ------------------------------------------------------------------------------------------------ outcomes
# An outcome is (pickle, sizes of its large buffers). If there are any, the descriptor of the memory that holds them
# follows; each buffer starts at a multiple of _ALIGNMENT.


def _send_outcome(connection: Connection, outcome: Any) -> None:
    buffers: list[memoryview] = []

    def is_in_band(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND_BYTES:
            return True
        buffers.append(view)
        return False

    payload = pickle.dumps(outcome, protocol=5, buffer_callback=is_in_band)
    sizes = [view.nbytes for view in buffers]
    if not buffers:
        connection.send((payload, sizes))
        return
    descriptor = os.memfd_create("outcome", os.MFD_CLOEXEC)
    try:
        for view, offset in zip(buffers, _offsets(sizes)):
            num_written = 0
            while num_written < view.nbytes:  # one call writes at most 2 GiB
                num_written += os.pwrite(descriptor, view[num_written:], offset + num_written)
        connection.send((payload, sizes))
        reduction.send_handle(connection, descriptor, None)
    finally:
        os.close(descriptor)


def _receive_outcome(connection: Connection) -> Any:
    """Return the next outcome. Its large arrays are in the worker's memory, writable, copied only when written to.

    Raises:
        EOFError: The other end is closed.
    """
    payload, sizes = connection.recv()
    if not sizes:
        return pickle.loads(payload)
    descriptor = reduction.recv_handle(connection)
    try:
        offsets = _offsets(sizes)
        memory = memoryview(mmap.mmap(descriptor, offsets[-1] + sizes[-1], access=mmap.ACCESS_COPY))
    finally:
        os.close(descriptor)
    return pickle.loads(payload, buffers=[memory[start : start + size] for start, size in zip(offsets, sizes)])


def _offsets(sizes: list[int]) -> list[int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets
