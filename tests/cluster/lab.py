"""A cluster of two nodes, n1 and n2, in which tests run commands. Started by two_nodes.sh.

The cluster ends with its `Lab`, or with the process that created it, however that process ends: it lives as long as a
pipe is open.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.conftest import ROOT

SCRIPT = ROOT / "tests/cluster/two_nodes.sh"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")


class Lab:
    """Two nodes. `with Lab() as lab: lab.run("srun", "-N2", "hostname")`.

    grace_s: time between SIGTERM and the end of a job that a job of the partition `high` preempts.
    kill_wait_s: time between SIGTERM and SIGKILL of a job that is cancelled or reaches its time limit.
    """

    nodes = ("n1", "n2")

    def __init__(self, grace_s: int = 10, kill_wait_s: int = 10) -> None:
        self._settings = {"LAB_GRACE_S": str(grace_s), "LAB_KILL_WAIT_S": str(kill_wait_s)}

    def __enter__(self) -> "Lab":
        # Not in pytest's folders: munged needs a folder that all users may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
        words = ["bash", SCRIPT, "-d", self.folder, "sh", "-c", "echo up; exec cat"]
        self._cluster = subprocess.Popen(
            words, cwd=ROOT, env={**os.environ, **self._settings}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if self._cluster.stdout.readline() != b"up\n":
            self._cluster.kill()
            logs = [f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("log/*"))]
            raise RuntimeError("the cluster did not come up\n" + "\n".join(logs))
        pid = self._cluster.pid  # unshare; its only child is the first process of the cluster
        self._first = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.stdin.close()
        self._cluster.stdout.close()
        try:
            self._cluster.wait(10)
        except subprocess.TimeoutExpired:
            self._cluster.kill()
            self._cluster.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, *words: object, node: str | None = None, cwd: Path = ROOT, env: dict[str, str] | None = None,
              output: Path | None = None) -> subprocess.Popen:  # fmt: skip
        """Start a command on the head or on a node. stdout and stderr go to `output`, or both to a pipe."""
        enter = ["nsenter", "--target", self._first, "--mount", "--uts", "--net", "--pid", f"--wd={cwd}", "--"]
        if node:
            pid = (self.folder / f"{node}.pid").read_text().strip()
            enter += ["nsenter", "--target", pid, "--uts", "--net", "--"]
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **(env or {})}
        sink = output.open("ab") if output else None
        try:
            return subprocess.Popen(
                [*enter, *map(str, words)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink or subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                # A background process ignores SIGINT, and a shell that inherits this cannot trap it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        finally:
            if sink:
                sink.close()

    def run(self, *words: object, timeout_s: float = 60, **options: object) -> subprocess.CompletedProcess:
        """Run a command: `.returncode`, `.stdout` (with stderr). After timeout_s, kill it and raise TimeoutError."""
        process = self.start(*words, **options)
        try:
            text, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            raise TimeoutError(f"{words} took longer than {timeout_s} s:\n{text[-4000:]}") from None
        return subprocess.CompletedProcess(words, process.returncode, text)

    def on(self, node: str, *words: object, **options: object) -> subprocess.CompletedProcess:
        """Run a command on a node."""
        return self.run(*words, node=node, **options)

    def cut(self, node: str) -> None:
        """Cut the network link of a node. Its processes keep running."""
        self._link(node, "down")

    def restore(self, node: str) -> None:
        """Restore the network link of a node."""
        self._link(node, "up")

    def _link(self, node: str, state: str) -> None:
        self.run("ip", "link", "set", f"v{self.nodes.index(node) + 1}", state)

    def processes(self, pattern: str, node: str | None = None) -> list[int]:
        """Return the pids, inside the lab, of processes whose command lines match; of one node or of all."""
        words = ["pgrep", "-f"]
        if node:
            words += ["--ns", (self.folder / f"{node}.pid").read_text().strip(), "--nslist", "net"]
        return [int(pid) for pid in self.run(*words, "--", pattern).stdout.split()]

    def kill(self, pids: list[int], signal_name: str = "KILL") -> None:
        """Send a signal to processes. pids: from `processes`."""
        if pids:
            self.run("kill", f"-{signal_name}", *pids)

    def sbatch(self, *words: object, **options: object) -> str:
        """Submit a job and return its id."""
        done = self.run("sbatch", "--parsable", *words, **options)
        if done.returncode:
            raise RuntimeError(f"sbatch {words}: {done.stdout}")
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """Return SLURM's fields of a job or of one task of an array (`12_3`): JobState, Restarts, ExitCode, ..."""
        text = self.run("scontrol", "show", "job", "-o", job).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, job: str) -> str:
        """Return the state of a job: PENDING, RUNNING, COMPLETING, COMPLETED, ..."""
        return self.show(job).get("JobState", "UNKNOWN")

    def wait(self, job: str, states: str | tuple[str, ...] = ENDED, timeout_s: float = 60) -> str:
        """Wait until the job is in one of these states and return it. Raises TimeoutError after timeout_s."""
        wanted = (states,) if isinstance(states, str) else states
        wait_until(lambda: self.state(job) in wanted, timeout_s, lambda: f"job {job} is {self.show(job)}, not {wanted}")
        return self.state(job)


def wait_until(condition, timeout_s: float, describe=lambda: "condition") -> None:
    """Wait until condition() is true. After timeout_s, raise TimeoutError with the text of describe()."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s} s: {describe()}")
        time.sleep(0.1)
