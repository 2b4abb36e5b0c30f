"""Ranks that start without the 8 seconds of imports: they are forked from a process that has already imported all.

A rank runs the script as `python SCRIPT ...` would, with the variables that DeepSpeed's launcher sets. Ranks are real
processes, each in its own process group. Tests of launchers, signals and imports start their own processes.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """The process that has imported everything. It ends with `close`, or with this process."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, words, ranks, timeout_s, port, output, *, cwd=ROOT, env=None, kill_after_s=None):
        """Run the ranks and return their exit codes, or a list of None if they exceed the time limit.

        If a rank fails, the others are killed, as a launcher does. words: script and arguments. output: file for the
        output. kill_after_s: time after which all ranks are killed.
        """
        job = {
            "words": list(map(str, words)), "ranks": ranks, "timeout_s": timeout_s, "port": port, "cwd": str(cwd),
            "output": str(output), "env": env or {}, "kill_after_s": kill_after_s,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def become_rank(job, rank):
    """Set up this forked process as a rank."""
    os.setsid()
    os.chdir(job["cwd"])
    log = os.open(job["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(
        job["env"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_SIZE=str(job["ranks"]),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]),
    )  # fmt: skip
    sys.argv = job["words"]


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has no process group yet
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)


def wait(job, pids):
    """Return the exit codes in rank order."""
    start, codes, killed = time.monotonic(), {}, False
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            continue
        elapsed, left = time.monotonic() - start, [pid for pid in pids if pid not in codes]
        if elapsed > job["timeout_s"]:
            kill(left)
            for pid in left:
                os.waitpid(pid, 0)
            return [None] * len(pids)
        failed = any(codes.values())
        if not killed and (failed or (job["kill_after_s"] is not None and elapsed > job["kill_after_s"])):
            time.sleep(2 if failed else 0)  # for the output of the others
            kill(left)
            killed = True
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def serve():
    """Read jobs from stdin and write exit codes to stdout, as JSON lines. In a rank, return the script to run."""
    for line in sys.stdin:
        job, pids = json.loads(line), []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                become_rank(job, rank)
                return job["words"][0]
            pids.append(pid)
        print(json.dumps(wait(job, pids)), flush=True)
    return None


if __name__ == "__main__":
    stdout, sys.stdout = sys.stdout, sys.stderr  # libraries may print while they are imported
    sys.path[0] = str(ROOT)
    from cogds.cli import gc_disabled

    with gc_disabled():
        import deepspeed  # noqa: F401

        import cogds.encode.main
        import cogds.train.main  # noqa: F401

    sys.stdout = stdout
    if script := serve():
        sys.path[0] = str(Path(script).parent)
        try:
            runpy.run_path(script, run_name="__main__")
        except Exception:
            traceback.print_exc()
            sys.exit(1)
