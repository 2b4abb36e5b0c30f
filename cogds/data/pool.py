"""Child processes that can be killed, one task in flight in each: a crash, a hang or a glutton costs its task alone.

concurrent.futures cannot: one death breaks its pool and every task in flight, and a hung worker cannot be ended.
multiprocessing's spawn runs the main module again in every child, which for a training script imports torch: seconds
and half a gigabyte each. So a child is a plain new interpreter that imports the function's module and nothing else,
at the other end of a unix socket. In this process each child has a thread that sends, waits, watches and replaces.

Large arrays come back through anonymous memory (memfd) whose descriptor travels over the socket: nothing is left in
/dev/shm by a killed child, and a container's small /dev/shm is no limit.
"""

import contextlib
import json
import mmap
import os
import pickle
import queue
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

POLL_S = 0.1  # how often a child's time and memory are looked at
START_TIMEOUT_S = 300.0  # imports on a busy network disk
OUT_OF_BAND_BYTES = 1 << 20  # buffers from this size on travel as memory, not as a pickle
_ALIGNMENT = 64
_LENGTH = struct.Struct("<Q")
# What asks a run to stop. Ctrl-C goes to the whole terminal group, a launcher or SLURM ends a whole tree: a run that
# saves first still needs its children, and ends them itself.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from cogds.data.pool import _serve; _serve(int(sys.argv[1]))"
)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that this thread starts in here never get STOP_SIGNALS, from their first moment on.

    They inherit what this thread blocks; the process's other threads take its own signals meanwhile.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass(frozen=True)
class Failure:
    """Why a task gave no result, where that is no bug.

    reason: "took more than 120 s", "crashed its process (code -11)", "needed more than 4 GB of memory", the sentence
    of the DecodeError that the function raised, or "failed: Type: text" for an OSError. is_verdict: it was a
    DecodeError, which says something about the file; the others may be the machine's doing, and may not come again.
    """

    reason: str
    is_verdict: bool = False


class ChildError(Exception):
    """A task's function raised what is no `Failure`: a bug, with the child's traceback as text."""


@dataclass(frozen=True)
class _Bug:
    """What a child sends in place of a result."""

    traceback: str


