"""Ranks without the 8 seconds of imports: forked from a process that has done them, each a process group of its own.

    server = Server(); server.run("launch/train.py", ["train.num_steps=2"], ranks=2, timeout_s=240)

A rank runs the script as `python SCRIPT ...` would, with the variables that DeepSpeed's launcher sets: real processes,
process groups and ZeRO, without a launcher. Tests of launchers, signals and first imports start their own.
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
    """The process that has imported everything. `close` ends it; so does the end of ours."""

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
        """Exit codes of the ranks, once all have ended; None for those of a run that outlived its time.

        A rank that fails ends the others, as a launcher does. kill_after_s: when all are killed, whatever they do.
        """
        job = {
            "script": str(script),
            "arguments": [str(one) for one in arguments],
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


def become(job, rank):
    """In a forked process: the rank's surroundings."""
    os.setsid()
    os.chdir(job["cwd"])
    log = os.open(job["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, nothing), (1, log), (2, log)):
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
        with contextlib.suppress(ProcessLookupError):  # not in a group of its own yet
            os.killpg(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)


def wait(job, pids):
    """Exit codes by rank."""
    start, codes, killed = time.monotonic(), {}, False
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            continue
        elapsed, left = time.monotonic() - start, [one for one in pids if one not in codes]
        if elapsed > job["timeout_s"]:
            kill(left)
            for one in left:
                os.waitpid(one, 0)
            return [None] * len(pids)
        failed = any(codes.values())
        if not killed and (failed or (job["kill_after_s"] is not None and elapsed > job["kill_after_s"])):
            time.sleep(2 if failed else 0)  # what the others have to say
            kill(left)
            killed = True
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def serve():
    """Jobs from stdin, a JSON object a line; the ranks' exit codes to stdout. In a rank: returns the script to run."""
    for line in sys.stdin:
        job, pids = json.loads(line), []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                become(job, rank)
                return job["script"]
            pids.append(pid)
        print(json.dumps(wait(job, pids)), flush=True)
    return None


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print while they are imported is no answer
    sys.path[0] = str(ROOT)
    from cogds.cli import gc_disabled

    with gc_disabled():
        import deepspeed  # noqa: F401

        import cogds.encode.main
        import cogds.train.main  # noqa: F401

    sys.stdout = answers
    if script := serve():
        sys.path[0] = str(Path(script).parent)
        try:
            runpy.run_path(script, run_name="__main__")
        except Exception:
            traceback.print_exc()
            sys.exit(1)
