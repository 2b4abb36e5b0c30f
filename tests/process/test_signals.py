"""Requests to stop, with real processes and signals, because they depend on the kernel, C code and threads."""

import os
import shutil
import signal
import subprocess
import textwrap
import time

import pytest

from cogds.process import signals, watchdog
from cogds.process.signals import SAME_REQUEST_S, STOP_SIGNALS, StopRequest, find_launchers
from tests.process.processes import (
    TIMEOUT_S,
    children,
    is_alive,
    read_stderr,
    read_stdout,
    script,
    wait_until,
    write_stdin,
)

# The main thread waits in C code, without the GIL, for input from the test.
WAIT_IN_C = """
    import ctypes
    from cogds.process import signals as module
    from cogds.process.signals import StopRequest, find_launchers
    module.SAME_REQUEST_S = {same_request_s}
    stop = StopRequest({launcher})
    stop.listen()
    {defer}
    print("ready", flush=True)
    num_bytes = ctypes.CDLL(None).read(0, ctypes.create_string_buffer(9), 1)
    print(f"read {{num_bytes}} requested {{stop.requested}}", flush=True)
"""


def waiting(launcher: str = "()", defer: str = "stop.defer()", same_request_s: float = SAME_REQUEST_S) -> str:
    return WAIT_IN_C.format(launcher=launcher, defer=defer, same_request_s=same_request_s)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_handled_while_the_main_thread_waits_in_c(number):
    with script(waiting()) as process:
        assert read_stdout(process) == "ready"
        process.send_signal(number)
        # It is reported while the call still waits. The signal does not interrupt the call.
        assert read_stderr(process).startswith(f"{number.name}: saving")
        assert process.poll() is None
        assert process.communicate("x", timeout=TIMEOUT_S) == (f"read 1 requested {number.name}\n", "")
        assert process.returncode == 0


LATE = """
    import os, sys, time
    from cogds.process.signals import StopRequest

    class Late:
        def __del__(self, write=os.write, sleep=time.sleep):
            write(1, b"ending\\n")  # by now, Python has removed its handlers
            sleep(1.0)

    late, stop = Late(), StopRequest()
    stop.listen()
    stop.defer()
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    stop.ignore()
    sys.exit(75)
"""


def test_a_late_signal_does_not_change_the_exit_code():
    with script(LATE) as process:
        assert read_stdout(process) == "ready"
        process.send_signal(signal.SIGUSR1)
        assert read_stdout(process) == "ending"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(TIMEOUT_S) == 75


