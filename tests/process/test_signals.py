"""Real processes and real signals: what matters here happens between the kernel, C and threads."""

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
    interrupt = StopRequest({launcher})
    interrupt.listen()
    {defer}
    print("ready", flush=True)
    got = ctypes.CDLL(None).read(0, ctypes.create_string_buffer(9), 1)
    print(f"read {{got}} requested {{interrupt.requested}}", flush=True)
"""


def waiting(launcher: str = "()", defer: str = "interrupt.defer()", same_request_s: float = SAME_REQUEST_S) -> str:
    return WAIT_IN_C.format(launcher=launcher, defer=defer, same_request_s=same_request_s)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_is_heard_while_the_main_thread_waits_in_c(number: signal.Signals) -> None:
    with script(waiting()) as process:
        assert line(process) == "ready"
        process.send_signal(number)
        # Said while the call still waits, which is not broken off.
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

    late, interrupt = Late(), StopRequest()
    interrupt.listen()
    interrupt.defer()
    print("ready", flush=True)
    while not interrupt.requested:
        time.sleep(0.01)
    interrupt.ignore()
    sys.exit(75)
"""


def test_a_late_signal_does_not_change_how_it_ends() -> None:
    with script(LATE) as process:
        assert line(process) == "ready"
        process.send_signal(signal.SIGUSR1)
        assert line(process) == "ending"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(BOUND_S) == 75


def test_before_there_is_anything_to_save_the_first_one_ends_the_process() -> None:
    with script(waiting(defer="print('unflushed')")) as process:
        assert line(process) == "unflushed"
        assert line(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND_S) == 75
        assert heard(process).startswith("SIGTERM: stopping at once")


def test_two_in_a_row_are_one_and_a_later_one_ends_the_process() -> None:
    with script(waiting()) as process:
        assert line(process) == "ready"
        process.send_signal(signal.SIGINT)
        assert "SIGINT: saving" in heard(process)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        time.sleep(SAME_REQUEST_S + 0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND_S) == 75
        assert heard(process) == "SIGTERM again: stopping at once"


def test_the_end_of_the_time_limit_after_its_warning_does_not_end_a_save() -> None:
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


@pytest.mark.parametrize("defer", ["interrupt.defer()", ""])
def test_a_rank_whose_launcher_is_killed_is_not_left_behind(defer: str) -> None:
    rank = textwrap.dedent(waiting("find_launchers()", defer, same_request_s=0))
    with script(LAUNCHER, "/bin/torchrun", rank) as process:
        child = launch(process)
        process.kill()
        process.wait()
        assert state(child) != "Z"
        if defer:
            assert heard(process).startswith("its launcher has died: saving")
            # Whoever cleans up then is not impatient.
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


def test_a_rank_hears_the_death_of_what_started_its_launcher() -> None:
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


def test_a_parent_that_is_no_launcher_may_go() -> None:
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


def test_what_a_forked_child_hears_is_not_its_parents() -> None:
    code = """
        import os, signal, time
        from cogds.process.signals import StopRequest
        interrupt = StopRequest()
        interrupt.listen()
        interrupt.defer()
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, lambda *_: os._exit(7))  # is heard: the child lives
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(60)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), repr(interrupt.requested), flush=True)
    """
    with script(code) as process:
        assert line(process) == "7 ''"
        assert process.wait(BOUND_S) == 0


def test_closing_gives_the_signals_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    interrupt = StopRequest()
    interrupt.close()
    interrupt = StopRequest()
    interrupt.listen()
    interrupt.defer()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert until(lambda: interrupt.requested == "SIGUSR1")
    interrupt.close()
    interrupt.close()
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

    interrupt = StopRequest()
    interrupt.listen()
    interrupt.defer()
    loader = DataLoader(Numbers(), batch_size=10, num_workers=2, worker_init_fn=ignore_stop_signals)
    batches = iter(loader)
    for number in range(398):
        assert next(batches).tolist() == list(range(10 * number, 10 * number + 10))
        if number in (10, 390):
            print(number, interrupt.requested, flush=True)
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


def test_a_loader_goes_on_though_its_whole_tree_is_signalled_and_dies_with_its_parent() -> None:
    with script(
        LOADER.format(end="print('stuck', flush=True); next(batches); next(batches); next(batches)")
    ) as process:
        workers = signalled_loader(process)
        assert line(process) == "stuck"  # a worker reads and does not come back
        process.kill()
        process.wait()
        assert until(lambda: [state(pid) for pid in workers] == ["Z", "Z"])


def test_an_error_with_a_loader_alive_ends_the_process() -> None:
    """The traceback keeps the loader: multiprocessing terminates the workers and waits for them without a bound."""
    with script(LOADER.format(end="raise KeyError('planted')")) as process:
        workers = signalled_loader(process)
        assert process.wait(BOUND_S) == 1
        assert [state(pid) for pid in workers] == ["Z", "Z"]
