"""Ranks that start without the 8 seconds of imports, because they are forked from a process that has imported all.

    Server().run("launch/train.py", ["train.num_steps=2"], ranks=2, timeout_s=240, ...)

A rank runs the script as `python SCRIPT ...` would, with the variables that DeepSpeed's launcher sets. Processes,
process groups and ZeRO are real; only the launcher is missing. Tests of launchers, signals and imports cannot use it.
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
    """The process that has imported everything. It ends with `close`, or when this process ends."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, script, arguments, ranks, timeout_s, port, cwd, output, env=None, kill_after_s=None):
        """Run the ranks and return their exit codes, or None for each if they take longer than timeout_s.

        If a rank fails, the others are killed, as by a launcher. After kill_after_s, all are killed in any case.
        """
        job = {
            "script": str(script),
            "arguments": [str(argument) for argument in arguments],
            "ranks": ranks,
            "timeout_s": timeout_s,
            "port": port,
            "cwd": str(cwd),
            "output": str(output),
            "env": env or {},
            "kill_after_s": kill_after_s,
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def set_up_rank(job, rank):
    """Give a forked process the session, folder, streams, environment and arguments of a rank."""
    os.setsid()
    os.chdir(job["cwd"])
    log = os.open(job["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(
        job["env"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_SIZE=str(job["ranks"]),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]),
    )  # fmt: skip
    sys.argv = [job["script"], *job["arguments"]]


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has no process group yet
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)


def wait(job, pids):
    """Wait for the ranks and return their exit codes, in rank order."""
    start, codes, is_killed = time.monotonic(), {}, False
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            continue
        elapsed_s, running = time.monotonic() - start, [pid for pid in pids if pid not in codes]
        if elapsed_s > job["timeout_s"]:
            kill(running)
            for pid in running:
                os.waitpid(pid, 0)
            return [None] * len(pids)
        has_failed = any(codes.values())
        if not is_killed and (has_failed or (job["kill_after_s"] is not None and elapsed_s > job["kill_after_s"])):
            time.sleep(2 if has_failed else 0)  # the other ranks may print messages too
            kill(running)
            is_killed = True
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def serve():
    """Read jobs from stdin, one JSON object per line, and print exit codes. In a rank, return the script to run."""
    for line in sys.stdin:
        job, pids = json.loads(line), []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                set_up_rank(job, rank)
                return job["script"]
            pids.append(pid)
        print(json.dumps(wait(job, pids)), flush=True)
    return None


if __name__ == "__main__":
    results, sys.stdout = sys.stdout, sys.stderr  # stdout is for exit codes, and libraries print during their import
    sys.path[0] = str(ROOT)
    from cogds.cli import gc_disabled

    with gc_disabled():
        import deepspeed  # noqa: F401

        import cogds.encode.main
        import cogds.train.main  # noqa: F401

    sys.stdout = results
    if script := serve():
        sys.path[0] = str(Path(script).parent)
        try:
            runpy.run_path(script, run_name="__main__")
        except Exception:
            traceback.print_exc()
            sys.exit(1)
