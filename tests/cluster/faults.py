"""A run on the two nodes of a lab (`LabRun`), and the faults that tests inject into it (`Fault`).

The run has one rank on each node. The reference run, to which it must be equal, has both ranks on n1 and no faults.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cogds.metrics.jsonl import step_lines
from tests.cluster.lab import ENDED, Lab, wait_until
from tests.conftest import ROOT

NUM_STEPS = 1500  # of the reference run, which both tests share
TRAIN_S = 240  # time limit for a start or a few steps on a busy machine
DISK_BYTES = 256 << 20  # size of the run's own disk
RANK = r"^[^ ]+ (-u )?[^ ]*launch/train[.]py"  # also matches the loaders of a rank, which have higher pids
RUN_PROCESSES = r"launch/train[.]py|deepspeed[.]launcher|hostfile[.]sh|cogds[.]process[.]watchdog"
# Suspends a process in the middle of a save, a delay after the save's first file. Arguments: pid, the run's folder, the
# delay [ms]. Exits once the process is suspended with an unfinished save.
STOP_IN_SAVE = """
import glob, os, signal, sys, time
pid, folder, delay_s = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]) / 1000
os.chdir(folder)
saving = lambda: glob.glob("lora/step-*.tmp") + glob.glob("checkpoints/step-*.tmp")
while True:
    if saving():
        time.sleep(delay_s)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1)
        if saving():
            print(*saving(), *glob.glob("checkpoints/step-*.tmp/*"))
            break
        os.kill(pid, signal.SIGCONT)
        delay_s /= 2
