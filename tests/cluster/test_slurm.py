"""launch/slurm: jobs that are requeued if that helps, and only then."""

import sys

import pytest

from tests.cluster.conftest import ODD
from tests.cluster.lab import wait_until
from tests.conftest import ROOT
from tests.dist.conftest import losses, metrics
from tests.readme import command

pytestmark = pytest.mark.cluster


def submit(lab, checkout, acts, *words, options=("--nodes=2",), **env):
    """Submit stand_in.py with these acts and arguments. Returns the job's id."""
    context = {"cwd": checkout.folder, "env": {"STAND_IN": acts, **env}}
    return lab.sbatch(*options, "launch/slurm/train.sbatch", *words, **context)


def read_batch_log(folder, job):
    return (folder / f"cogds-train-{job}.log").read_text()


def await_starts(checkout, num):
    wait_until(lambda: len(checkout.records()) == num, 30, lambda: f"{num} starts; there are {checkout.records()}")


def test_arguments_reach_every_rank_unchanged_and_are_not_evaluated(lab, checkout):
    before = checkout.file_names()
    words = ["--deepspeed", "a b.json", "", f"data.default_caption={ODD}", "output_dir=o 'u\"t$(touch pwned);x", "x=\\"]
    env = {"COGDS_WRAP": "env WRAPPED=1", "COGDS_SRUN_ARGS": "--label --unbuffered", "RANK": "7", "HF_ODD": ODD}
    job = submit(lab, checkout, "0", *words, options=("--nodes=2", "--exclusive"), **env, COGDS_RANKS_PER_NODE="2")
    assert lab.wait(job) == "COMPLETED", read_batch_log(checkout.folder, job)
    records = checkout.records()
    assert sorted(record["host"] for record in records) == ["n1", "n1", "n2", "n2"]
    for record in records:
        assert record["argv"] == words
        assert record["env"]["HF_ODD"] == ODD
        assert record["env"]["WRAPPED"] == "1"
        assert record["env"]["SLURM_CPUS_PER_TASK"] == "1"
        assert "RANK" not in record["env"]
    logs = {f"cogds-train-{job}-n1.log", f"cogds-train-{job}-n2.log"}
    assert checkout.file_names() - before == {"records.jsonl", f"cogds-train-{job}.log", "logs", *logs}
    assert "1: started 0" in (checkout.folder / f"logs/cogds-train-{job}-n1.log").read_text()


# (how each start ends, COGDS_MAX_RESTARTS) -> (final state, possible exit codes, number of restarts)
ENDINGS = {
    ("2@n2 0", 10): ("FAILED", ("2:0",), 0),  # a user error is not restarted, whatever the other ranks end with
    ("76 1@n1 0", 10): ("COMPLETED", ("0:0",), 2),
    # Either code: srun may first report that it has killed the other rank.
    ("kill kill 0", 1): ("FAILED", ("137:0", "143:0"), 1),
    ("kill+ kill+ 0", 1): ("COMPLETED", ("0:0",), 2),  # two crashes, but with a newer checkpoint each time
    ("75 75 0", 0): ("COMPLETED", ("0:0",), 2),  # stopped, not crashed
}


def test_jobs_are_requeued_only_if_that_helps(lab, checkout):
    # All jobs at once: most of the time passes in SLURM, between two starts.
    jobs = {
        submit(
            lab, checkout, acts, "--config", "demo", f"output_dir=out-{acts}", COGDS_MAX_RESTARTS=str(max_restarts)
        ): ending
        for (acts, max_restarts), ending in ENDINGS.items()
    }
    for job, (state, codes, restarts) in jobs.items():
        text = read_batch_log(checkout.folder, job) if lab.wait(job, timeout_s=120) != state else ""
        assert lab.state(job) == state, text
        assert lab.show(job)["ExitCode"] in codes, read_batch_log(checkout.folder, job)
        assert int(lab.show(job)["Restarts"]) == restarts


def test_a_cancelled_job_saves_and_is_not_requeued(lab, checkout):
    job = submit(lab, checkout, "wait 0")
    await_starts(checkout, 2)
    lab.run("scancel", job)
    assert lab.wait(job) == "CANCELLED"
    wait_until(lambda: "stopped with code 75; not requeued" in read_batch_log(checkout.folder, job), 10)
    for node in lab.nodes:
        assert "saved" in (checkout.folder / f"logs/cogds-train-{job}-{node}.log").read_text()
    assert lab.show(job)["Restarts"] == "0"


def test_a_task_of_an_array_has_its_own_arguments_and_is_requeued_alone(lab, checkout):
    array = submit(lab, checkout, "wait 0", "output_dir=out-{task}", "seed={task}", options=("--array=3-4",))
    await_starts(checkout, 2)
    # The last task has the number of the whole array.
    (task,) = [number for number in (3, 4) if lab.show(f"{array}_{number}")["JobId"] == array]
    other = 7 - task
    lab.run("scancel", "--batch", "--signal=USR1", f"{array}_{task}")
    assert lab.wait(f"{array}_{task}") == "COMPLETED"
    assert (lab.state(f"{array}_{other}"), lab.show(f"{array}_{other}")["Restarts"]) == ("RUNNING", "0")
    lab.run("scancel", array)
    assert sorted(record["argv"] for record in checkout.records() if record["start"] == 0) == [
        ["output_dir=out-3", "seed=3"],
        ["output_dir=out-4", "seed=4"],
    ]
    assert [record["argv"][1] for record in checkout.records() if record["start"] == 1] == [f"seed={task}"]


