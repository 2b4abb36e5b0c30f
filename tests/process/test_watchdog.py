"""The watchdog on processes that hang, and on processes that do not."""

import os
import signal
import time

import pytest

from cogds.errors import EXIT_HUNG
from cogds.process.watchdog import Watchdog, running_time
from tests.process.processes import TIMEOUT_S, children, is_alive, read_stdout, script, wait_until

HUNG = """
    import ctypes, sys, time
    from pathlib import Path
    from cogds.process import watchdog as module
    from cogds.process.watchdog import Watchdog
    module.DESCRIBE_TIMEOUT_S = 0.5
    watchdog = Watchdog(3, {limit_s}, Path(sys.argv[1]))
    def hang_here():
        {hang}
    def describe():
        {describe}
    watchdog.watch(lambda: "step 6")
    watchdog.watch(describe)
    print("ready", flush=True)
    hang_here()
"""
SLEEP = "time.sleep(600)"
READ_IN_C = "read(0, ctypes.create_string_buffer(9), 1)"


def hung(hang: str = SLEEP, describe: str = "return 'step 7, bucket 9x64x64'", limit_s: float = 0.5) -> str:
    return HUNG.format(hang=hang, describe=describe, limit_s=limit_s)


@pytest.mark.parametrize("hang", [SLEEP, f"ctypes.CDLL(None).{READ_IN_C}"])
def test_a_hung_process_reports_where_it_hangs_and_ends(tmp_path, hang):
    with script(hung(hang), str(tmp_path / "run")) as process:
        assert process.wait(TIMEOUT_S) == EXIT_HUNG == 76
        stderr = process.stderr.read()
    for text in (stderr, (tmp_path / "run/hung-rank-3.txt").read_text()):
        assert text.startswith("rank 3 (")
        assert ": step 7, bucket 9x64x64, for " in text
        assert "train.step_timeout_s is 0.5" in text
        assert "in hang_here" in text
        assert "(most recent call first)" in text


@pytest.mark.parametrize(
    "describe, folder", [("raise KeyError('step')", "run"), (SLEEP, "run"), ("return 'step 7'", "file/run")]
)
def test_a_hung_process_ends_even_if_the_report_fails(tmp_path, describe, folder):
    """The activity cannot be described, or the folder cannot be written."""
    (tmp_path / "file").touch()
    with script(hung(describe=describe), str(tmp_path / folder)) as process:
        assert process.wait(TIMEOUT_S) == EXIT_HUNG
        assert "in hang_here" in process.stderr.read()


@pytest.mark.slow
def test_a_process_that_holds_the_gil_is_killed_by_the_guard(tmp_path):
    with script(hung(f"ctypes.PyDLL(None).{READ_IN_C}"), str(tmp_path)) as process:
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
        stderr = process.stderr.read()
    assert "rank 3 (" in stderr
    assert "in hang_here" in stderr


def test_a_process_that_makes_progress_rests_or_closes_is_not_ended(tmp_path):
    code = """
        import ctypes, sys, time
        from pathlib import Path
        from cogds.process.watchdog import Watchdog
        watchdog = Watchdog(0, 0.6, Path(sys.argv[1]))
        for step in range(16):
            watchdog.watch(lambda: "a step")
            time.sleep(0.05)
        watchdog.rest()
        time.sleep(0.8)
        watchdog.close()
        watchdog.close()
        print("done", flush=True)
    """
    with script(code, str(tmp_path)) as process:
        assert read_stdout(process) == "done"
        assert process.wait(TIMEOUT_S) == 0
        assert not list(tmp_path.iterdir())


def test_time_in_which_the_process_does_not_run_does_not_count():
    assert running_time(5.1, 5.0) == 5.1
    assert running_time(3600.0, 5.0) == 10.0


@pytest.mark.slow
@pytest.mark.parametrize("guard_too", [False, True])
def test_a_suspended_process_continues_and_is_watched_again(tmp_path, guard_too):
    """SLURM suspends the whole process tree; `kill -STOP` suspends only the process."""
    with script(hung(limit_s=2.0), str(tmp_path)) as process:
        assert read_stdout(process) == "ready"
        guards = children(process.pid)
        assert len(guards) == 1
        time.sleep(0.8)  # let the clock start
        pids = [process.pid, *(guards if guard_too else [])]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(12.0)  # longer than the limits of both
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.7)
        assert process.poll() is None
        assert is_alive(guards[0])
        assert process.wait(TIMEOUT_S) == EXIT_HUNG


def test_the_guard_ends_with_a_killed_process(tmp_path):
    code = hung("import os\n        os.fork()\n        time.sleep(600)", limit_s=600)
    with script(code, str(tmp_path)) as process:
        assert read_stdout(process) == "ready"
        assert wait_until(lambda: len(children(process.pid)) == 2)
        guard, fork = children(process.pid)  # the fork keeps the other end of the guard's socket open
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(guard, number)
        time.sleep(0.2)
        assert is_alive(guard)
        process.kill()
        process.wait()
        assert wait_until(lambda: not is_alive(guard))
        assert is_alive(fork)


def test_watch_makes_no_system_call_between_two_activities(tmp_path):
    watchdog = Watchdog(0, 600.0, tmp_path)
    heartbeats: list[bytes] = []
    watchdog._send_heartbeat = heartbeats.append
    for _ in range(1000):
        watchdog.watch(str)
    assert heartbeats == [b"w"]
    watchdog.rest()
    assert heartbeats == [b"w", b"r"]
    watchdog.close()