def test_until_defer_the_first_signal_ends_the_process():
    with script(waiting(defer="print('unflushed')")) as process:
        assert read_stdout(process) == "unflushed"
        assert read_stdout(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 75
        assert read_stderr(process).startswith("SIGTERM: stopping at once")


def test_two_signals_in_a_row_are_one_request_and_a_later_one_ends_the_process():
    with script(waiting(same_request_s=1.0)) as process:
        assert read_stdout(process) == "ready"
        process.send_signal(signal.SIGINT)
        assert "SIGINT: saving" in read_stderr(process)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 75
        assert read_stderr(process) == "SIGTERM again: stopping at once"


def test_a_signal_after_an_advance_warning_does_not_end_a_save():
    with script(waiting(same_request_s=0)) as process:
        assert read_stdout(process) == "ready"
        process.send_signal(signal.SIGUSR1)
        assert "SIGUSR1: saving" in read_stderr(process)
        process.send_signal(signal.SIGTERM)
        assert "SIGTERM: saving" in read_stderr(process)
        assert process.communicate("x", timeout=TIMEOUT_S)[0] == "read 1 requested SIGTERM\n"


# A process whose command line looks like a launcher's and whose child, on the same pipes, is a rank.
LAUNCHER = """
    import subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", sys.argv[2]])
    print(child.pid, flush=True)
    child.wait()
"""


def launch(process: subprocess.Popen[str]) -> int:
    """Wait until the launcher's child is ready, and return its process id."""
    lines = {read_stdout(process), read_stdout(process)}
    assert "ready" in lines
    return int((lines - {"ready"}).pop())


@pytest.mark.parametrize("defer", ["stop.defer()", ""])
def test_a_rank_stops_when_its_launcher_is_killed(defer):
    rank = textwrap.dedent(waiting("find_launchers()", defer, same_request_s=0))
    with script(LAUNCHER, "/bin/torchrun", rank) as process:
        child = launch(process)
        process.kill()
        process.wait()
        assert is_alive(child)
        if defer:
            assert read_stderr(process).startswith("its launcher has died: saving")
            # A signal that follows does not mean "at once".
            os.kill(child, signal.SIGTERM)
            assert read_stderr(process).startswith("SIGTERM: saving")
            write_stdin(process, "x")
            assert read_stdout(process) == "read 1 requested SIGTERM"
        else:
            assert read_stderr(process).startswith("its launcher has died: stopping at once")
        assert wait_until(lambda: not is_alive(child))


RUNNER = """
    import os, subprocess, sys
    launcher = subprocess.Popen([sys.executable, "-c", sys.argv[2], "deepspeed.launcher.launch", sys.argv[3]])
    print(launcher.pid, flush=True)
    launcher.wait()
"""


def test_a_rank_stops_when_the_parent_of_its_launcher_dies():
    rank = textwrap.dedent(waiting("find_launchers()"))
    with script(RUNNER, "/bin/deepspeed", textwrap.dedent(LAUNCHER), rank) as process:
        lines = {read_stdout(process), read_stdout(process), read_stdout(process)}
        launcher, child = sorted(int(line) for line in lines - {"ready"})
        process.terminate()
        process.wait()
        assert read_stderr(process).startswith("its launcher has died: saving")
        assert is_alive(launcher)  # it waits for the rank
        write_stdin(process, "x")
        assert read_stdout(process) == "read 1 requested its launcher has died"
        assert wait_until(lambda: not is_alive(child) and not is_alive(launcher))


def test_a_parent_that_is_not_a_launcher_may_end():
    assert find_launchers() == ()
    rank = textwrap.dedent(waiting("find_launchers()"))
    with script(LAUNCHER, "other", rank) as process:
        child = launch(process)
        process.kill()
        process.wait()
        time.sleep(1.3)  # longer than LAUNCHER_POLL_S
        assert is_alive(child)
        write_stdin(process, "x")
        assert read_stdout(process) == "read 1 requested"


def test_the_parent_of_a_process_is_found_whatever_its_name(tmp_path):
    program = tmp_path / ("ä" * 10)  # the kernel keeps 15 bytes: seven characters and half of the eighth
    shutil.copy(shutil.which("sleep"), program)
    with subprocess.Popen([program, "30"]) as process:
        try:
            assert signals._parent(process.pid) == os.getpid()
            assert not watchdog._is_suspended(process.pid)
        finally:
            process.kill()


def test_a_signal_to_a_forked_child_does_not_reach_the_parent():
    code = """
        import os, signal, time
        from cogds.process.signals import StopRequest
        stop = StopRequest()
        stop.listen()
        stop.defer()
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, lambda *_: os._exit(7))  # shows that the child is still alive
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(60)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), repr(stop.requested), flush=True)
    """
    with script(code) as process:
        assert read_stdout(process) == "7 ''"
        assert process.wait(TIMEOUT_S) == 0


def test_closing_restores_the_handlers():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    StopRequest().close()  # it has not listened
    stop = StopRequest()
    stop.listen()
    stop.defer()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert wait_until(lambda: stop.requested == "SIGUSR1")
    stop.close()
    stop.close()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


LOADER = """
    import sys, time
    from torch.utils.data import DataLoader, Dataset
    from cogds.data.loading.dataset import ignore_stop_signals
    from cogds.process.signals import StopRequest

    class Numbers(Dataset):
        def __len__(self):
            return 10_000
        def __getitem__(self, k):
            if k == 4000:
                time.sleep(600)
            return k

    stop = StopRequest()
    stop.listen()
    stop.defer()
    loader = DataLoader(Numbers(), batch_size=10, num_workers=2, worker_init_fn=ignore_stop_signals)
    batches = iter(loader)
    for number in range(398):
        assert next(batches).tolist() == list(range(10 * number, 10 * number + 10))
        if number in (10, 390):
            print(number, stop.requested, flush=True)
            sys.stdin.readline()
    {end}
"""


def signalled_loader(process: subprocess.Popen[str]) -> list[int]:
    """Send two signals to the process and its workers, and return the workers, which must survive."""
    assert read_stdout(process) == "10"
    workers = children(process.pid)
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT):
        for pid in [*workers, process.pid]:
            os.kill(pid, number)
    assert "SIGTERM: saving" in read_stderr(process)
    write_stdin(process, "\n")
    assert read_stdout(process) == "390 SIGTERM"
    assert children(process.pid) == workers
    write_stdin(process, "\n")
    return workers


@pytest.mark.slow
def test_loader_workers_survive_signals_to_the_tree_and_end_with_their_parent():
    with script(
        LOADER.format(end="print('stuck', flush=True); next(batches); next(batches); next(batches)")
    ) as process:
        workers = signalled_loader(process)
        assert read_stdout(process) == "stuck"  # a worker hangs while it reads
        process.kill()
        process.wait()
        assert wait_until(lambda: not any(map(is_alive, workers)))


@pytest.mark.slow
def test_an_error_ends_the_process_although_its_loader_is_alive():
    """The traceback keeps the loader, so multiprocessing terminates the workers and waits for them without a limit."""
    with script(LOADER.format(end="raise KeyError('planted')")) as process:
        workers = signalled_loader(process)
        assert process.wait(TIMEOUT_S) == 1
        assert not any(map(is_alive, workers))
