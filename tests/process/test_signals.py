"""Real processes and signals, because the behavior depends on the kernel, C code and threads."""

import os
import signal
import subprocess
import textwrap
import time

import pytest

from cogds.process.signals import SAME_REQUEST_S, StopRequest, find_launchers
from tests.process.processes import BOUND_S, children, heard, line, script, state, until

# The main thread sits in C, without the interpreter's lock, on a pipe that the test holds the other end of.
WAIT_IN_C = """
    import ctypes
    from cogds.process import signals as module
    from cogds.process.signals import StopRequest, find_launchers
    module.SAME_REQUEST_S = {same_request_s}
    stop = StopRequest({launcher})
    stop.listen()
    {defer}
    print("ready", flush=True)
    got = ctypes.CDLL(None).read(0, ctypes.create_string_buffer(9), 1)
    print(f"read {{got}} requested {{stop.requested}}", flush=True)
"""


def waiting(launcher: str = "()", defer: str = "stop.defer()", same_request_s: float = SAME_REQUEST_S) -> str:
    return WAIT_IN_C.format(launcher=launcher, defer=defer, same_request_s=same_request_s)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_handled_while_the_main_thread_waits_in_c(number: signal.Signals) -> None:
    with script(waiting()) as process:
        assert line(process) == "ready"
        process.send_signal(number)
        # Reported while the call still waits; the signal does not end the call.
        assert heard(process).startswith(f"{number.name}: saving")
        assert process.poll() is None
        assert process.communicate("x", timeout=BOUND_S) == (f"read 1 requested {number.name}\n", "")
        assert process.returncode == 0


LATE = """
    import os, sys, time
    from cogds.process.signals import StopRequest

    class Late:
        def __del__(self, write=os.write, sleep=time.sleep):
            write(1, b"ending\\n")  # Python has given its handlers up by now
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


def test_a_late_signal_does_not_change_the_exit_code() -> None:
    with script(LATE) as process:
        assert line(process) == "ready"
        process.send_signal(signal.SIGUSR1)
        assert line(process) == "ending"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(BOUND_S) == 75


def test_until_defer_the_first_signal_ends_the_process() -> None:
    with script(waiting(defer="print('unflushed')")) as process:
        assert line(process) == "unflushed"
        assert line(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND_S) == 75
        assert heard(process).startswith("SIGTERM: stopping at once")


def test_two_signals_in_a_row_are_one_request_and_a_later_one_ends_the_process() -> None:
    with script(waiting(same_request_s=1.0)) as process:
        assert line(process) == "ready"
        process.send_signal(signal.SIGINT)
        assert "SIGINT: saving" in heard(process)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND_S) == 75
        assert heard(process) == "SIGTERM again: stopping at once"


def test_a_signal_after_an_advance_warning_does_not_end_a_save() -> None:
    with script(waiting(same_request_s=0)) as process:
        assert line(process) == "ready"
        process.send_signal(signal.SIGUSR1)
        assert "SIGUSR1: saving" in heard(process)
        process.send_signal(signal.SIGTERM)
        assert "SIGTERM: saving" in heard(process)
        assert process.communicate("x", timeout=BOUND_S)[0] == "read 1 requested SIGTERM\n"


# Its one child is the process of the test, on the same pipes; the name stands where a launcher's module would.
LAUNCHER = """
    import subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", sys.argv[2]])
    print(child.pid, flush=True)
    child.wait()
"""


def launch(process: subprocess.Popen[str]) -> int:
    """The launcher's child, once it is ready."""
    said = {line(process), line(process)}
    assert "ready" in said
    return int((said - {"ready"}).pop())


