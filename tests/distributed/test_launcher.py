"""DeepSpeed's launcher as a child process: signals reach the ranks, and the exit code is theirs."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

RUNNER = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode % 256)"
LAUNCH = """
import subprocess, sys
code = subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode
sys.exit(code)
"""
# A rank that saves for two seconds after a request, which a terminal's Ctrl-C would not allow.
RANK = """
import signal, sys, time
def save(number, _):
    time.sleep(1)
    print("saved", signal.Signals(number).name, flush=True)
    sys.exit(75)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
print("training", flush=True)
time.sleep(60)
"""
CODE = """
import sys
from cogds.distributed.launcher import LauncherProcess
sys.exit(LauncherProcess(sys.argv[1:]).wait())
"""


@pytest.fixture
def start(tmp_path):
    """`start(rank)`: the process that runs a stand-in for DeepSpeed's launcher, which starts one rank."""
    launch = tmp_path / "deepspeed/launcher/launch.py"
    launch.parent.mkdir(parents=True)
    launch.write_text(LAUNCH)
    with contextlib.ExitStack() as stack:

        def run(rank):
            words = [sys.executable, "-c", CODE, sys.executable, "-c", RUNNER, str(launch), rank]
            process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            stack.callback(process.wait, 30)
            stack.callback(process.kill)
            return process

        yield run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_ranks_save_and_nothing_else_is_printed(start, number):
    before = signal.signal(number, signal.SIG_DFL)  # shells let background jobs, such as these tests, ignore SIGINT
    try:
        process = start(RANK)
    finally:
        signal.signal(number, before)
    assert process.stdout.readline() == "training\n"
    os.killpg(process.pid, number)  # as a terminal does
    output, _ = process.communicate(timeout=30)
    assert (output, process.returncode) == (f"saved {signal.Signals(number).name}\n", 75)


def test_a_hangup_that_nohup_ignores_changes_nothing(start):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the process inherits
    try:
        process = start(RANK)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout.readline() == "training\n"
    os.killpg(process.pid, signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert (output, process.returncode) == ("saved SIGTERM\n", 75)


def test_a_failed_ssh_is_no_signal(start):
    process = start("import sys; sys.exit(255)")
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (255, "")


def test_a_rank_that_is_killed_is_reported(start):
    process = start("import os; os.kill(os.getpid(), 9)")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 247
    assert output.startswith("error: a rank was ended by signal 9 ")


@pytest.mark.parametrize("code", [0, 1, 2, 76])
def test_the_exit_code_is_that_of_the_ranks(start, code):
    process = start(f"import sys; sys.exit({code})")
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (code, "")


def test_the_launcher_ends_with_the_process_that_started_it(start):
    process = start("import os, time; print(os.getppid(), flush=True); time.sleep(60)")
    launch = int(process.stdout.readline())
    with open(f"/proc/{launch}/stat") as file:
        runner = int(file.read().rpartition(")")[2].split()[1])
    process.kill()
    end = time.monotonic() + 20
    while os.path.exists(f"/proc/{runner}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{runner}")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpgid(launch), signal.SIGKILL)
