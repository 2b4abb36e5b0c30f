"""Processes that hang in different ways, and processes that only seem to."""

import os
import signal
import time
from pathlib import Path

import pytest

from cogds.errors import EXIT_HUNG
from cogds.process.watchdog import Watchdog, running_time
from tests.process.processes import BOUND_S, children, line, script, state, until

HUNG = """
    import ctypes, sys, time
    from pathlib import Path
    from cogds.process import watchdog as module
    from cogds.process.watchdog import Watchdog
    module.DESCRIBE_TIMEOUT_S = 0.5
    watchdog = Watchdog(3, {limit_s}, Path(sys.argv[1]))
    def stuck_here():
        {stuck}
    def name():
        {name}
    watchdog.watch(lambda: "step 6")
    watchdog.watch(name)
    print("ready", flush=True)
    stuck_here()
"""


def hung(stuck: str, name: str = "return 'step 7, bucket 9x64x64'", limit_s: float = 0.5) -> str:
    return HUNG.format(stuck=stuck, name=name, limit_s=limit_s)


@pytest.mark.parametrize("stuck", ["time.sleep(600)", "ctypes.CDLL(None).read(0, ctypes.create_string_buffer(9), 1)"])
def test_a_hung_process_reports_where_and_ends(tmp_path: Path, stuck: str) -> None:
    with script(hung(stuck), str(tmp_path / "run")) as process:
        assert process.wait(BOUND_S) == EXIT_HUNG == 76
        assert process.stderr is not None
        said = process.stderr.read()
    written = (tmp_path / "run/hung-rank-3.txt").read_text()
    for text in (said, written):
        assert text.startswith("rank 3 (")
        assert ": step 7, bucket 9x64x64, for " in text
        assert "train.step_timeout_s is 0.5" in text
        assert "in stuck_here" in text
        assert "(most recent call first)" in text


@pytest.mark.parametrize("name", ["raise KeyError('name')", "time.sleep(600)"])
def test_an_activity_that_cannot_be_described_does_not_keep_the_process(tmp_path: Path, name: str) -> None:
    with script(hung("time.sleep(600)", name), str(tmp_path)) as process:
        assert process.wait(BOUND_S) == EXIT_HUNG
        assert process.stderr is not None
        assert "in stuck_here" in process.stderr.read()


def test_a_folder_that_cannot_be_written_does_not_keep_the_process(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with script(hung("time.sleep(600)"), str(tmp_path / "file/run")) as process:
        assert process.wait(BOUND_S) == EXIT_HUNG
        assert process.stderr is not None
        assert "in stuck_here" in process.stderr.read()


@pytest.mark.slow
def test_a_process_that_holds_the_gil_is_killed_by_the_guard(tmp_path: Path) -> None:
    with script(hung("ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(9), 1)"), str(tmp_path)) as process:
        assert process.wait(BOUND_S) == -signal.SIGKILL
        assert process.stderr is not None
        said = process.stderr.read()
    assert "rank 3 (" in said
    assert "in stuck_here" in said


def test_progress_rest_and_close_keep_a_process_alive(tmp_path: Path) -> None:
    code = """
        import ctypes, sys, time
        from pathlib import Path
        from cogds.process.watchdog import Watchdog
        watchdog = Watchdog(0, 1.0, Path(sys.argv[1]))
        for step in range(26):
            watchdog.watch(lambda: "a step")
            time.sleep(0.05)
        watchdog.rest()
        time.sleep(1.3)
        watchdog.close()
        watchdog.close()
        print("done", flush=True)
    """
    with script(code, str(tmp_path)) as process:
        assert line(process) == "done"
        assert process.wait(BOUND_S) == 0
        assert not list(tmp_path.iterdir())


def test_time_in_which_the_process_does_not_run_does_not_count() -> None:
    assert running_time(5.1, 5.0) == 5.1
    assert running_time(3600.0, 5.0) == 10.0


@pytest.mark.slow
@pytest.mark.parametrize("guard_too", [False, True])
def test_a_suspended_process_continues_and_is_watched_again(tmp_path: Path, guard_too: bool) -> None:
    """SLURM suspends the whole process tree; `kill -STOP` suspends only the process."""
    with script(hung("time.sleep(600)", limit_s=2.0), str(tmp_path)) as process:
        assert line(process) == "ready"
        guards = children(process.pid)
        assert len(guards) == 1
        time.sleep(0.8)  # the clock has started
        pids = [process.pid, *(guards if guard_too else [])]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(12.0)  # longer than both would ever wait
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.7)
        assert process.poll() is None
        assert state(guards[0]) != "Z"
        assert process.wait(BOUND_S) == EXIT_HUNG


def test_the_guard_ends_with_a_killed_process(tmp_path: Path) -> None:
    code = hung("import os\n        os.fork()\n        time.sleep(600)", limit_s=600)
    with script(code, str(tmp_path)) as process:
        assert line(process) == "ready"
        assert until(lambda: len(children(process.pid)) == 2)
        guard, fork = children(process.pid)  # which holds the other end of its pipe open
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(guard, number)
        time.sleep(0.2)
        assert "Z" not in [state(pid) for pid in (guard, fork)]
        process.kill()
        process.wait()
        assert until(lambda: state(guard) == "Z")
        assert state(fork) != "Z"


def test_watch_makes_no_system_call_between_two_activities(tmp_path: Path) -> None:
    """Counted in calls instead of time."""
    watchdog = Watchdog(0, 600.0, tmp_path)
    signs: list[bytes] = []
    watchdog._send_heartbeat = signs.append  # type: ignore[method-assign]
    for _ in range(1000):
        watchdog.watch(str)
    assert signs == [b"w"]
    watchdog.rest()
    assert signs == [b"w", b"r"]
    watchdog.close()