@pytest.mark.parametrize("defer", ["stop.defer()", ""])
def test_a_rank_stops_when_its_launcher_is_killed(defer: str) -> None:
    rank = textwrap.dedent(waiting("find_launchers()", defer, same_request_s=0))
    with script(LAUNCHER, "/bin/torchrun", rank) as process:
        child = launch(process)
        process.kill()
        process.wait()
        assert state(child) != "Z"
        if defer:
            assert heard(process).startswith("its launcher has died: saving")
            # A signal that cleans up afterwards does not mean "at once".
            os.kill(child, signal.SIGTERM)
            assert heard(process).startswith("SIGTERM: saving")
            assert process.stdin is not None
            process.stdin.write("x")
            process.stdin.flush()
            assert line(process) == "read 1 requested SIGTERM"
        else:
            assert heard(process).startswith("its launcher has died: stopping at once")
        assert until(lambda: state(child) == "Z")


RUNNER = """
    import os, subprocess, sys
    launcher = subprocess.Popen([sys.executable, "-c", sys.argv[2], "deepspeed.launcher.launch", sys.argv[3]])
    print(launcher.pid, flush=True)
    launcher.wait()
"""


def test_a_rank_stops_when_the_parent_of_its_launcher_dies() -> None:
    rank = textwrap.dedent(waiting("find_launchers()"))
    with script(RUNNER, "/bin/deepspeed", textwrap.dedent(LAUNCHER), rank) as process:
        said = {line(process), line(process), line(process)}
        launcher, child = sorted(int(one) for one in said - {"ready"})
        process.terminate()
        process.wait()
        assert heard(process).startswith("its launcher has died: saving")
        assert state(launcher) != "Z"  # it waits for the rank
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.flush()
        assert line(process) == "read 1 requested its launcher has died"
        assert until(lambda: state(child) == "Z" and state(launcher) == "Z")


def test_a_parent_that_is_not_a_launcher_may_end() -> None:
    assert find_launchers() == ()
    rank = textwrap.dedent(waiting("find_launchers()"))
    with script(LAUNCHER, "other", rank) as process:
        child = launch(process)
        process.kill()
        process.wait()
        time.sleep(2.0)
        assert state(child) != "Z"
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.flush()
        assert line(process) == "read 1 requested"


def test_a_signal_to_a_forked_child_does_not_reach_the_parent() -> None:
    code = """
        import os, signal, time
        from cogds.process.signals import StopRequest
        stop = StopRequest()
        stop.listen()
        stop.defer()
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, lambda *_: os._exit(7))  # is heard: the child lives
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(60)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), repr(stop.requested), flush=True)
    """
    with script(code) as process:
        assert line(process) == "7 ''"
        assert process.wait(BOUND_S) == 0


def test_closing_restores_the_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    stop = StopRequest()
    stop.close()
    stop = StopRequest()
    stop.listen()
    stop.defer()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert until(lambda: stop.requested == "SIGUSR1")
    stop.close()
    stop.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
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
    """The workers, all of the tree having got two signals that they should outlive."""
    assert line(process) == "10"
    workers = children(process.pid)
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT):
        for pid in [*workers, process.pid]:
            os.kill(pid, number)
    assert "SIGTERM: saving" in heard(process)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert line(process) == "390 SIGTERM"
    assert children(process.pid) == workers
    process.stdin.write("\n")
    process.stdin.flush()
    return workers


@pytest.mark.slow
def test_loader_workers_survive_signals_to_the_tree_and_end_with_their_parent() -> None:
    with script(
        LOADER.format(end="print('stuck', flush=True); next(batches); next(batches); next(batches)")
    ) as process:
        workers = signalled_loader(process)
        assert line(process) == "stuck"  # a worker reads and does not come back
        process.kill()
        process.wait()
        assert until(lambda: [state(pid) for pid in workers] == ["Z", "Z"])


@pytest.mark.slow
def test_an_error_with_a_living_loader_ends_the_process() -> None:
    """The traceback keeps the loader: multiprocessing terminates the workers and waits for them without a bound."""
    with script(LOADER.format(end="raise KeyError('planted')")) as process:
        workers = signalled_loader(process)
        assert process.wait(BOUND_S) == 1
        assert [state(pid) for pid in workers] == ["Z", "Z"]