"""


def create_inputs(folder: Path) -> list[str]:
    """Create the tiny model and the clips in a folder. Returns the arguments of a run with short steps."""
    from tests.drawn import draw_clips
    from tests.tiny import create_tiny_model

    if not (folder / "model").exists():
        create_tiny_model(folder / "model")
    draw_clips(folder / "clips")
    return [
        "--config", str(ROOT / "launch/configs/cogvideox1.5_i2v_lora.yaml"),
        "--deepspeed", str(ROOT / "ds_configs/zero2.json"),
        f"model.path={folder / 'model'}", f"data.path={folder / 'clips'}", f"data.cache_dir={folder / 'cache'}",
        "data.buckets=[9x64x64, 1x64x64]", "data.num_workers=1", "train.precision=fp32", "lora.rank=4",
        "train.activation_checkpointing=none", "eval.every=null", "train.step_timeout_s=10", "optimizer.lr=1e-3",
    ]  # fmt: skip


Line = tuple[int, float, float]  # step, loss, gradient norm


def read_steps(output_dir: Path) -> list[Line]:
    """Return the steps that a run has logged so far, without a partially written line."""
    try:
        text = (output_dir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in step_lines(text)]


class LabRun:
    """A run on both nodes.

    root: the lab's file system, seen from outside.
    run_dir, output_dir: the run's output folder, as the lab and as the tests see it.
    last_step: the last logged step when the run last ended.
    resumed_at: the step from which it last resumed.
    """

    def __init__(self, lab: Lab, folder: Path, words: list[str]):
        self.lab, self.folder, self.words = lab, folder, words
        self.root = Path(f"/proc/{lab._first}/root")
        self.run_dir = folder / "run"
        self.output_dir = self.root / self.run_dir.relative_to("/")
        self.process: subprocess.Popen[str] | None = None
        self.job = ""
        self.last_step = self.resumed_at = self.num_starts = 0
        folder.mkdir(exist_ok=True)
        self.run_dir.mkdir()
        lab.run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", self.run_dir)
        (folder / "hosts").write_text("n1 slots=1\nn2 slots=1\n")

    # -------------------------------------------------------------------------------------------------------- start

    def start(self, launcher: str, *more: str) -> None:
        """Start the run with the launcher `hostfile` or `sbatch`."""
        env = {"COGDS_PYTHON": sys.executable, "COGDS_DIR": str(ROOT), "COGDS_MAX_RESTARTS": "100"}
        words = [*self.words, *more, f"output_dir={self.run_dir}"]
        if launcher == "hostfile":
            script = [ROOT / "launch/hostfile.sh", self.folder / "hosts"]
            log = self.folder / "hostfile.log"
            self.process = self.lab.start("bash", *script, *words, cwd=self.folder, env=env, output=log)
        else:
            script = ["--nodes=2", "--exclusive", ROOT / "launch/slurm/train.sbatch"]
            self.job = self.lab.sbatch(*script, *words, cwd=self.folder, env=env)

    def log(self) -> str:
        """Return the output of rank 0, and of all ranks with the launcher `hostfile`."""
        logs = [self.folder / "hostfile.log", *sorted(self.folder.glob("logs/*-n1.log"))]
        return "".join(path.read_text(errors="replace") for path in logs if path.exists())

    def await_steps(self, num: int) -> None:
        """Wait until the run has logged this number of steps."""

        def trained() -> bool:
            if self.process and self.process.poll() not in (None, 0):
                raise RuntimeError(f"the run ended with code {self.process.returncode}:\n{self.tail()}")
            if self.job and self.lab.state(self.job) in ENDED[1:]:
                raise RuntimeError(f"the job ended: {self.lab.show(self.job)}\n{self.tail()}")
            return len(read_steps(self.output_dir)) >= num

        wait_until(trained, TRAIN_S, lambda: f"{num} steps, not {len(read_steps(self.output_dir))}\n{self.tail()}")

    def await_resumed(self) -> int:
        """Wait until the run logs from which step it resumes. Returns the step."""
        resumes: list[str] = []

        def has_resumed() -> bool:
            resumes[:] = re.findall(r"resuming from .*step-(\d+)", self.log())
            return len(resumes) > self.num_starts

        wait_until(has_resumed, TRAIN_S, lambda: f"resuming the run\n{self.tail()}")
        self.num_starts, self.resumed_at = len(resumes), int(resumes[-1])
        return self.resumed_at

    def tail(self) -> str:
        """Return the ends of all logs, for error messages."""
        logs = [*self.folder.glob("*.log"), *self.folder.glob("logs/*.log")]
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    # ---------------------------------------------------------------------------------------------------------- end

    def read_outcome(self) -> str:
        """Return the exit code of hostfile.sh or the state of the job, "" while it is running."""
        if self.process:
            code = self.process.poll()
            return "" if code is None else str(code)
        state = self.lab.state(self.job)
        return state if state in (*ENDED, "PENDING") else ""

    def processes(self) -> list[int]:
        """Return the pids of all processes of the run on both nodes."""
        return self.lab.processes(RUN_PROCESSES)

    def await_end(self, within_s: float) -> str:
        """Wait until the run has ended and has no process left. Returns the outcome (`read_outcome`)."""
        outcome = ""

        def has_ended() -> bool:
            nonlocal outcome
            outcome = outcome or self.read_outcome()
            return bool(outcome) and not self.processes()

        def describe() -> str:
            return f"end of the run ({outcome or 'running'}):\n{self.describe_processes()}\n{self.tail()}"

        wait_until(has_ended, within_s, describe)
        self.last_step = len(read_steps(self.output_dir))
        if self.process:
            self.process.wait()
            self.process = None
        if outcome in ENDED:
            self.job = ""
        return outcome

    def describe_processes(self) -> str:
        """Return a table of the run's processes, for error messages."""
        pids = self.processes()
        return self.lab.run("ps", "-o", "pid,ppid,stat,wchan:20,args", *pids).stdout if pids else "no process"

    def checkpoints(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        return sorted(int(path.parent.name[5:]) for path in self.output_dir.glob("checkpoints/step-*[0-9]/state.json"))

    def partial(self) -> list[Path]:
        """Return the partially written files and folders of the run."""
        return [path for path in self.output_dir.rglob("*") if ".tmp" in path.name]

    def shared_memory(self) -> list[str]:
        """Return the files in shared memory."""
        return os.listdir(self.root / "dev/shm")

    # -------------------------------------------------------------------------------------------------- fault tools

    def rank(self, number: int) -> int:
        """Return the pid of a rank."""
        return min(self.lab.processes(RANK, self.lab.nodes[number]))

    def kill(self, pids: list[int], signal_name: str = "KILL") -> None:
        """Send a signal to processes. At least one must match."""
        assert pids, f"no process to kill:\n{self.describe_processes()}"
        self.lab.kill(pids, signal_name)

    def stop_in_save(self, generator: random.Random) -> str:
        """Suspend rank 0 in the middle of a save. Returns the names of the partially written files."""
        words = [sys.executable, "-S", "-c", STOP_IN_SAVE, self.rank(0), self.run_dir, generator.uniform(0, 8)]
        done = self.lab.run(*words, timeout_s=TRAIN_S)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def resize_disk(self, num_bytes: int) -> None:
        """Set the size of the run's disk. 0: exactly the used bytes, so that it is full."""
        usage = os.statvfs(self.output_dir)
        used = (usage.f_blocks - usage.f_bfree) * usage.f_bsize
        done = self.lab.run("mount", "-o", f"remount,size={num_bytes or used}", self.run_dir)
        assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------------------------------------------------ faults


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of a training run.

    inject: causes the fault; may return a note for the table.
    outcomes: possible exit codes of hostfile.sh or states of the job (PENDING: SLURM requeued it); empty if the run
        continues.
    within_s: time limit for the end on a busy machine.
    repair: undoes the damage before the run can resume.
    must_save: whether the run must not lose any step.
    """

    name: str
    launcher: str
    inject: Callable[[LabRun, random.Random], object]
    outcomes: tuple[str, ...]
    within_s: float = 60
    repair: Callable[[LabRun], object] = lambda _: None
    must_save: bool = False


def kill_rank(number: int) -> Callable[[LabRun, random.Random], object]:
    return lambda run, _: run.kill([run.rank(number)])


def stop_rank(number: int) -> Callable[[LabRun, random.Random], object]:
    return lambda run, _: run.kill([run.rank(number)], "STOP")


def kill_others(pattern: str, node: str, signal_name: str = "KILL") -> Callable[[LabRun, random.Random], object]:
    return lambda run, _: run.kill(run.lab.processes(pattern, node), signal_name)


def terminate_hostfile(run: LabRun, _: random.Random) -> None:
    run.kill([min(run.lab.processes(r"^bash [^ ]*hostfile[.]sh"))], "TERM")


def fill_disk(run: LabRun, _: random.Random) -> None:
    usage = os.statvfs(run.output_dir)
    run.resize_disk((usage.f_blocks - usage.f_bfree) * usage.f_bsize + (32 << 20))


def fill_disk_in_save(run: LabRun, generator: random.Random) -> str:
    files = run.stop_in_save(generator)
    run.resize_disk(0)
    run.kill([run.rank(0)], "CONT")
    return files


def kill_in_save(run: LabRun, generator: random.Random) -> str:
    files = run.stop_in_save(generator)
    run.kill([run.rank(0)])
    return files


def kill_and_truncate(run: LabRun, _: random.Random) -> str:
    wait_until(lambda: len(run.checkpoints()) >= 2, TRAIN_S, lambda: "two checkpoints")
    run.kill([run.rank(0)])
    newest = run.checkpoints()[-1]
    file = run.output_dir / f"checkpoints/step-{newest:06d}/trainable.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return f"rank 0 killed, step {newest} is truncated"


def preempt(run: LabRun, _: random.Random) -> None:
    run.lab.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def reach_time_limit(run: LabRun, _: random.Random) -> None:
    """SLURM checks time limits twice a minute. The ranks are suspended meanwhile, to save steps."""
    ranks = [run.rank(0), run.rank(1)]
    run.kill(ranks, "STOP")
    run.lab.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=5")
    for pid in ranks:
        wait_until(
            lambda pid=pid: _is_pending(run, pid, signal.SIGUSR1), 60, lambda: "the signal before the time limit"
        )
    run.kill(ranks, "CONT")


def _is_pending(run: LabRun, pid: int, number: int) -> bool:
    text = (run.root / f"proc/{pid}/status").read_text()
    return any(int(mask, 16) >> (number - 1) & 1 for mask in re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", text))


def remove_time_limit(run: LabRun) -> None:
    run.lab.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=UNLIMITED")


def cut_link_briefly(run: LabRun, generator: random.Random) -> str:
    """Cut the link for a time that is too short to end the run."""
    seconds = generator.uniform(1, 4)
    run.lab.cut("n2")
    time.sleep(seconds)
    run.lab.restore("n2")
    return f"{seconds:.1f} s"


KILLED = ("137", "247", "76", "75", "1", "255")

# Faults that end a run, in this order. After most of them, the user starts the run again.
FAULTS = (
    Fault(
        "kill the launcher of n2", "hostfile",
        kill_others(r"^[^ ]+ -u -m deepspeed[.]launcher[.]launch", "n2"), KILLED,
    ),
    # ssh notices it, or the watchdog of the other node does before.
    Fault(
        "cut link", "hostfile", lambda run, _: run.lab.cut("n2"), ("255", "76"), 120, lambda run: run.lab.restore("n2")
    ),
    Fault("stop rank 1", "hostfile", stop_rank(1), ("76",)),
    Fault("disk nearly full", "hostfile", fill_disk, ("2",), repair=lambda run: run.resize_disk(DISK_BYTES)),
    Fault("disk full in a save", "hostfile", fill_disk_in_save, ("2",), repair=lambda run: run.resize_disk(DISK_BYTES)),
    Fault("kill in save", "hostfile", kill_in_save, KILLED),
    Fault("SIGTERM", "hostfile", terminate_hostfile, ("75",), must_save=True),
    Fault("cut link", "sbatch", lambda run, _: run.lab.cut("n2"), ("PENDING",), 180, lambda run: run.lab.restore("n2")),
    Fault("scancel", "sbatch", lambda run, _: run.lab.run("scancel", run.job), ("CANCELLED",), must_save=True),
)  # fmt: skip
# Faults for one job that SLURM requeues, in random order.
RANDOM_FAULTS = (
    Fault("kill rank 1", "sbatch", kill_rank(1), ("PENDING",)),
    # SLURM soon notices, but the rank is orphaned: no process would end it.
    Fault("kill slurmstepd of n2", "sbatch", kill_others(r"^slurmstepd: ", "n2"), ("PENDING",), 150, must_save=True),
    # Its child ends the ranks, unless it dies first: then they continue until the batch script tells them to save.
    Fault("kill srun", "sbatch", kill_others(r"^srun ", "n1"), ("PENDING",), 120),
    Fault("kill in save", "sbatch", kill_in_save, ("PENDING",)),
    Fault("kill and truncate newest", "sbatch", kill_and_truncate, ("PENDING",)),
    Fault("preemption", "sbatch", preempt, ("PENDING",), must_save=True),
    Fault("time limit", "sbatch", reach_time_limit, ("PENDING",), repair=remove_time_limit, must_save=True),
    Fault("kill rank 0", "sbatch", kill_rank(0), ("PENDING",)),
    Fault("stop rank 0", "sbatch", stop_rank(0), ("PENDING",)),
    Fault("stop rank 1", "sbatch", stop_rank(1), ("PENDING",)),
    Fault(
        "SIGTERM to the ranks", "sbatch",
        lambda run, _: run.lab.run("scancel", "--signal=TERM", run.job), ("PENDING",), must_save=True,
    ),
    Fault(
        "SIGUSR1 to the job", "sbatch",
        lambda run, _: run.lab.run("scancel", "--batch", "--signal=USR1", run.job), ("PENDING",), must_save=True,
    ),
    Fault("link cut for seconds", "sbatch", cut_link_briefly, ()),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- reference


def memory_of_ranks(root: Path) -> dict[int, int]:
    """Return the resident memory [bytes] of every running rank by pid."""
    parents = {}
    for path in (root / "proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if re.match(RANK, (path / "cmdline").read_text(errors="replace").replace("\0", " ")):
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    resident_bytes = {}
    loaders = {pid for pid, parent in parents.items() if parent in parents}
    for pid in sorted(parents.keys() - loaders):
        with contextlib.suppress(OSError):
            resident = re.search(r"VmRSS:\s*(\d+) kB", (root / f"proc/{pid}/status").read_text())
            if resident:
                resident_bytes[pid] = int(resident[1]) * 1024
    return resident_bytes


def growth_mb(samples: list[tuple[int, int]]) -> float:
    """Return the slope of a linear fit of (step, bytes) [MB per 1000 steps]."""
    mean_step = sum(step for step, _ in samples) / len(samples)
    mean = sum(num for _, num in samples) / len(samples)
    spread = sum((step - mean_step) ** 2 for step, _ in samples)
    return sum((step - mean_step) * (num - mean) for step, num in samples) / spread / 1e6 * 1000


def reference_steps(lab: Lab, folder: Path, words: list[str], num_steps: int) -> list[Line]:
    """Return the steps of the reference run, which runs once per folder.

    Its folder also holds `memory.json`: the (step, bytes) samples of each rank.
    """
    output_dir = folder / "reference"
    if not (output_dir / "memory.json").exists():
        root, log = Path(f"/proc/{lab._first}/root"), folder / "reference.log"
        launch = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", ROOT / "launch/train.py"]
        words = [*words, f"train.num_steps={num_steps}", f"output_dir={output_dir}"]
        process = lab.start(*launch, *words, node="n1", output=log, env={"PYTHONUNBUFFERED": "1"})
        samples: dict[int, list[tuple[int, int]]] = {}
        while process.poll() is None:
            step = len(read_steps(output_dir))
            for pid, num_bytes in memory_of_ranks(root).items():
                if step:
                    samples.setdefault(pid, []).append((step, num_bytes))
            time.sleep(0.5)
        assert process.returncode == 0, log.read_text()[-6000:]
        (output_dir / "memory.json").write_text(json.dumps(list(samples.values())))
    return read_steps(output_dir)


def format_table(table: list[dict[str, object]]) -> Iterator[str]:
    """Format rows as lines of a table with aligned columns."""
    names = list(dict.fromkeys(name for row in table for name in row))
    cells = [names, *([str(row.get(name, "")) for name in names] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        yield " | ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