@pytest.mark.parametrize(
    "argument, env, message",
    [
        ("seed={task}", {}, "error: {task}: "),
        ("seed=1", {"COGDS_RANKS_PER_NODE": "4"}, "error: CPUs: "),
        ("seed=1", {"COGDS_RANKS_PER_NODE": "x"}, "error: COGDS_RANKS_PER_NODE: 'x'"),
        ("seed=1", {"COGDS_DIR": "/nowhere"}, "error: COGDS_DIR: there is no launch/train.py in /nowhere"),
        ("seed=1", {"COGDS_PYTHON": "/no/python"}, "Exited with exit code 2"),
        ("seed=1", {"COGDS_SRUN_ARGS": "--nonsense"}, "srun: unrecognized option '--nonsense'"),
    ],
)
def test_invalid_jobs_are_refused(argument, env, message, lab, checkout):
    job = submit(lab, checkout, "0", argument, **env)
    assert lab.wait(job) == "FAILED"
    assert lab.show(job)["ExitCode"] == "2:0"
    assert message in read_batch_log(checkout.folder, job)
    assert checkout.records() == []


def test_a_run_equals_the_reference_after_its_time_limit_and_a_preemption(lab, tiny_run, one_node, monkeypatch):
    monkeypatch.setenv("COGDS_PYTHON", sys.executable)
    folder, rest = tiny_run
    output_dir = folder / "s 'o\"l$(touch pwned);t"
    for name in ("cogds", "ds_configs", "launch"):  # a checkout of its own, so that the logs are not written to ours
        (folder / name).symlink_to(ROOT / name)
    words = command("sbatch --nodes=4")[1:]
    words[words.index("--nodes=4")], words[words.index("--gpus-per-node=8")] = "--nodes=2", "--exclusive"
    job = lab.sbatch(*words, *rest, f"output_dir={output_dir}", cwd=folder)

    def trained(num):
        wait_until(
            lambda: (output_dir / "metrics.jsonl").exists() and len(metrics(output_dir)) >= num,
            200,
            lambda: "\n".join(path.read_text()[-3000:] for path in folder.rglob(f"cogds-train-{job}*.log")),
        )

    trained(2)
    lab.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time limit
    lab.wait(job, "PENDING")
    stopped_at = len(metrics(output_dir))
    trained(stopped_at + 2)
    preempting = lab.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    lab.wait(job, "PENDING")
    assert lab.wait(preempting) == "COMPLETED"
    assert len(metrics(output_dir)) < 60, "the run ended before it was preempted"
    assert lab.wait(job, timeout_s=200) == "COMPLETED", read_batch_log(folder, job)
    assert lab.show(job)["Restarts"] == "2"
    assert losses(output_dir) == losses(one_node)
    assert not (folder / "pwned").exists()


def test_a_shell_of_several_tasks_says_that_no_other_rank_exists(lab, checkout):
    """Types into the shell of `srun --pty`. `script` gives it a terminal."""
    python, train = sys.executable, ROOT / "launch/train.py"
    typed = [
        f"{python} {train}; echo code $?",
        f"srun --overlap --ntasks=2 {python} launch/train.py </dev/null",  # what the error advises
        "exit",
    ]
    (checkout.folder / "typed").write_text("\n".join(typed) + "\n")
    shell = "script -qec 'srun --nodes=2 --ntasks=2 --pty bash --norc' /dev/null < typed"
    done = lab.run("bash", "-c", shell, cwd=checkout.folder, env={"COLUMNS": "400"}, timeout_s=60)
    assert "error: SLURM_STEP_NUM_TASKS: " in done.stdout, done.stdout
    assert "code 2" in done.stdout
    assert len(checkout.records()) == 2, done.stdout


def test_encode(lab, tiny_run, monkeypatch, tmp_path):
    monkeypatch.setenv("COGDS_PYTHON", sys.executable)
    _, rest = tiny_run
    config = ROOT / "launch/configs/cogvideox1.5_i2v_lora.yaml"
    words = ["--config", config, *rest, f"data.cache_dir={tmp_path / 'cache'}"]
    context = {"cwd": tmp_path, "env": {"COGDS_DIR": str(ROOT)}}
    job = lab.sbatch("--nodes=2", ROOT / "launch/slurm/encode.sbatch", *words, **context)
    assert lab.wait(job, timeout_s=120) == "COMPLETED"
    assert "7 clips encoded" in (tmp_path / f"logs/cogds-encode-{job}-n1.log").read_text()