class GuardedPool(Generic[Task, Result]):
    """`function` of many tasks, in num_children processes that start with the first task and serve all calls.

    function: importable by name from a module other than `__main__` (a functools.partial of one will do). timeout_s
    bounds one task. memory_bytes bounds the child's whole resident memory, its interpreter and libraries included
    (about 0.1 GB), and how much more it may ask for than it had at its start. A child that holds more than half of
    it between two tasks is replaced. num_children 0 runs the tasks in this process, one after the other, without
    any bound: a crash there is a crash of the run.
    """

    def __init__(
        self, function: Callable[[Task], Result], num_children: int, timeout_s: float, memory_bytes: int
    ) -> None:
        if getattr(getattr(function, "func", function), "__module__", None) == "__main__" and num_children > 0:
            raise ValueError("the function of a GuardedPool must stand in a module that a child can import")
        self._function, self._num_children = function, max(0, num_children)
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._todo: queue.SimpleQueue[tuple[Future[Result | Failure], Task] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._children: set[_Child] = set()
        self._lock = threading.Lock()  # of _threads, _children and _closed
        self._closed = False

    def imap(self, tasks: Iterable[Task], ahead: int = 0) -> Iterator[Result | Failure]:
        """One outcome for each task, in their order.

        Tasks are drawn as they are needed, in the caller's thread: beside the outcome that was given out last there
        are at most num_children + ahead begun, waiting for their turn or queued. The children go on while the caller
        is busy. Where the iterator is closed early, what runs ends unheard and the pool stays usable.

        DecodeError, OSError and MemoryError of the function become a `Failure`. Anything else that it raises is a bug:
        it is raised here, as ChildError if it happened in a child. Raises RuntimeError where a child cannot start.
        """
        if self._closed:
            raise ValueError("the pool is closed")
        if not self._num_children:
            return (_call(self._function, task, self._memory_bytes) for task in tasks)
        return self._imap_children(tasks, self._num_children + max(0, ahead))

    def close(self) -> None:
        """End the children, whatever they do. May be called twice."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, []
            for child in self._children:
                child.process.kill()
        for _ in threads:
            self._todo.put(None)
        for thread in threads:
            thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                if (item := self._todo.get_nowait()) is not None:
                    item[0].cancel()

    def __enter__(self) -> "GuardedPool[Task, Result]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _imap_children(self, tasks: Iterable[Task], num_outstanding: int) -> Iterator[Result | Failure]:
        pending: deque[Future[Result | Failure]] = deque()
        todo = iter(tasks)

        def fill() -> None:
            while len(pending) < num_outstanding:
                try:
                    task = next(todo)
                except StopIteration:
                    return
                future: Future[Result | Failure] = Future()
                pending.append(future)
                with self._lock:
                    if self._closed:
                        raise ValueError("the pool is closed")
                    if len(self._threads) < min(self._num_children, len(pending)):
                        # Daemon: an interpreter that ends does not wait for a task; its children see it gone.
                        thread = threading.Thread(target=self._tend, daemon=True, name="guarded-pool")
                        self._threads.append(thread)
                        thread.start()
                    self._todo.put((future, task))

        try:
            fill()
            while pending:
                outcome = pending.popleft().result()
                fill()  # before the caller gets busy with this one
                yield outcome
                del outcome  # may be a gigabyte, and the caller may be done with it
        finally:
            for future in pending:
                future.cancel()

    # ------------------------------------------------------------------------------------ in the thread of a child

    def _tend(self) -> None:
        """A thread's life: one child, replaced where it dies, and one task after the other."""
        child: _Child | None = None
        while (item := self._todo.get()) is not None and not self._closed:
            future, task = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if child is not None and (
                    child.process.poll() is not None or child.resident_bytes() > self._memory_bytes // 2
                ):
                    self._end(child)
                    child = None
                child = child or self._start()
                outcome = child.run(task, self._timeout_s, self._memory_bytes)
            except BaseException as error:
                future.set_exception(error)
                if child is not None:
                    self._end(child)
                    child = None
                continue
            if not child.usable:
                self._end(child)
                child = None
            if isinstance(outcome, _Bug):
                future.set_exception(ChildError(f"{task!r} ran into a bug in a child process:\n{outcome.traceback}"))
            else:
                future.set_result(outcome)
            del item, future, task, outcome
        if item is not None:
            item[0].cancel()
        if child is not None:
            self._end(child)

    def _start(self) -> "_Child":
        child = _Child(self._function, self._timeout_s, self._memory_bytes)
        with self._lock:
            self._children.add(child)
            if self._closed:
                child.process.kill()
        try:
            child.await_ready()
        except BaseException:
            self._end(child)
            raise
        return child

    def _end(self, child: "_Child") -> None:
        with self._lock:
            self._children.discard(child)
        child.end()


class _Child:
    """One process and the socket to it."""

    def __init__(self, function: Callable[[Any], Any], timeout_s: float, memory_bytes: int) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs, deaf_children():  # ours must be the only other end: then a death reads as the end of the stream
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.usable = True
        self.setup = pickle.dumps((function, os.getpid(), timeout_s, memory_bytes))

    def await_ready(self) -> None:
        """Hand over the function; the time of imports is not the first task's."""
        try:
            _send(self.socket, self.setup)
            self.socket.settimeout(START_TIMEOUT_S)
            _receive(self.socket)
        except (EOFError, OSError) as error:
            self.process.kill()
            raise RuntimeError(
                f"a child process could not start (code {self.process.wait()}, {type(error).__name__}); "
                "what it printed above says why"
            ) from None

    def run(self, task: Any, timeout_s: float, memory_bytes: int) -> Any:
        """The outcome of one task. Where the child is killed or dead, `usable` is false after it."""
        message = pickle.dumps(task, protocol=5)
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        try:
            self.socket.settimeout(timeout_s)
            _send(self.socket, message)
            while not poll.poll(POLL_S * 1000):
                if self.resident_bytes() > memory_bytes:
                    return self._kill(_too_much_memory(memory_bytes))
                if time.monotonic() > deadline:
                    return self._kill(f"took more than {timeout_s:g} s")
            self.socket.settimeout(max(POLL_S, deadline - time.monotonic()))
            return _receive(self.socket)
        except TimeoutError:
            return self._kill(f"took more than {timeout_s:g} s")
        except (EOFError, ConnectionError):
            self.usable = False
            with contextlib.suppress(subprocess.TimeoutExpired):
                # It hung up and is about to end by itself: that code says more than that of our kill.
                self.process.wait(timeout=5.0)
            self.end()
            return Failure(f"crashed its process (code {self.process.returncode})")

    def resident_bytes(self) -> int:
        """0 where the process is gone."""
        try:
            with open(f"/proc/{self.process.pid}/statm") as file:
                return int(file.read().split()[1]) * mmap.PAGESIZE
        except (OSError, IndexError):
            return 0

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()

    def _kill(self, reason: str) -> Failure:
        self.usable = False
        self.end()
        return Failure(reason)


# ------------------------------------------------------------------------------------------------ in the child


def _serve(descriptor: int) -> None:
    """A child's life: the function of what arrives, until the other end closes or the parent is gone."""
    connection = socket.socket(fileno=descriptor)
    try:
        function, parent, timeout_s, memory_bytes = _receive(connection)
    except (EOFError, ConnectionError):
        return
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    # The parent looks ten times a second, and 0.1 s is enough to touch a gigabyte: the kernel refuses at once.
    limit = _data_bytes() + memory_bytes
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    _send(connection, pickle.dumps(None))
    while True:
        try:
            task = _receive(connection)
        except (EOFError, ConnectionError):
            return
        # A task that hangs and holds the interpreter's lock stops `_leave_with` too: the kernel's clock ends both.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 10.0)
        try:
            outcome = _call(function, task, memory_bytes)
        except Exception:
            outcome = _Bug(traceback.format_exc())
        del task
        try:
            _send_result(connection, outcome)
        except BrokenPipeError:
            return
        except Exception as error:  # what cannot be pickled, or finds no memory: nothing was sent yet
            _send_result(connection, _failure_of(error, memory_bytes) or _Bug(traceback.format_exc()))
        del outcome
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _leave_with(parent: int) -> None:
    # Not PR_SET_PDEATHSIG: that follows the thread that started the child, and such threads end. Not the end of the
    # stream alone: a process that the parent forked may hold the other end open, and a busy child does not read.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _call(function: Callable[[Task], Result], task: Task, memory_bytes: int) -> Result | Failure:
    """The outcome of a task. Raises what is a bug."""
    try:
        return function(task)
    except Exception as error:
        if (failure := _failure_of(error, memory_bytes)) is None:
            raise
        return failure


def _failure_of(error: Exception, memory_bytes: int) -> Failure | None:
    """What an exception says about a task's file or about the machine; None for a bug."""
    from cogds.data.video import DecodeError

    match error:
        case DecodeError():
            return Failure(str(error), is_verdict=True)
        case MemoryError():
            return Failure(_too_much_memory(memory_bytes))
        case OSError():
            return Failure(f"failed: {type(error).__name__}: {error}")
    return None


def _too_much_memory(memory_bytes: int) -> str:
    return f"needed more than {memory_bytes / 1e9:.3g} GB of memory"


def _data_bytes() -> int:
    """Private writable memory that this process has asked for: what RLIMIT_DATA counts."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * mmap.PAGESIZE


# ------------------------------------------------------------------------------------------------ over the socket
# A message is its length, then a pickle of (payload, sizes). Where there are sizes, a descriptor travels with the
# length: memory that holds the payload's large buffers, each from a multiple of _ALIGNMENT on.


def _send(connection: socket.socket, message: bytes) -> None:
    _send_frame(connection, pickle.dumps((message, []), protocol=5), None)


def _send_result(connection: socket.socket, result: Any) -> None:
    large: list[memoryview] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND_BYTES:
            return True
        large.append(view)
        return False

    payload = pickle.dumps(result, protocol=5, buffer_callback=in_band)
    sizes = [view.nbytes for view in large]
    frame = pickle.dumps((payload, sizes), protocol=5)
    if not large:
        _send_frame(connection, frame, None)
        return
    descriptor = os.memfd_create("result", os.MFD_CLOEXEC)
    try:
        for view, offset in zip(large, _offsets(sizes)):
            done = 0
            while done < view.nbytes:  # one call writes 2 GiB at most
                done += os.pwrite(descriptor, view[done:], offset + done)
        _send_frame(connection, frame, descriptor)
    finally:
        os.close(descriptor)


def _send_frame(connection: socket.socket, frame: bytes, descriptor: int | None) -> None:
    if descriptor is None:
        connection.sendall(_LENGTH.pack(len(frame)))
    else:
        socket.send_fds(connection, [_LENGTH.pack(len(frame))], [descriptor])
    connection.sendall(frame)


def _receive(connection: socket.socket) -> Any:
    """The next object. Its large arrays lie in the sender's memory, private and writable: no copy until written to.

    Raises EOFError where the other end closed.
    """
    header, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        header += _receive_exactly(connection, _LENGTH.size - len(header)) if header else b""
        if not header:
            raise EOFError("the other end closed")
        payload, sizes = pickle.loads(_receive_exactly(connection, _LENGTH.unpack(header)[0]))
        if not sizes:
            return pickle.loads(payload)
        offsets = _offsets(sizes)
        memory = memoryview(mmap.mmap(descriptors[0], offsets[-1] + sizes[-1], access=mmap.ACCESS_COPY))
        return pickle.loads(payload, buffers=[memory[start : start + size] for start, size in zip(offsets, sizes)])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    view, done = memoryview(data), 0
    while done < num_bytes:
        received = connection.recv_into(view[done:])
        if not received:
            raise EOFError("the other end closed")
        done += received
    return data


def _offsets(sizes: list[int]) -> list[int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets
