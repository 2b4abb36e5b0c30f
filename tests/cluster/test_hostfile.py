"""launch/hostfile.sh: arguments arrive unchanged, signals stop the run, and no process is left behind."""

import shutil
import sys

import pytest

from cogds.arguments import PREFLIGHT_CHECKS, unpack
from tests.cluster.conftest import ODD
from tests.cluster.lab import wait_until
from tests.conftest import ROOT, run_command
from tests.dist.conftest import losses

pytestmark = pytest.mark.cluster


def start(lab, checkout, acts):
    """Start a run and wait for both ranks. Returns the process and the file with its output."""
    (checkout.folder / "records.jsonl").unlink(missing_ok=True)
    output = checkout.folder / f"output-{acts}"
    env = {"STAND_IN": acts, "COGDS_PASS": "STAND_IN"}
    process = lab.start("launch/hostfile.sh", "hosts", cwd=checkout.folder, env=env, output=output)
    wait_until(
        lambda: len(checkout.records()) == 2,
        60,
        lambda: f"there are {checkout.records()}:\n{output.read_text()[-4000:]}",
    )
    return process, output


def test_arguments_and_variables_reach_every_rank_and_the_exit_code_is_returned(lab, checkout):
    before = checkout.file_names()
    words = ["--deepspeed", "a b.json", "", f"data.default_caption={ODD}", "output_dir=o 'u\"t$(touch pwned);x", "x=\\"]
    env = {
        "HF_ODD": ODD.replace("\n", ""),
        "HF_TOKEN": "hidden",
        "HF_LINES": "a\nb",
        "PYTHON_ODD": "$(touch pwned4)",  # DeepSpeed's launcher passes it on by itself and would evaluate it
        "NOT_SELECTED": "1",
        "RANKS_SELECTED": "$HOME",
        "STAND_IN": "2@n2",  # hostfile.sh then ends the other rank, which waits
        "COGDS_PASS": "STAND_IN RANKS_*",
        "DS_ENV_FILE": "own_env",
    }
    (checkout.folder / "own_env").write_text("# a comment\n\nHF_FROM_FILE=7\n")
    done = lab.run("launch/hostfile.sh", "hosts", *words, cwd=checkout.folder, env=env)
    assert done.returncode == 2, done.stdout[-4000:]
    assert lab.processes("launch/train.py") == []
    records = checkout.records()
    assert {record["host"] for record in records} == {"n1", "n2"}
    for record in records:
        assert unpack(record["argv"])[1:] == words
        assert record["env"]["HF_ODD"] == env["HF_ODD"]
        assert record["env"]["PYTHON_ODD"] == "$(touch pwned4)"
        assert record["env"]["RANKS_SELECTED"] == "$HOME"
        assert record["env"]["HF_FROM_FILE"] == "7"
        assert record["env"]["OMP_NUM_THREADS"] == "1"
        assert record["env"]["MASTER_ADDR"] == "n1"
        assert not {"HF_TOKEN", "HF_LINES", "NOT_SELECTED"} & record["env"].keys()
    assert "warning: HF_LINES: " in done.stdout
    assert checkout.file_names() - before == {"records.jsonl", "own_env"}
    assert "hidden" not in done.stdout


def test_a_signal_makes_the_ranks_save_and_a_second_signal_ends_them(lab, checkout):
    process, output = start(lab, checkout, "wait")
    lab.kill(lab.processes("^bash launch/hostfile.sh hosts"), "TERM")
    process.wait(60)
    text = output.read_text()
    assert process.returncode == 75, text[-4000:]
    assert text.count("stopped by SIGUSR1") == 2
    assert text.count("saved") == 2
    assert lab.processes("launch/train.py") == []

    process, output = start(lab, checkout, "stay")
    lab.kill(lab.processes("^bash launch/hostfile.sh hosts"), "INT")
    wait_until(lambda: "asking all ranks to save and stop" in output.read_text(), 60)
    lab.kill(lab.processes("^bash launch/hostfile.sh hosts"), "INT")
    process.wait(60)
    assert process.returncode == 137, output.read_text()[-4000:]
    assert lab.processes("launch/train.py|deepspeed.launcher") == []


def test_a_signal_before_the_ranks_exist_ends_everything(lab, checkout):
    output = checkout.folder / "output"
    process = lab.start("launch/hostfile.sh", "hosts", cwd=checkout.folder, env={"STAND_IN": "stay"}, output=output)
    wait_until(lambda: lab.processes("deepspeed.launcher.runner"), 30)
    lab.kill(lab.processes("^bash launch/hostfile.sh hosts"), "TERM")
    process.wait(20)
    assert process.returncode == 75, output.read_text()[-4000:]
    assert lab.processes("launch/train.py") == []
    assert checkout.records() == []


SILENT = """
import socket
server = socket.create_server(("10.77.0.254", 22))
connections = []
print("listening", flush=True)
while True:
    connections.append(server.accept())
"""


@pytest.fixture
def silent_node(lab):
    """The address of a node that accepts connections and says nothing."""
    server = lab.start(sys.executable, "-c", SILENT)
    assert server.stdout.readline() == "listening\n"
    yield "10.77.0.254"
    lab.kill(lab.processes("socket.create_server"))
    server.communicate(timeout=10)


def test_nodes_are_checked_before_anything_is_started(lab, checkout, silent_node):
    (checkout.folder / "hosts").write_text(f"{silent_node} slots=1\nn1 slots=1\nnobody@n2 slots=1\n")
    env = {"PDSH_SSH_ARGS_APPEND": "-o ConnectTimeout=1"}
    for words in (["launch/hostfile.sh", "hosts"], [sys.executable, "-m", "cogds", "train", "--hostfile", "hosts"]):
        done = lab.run(*words, cwd=checkout.folder, env=env, timeout_s=20)
        assert done.returncode == 2
        assert done.stdout.startswith(f"error: hostfile: 2 of 3 nodes cannot be used: {silent_node}: Connection ")
        assert "timed out; nobody@n2: code 1" in done.stdout
    assert checkout.records() == []


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1"])
def test_one_signal_ends_the_check(name, lab, checkout, silent_node):
    (checkout.folder / "hosts").write_text(f"{silent_node} slots=1\n")
    output = checkout.folder / "output"
    process = lab.start("launch/hostfile.sh", "hosts", cwd=checkout.folder, output=output)
    wait_until(lambda: lab.processes("^ssh .*10.77.0.254"), 10)
    lab.kill(lab.processes("^bash launch/hostfile.sh hosts"), name)
    process.wait(5)
    assert process.returncode == 75
    assert output.read_text() == "stopped before anything was started\n"
    assert lab.processes("^ssh |cogds.distributed.hostfile") == []


def test_cogds_starts_ranks_with_a_hostfile(lab, tiny_run, checkout):
    _, rest = tiny_run
    checks = ",".join(name for name in PREFLIGHT_CHECKS if name != "versions")
    words = ["--skip", checks, *rest, f"data.default_caption={ODD}", f"output_dir={checkout.folder / 'out'}"]
    command = [sys.executable, "-m", "cogds", "preflight", "--hostfile", "hosts", "--master-port", "29511", *words]
    done = lab.run(*command, cwd=checkout.folder, timeout_s=180)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "ready: 2 ranks on 2 nodes" in done.stdout
    assert not list(checkout.folder.glob("pwned*"))


def test_a_lost_node_ends_the_job(lab, checkout):
    process, output = start(lab, checkout, "stay")
    lab.cut("n2")
    try:
        process.wait(90)
    finally:
        lab.restore("n2")
    assert process.returncode == 255, output.read_text()[-4000:]
    assert lab.processes("launch/train.py", "n1") == []


def test_a_run_with_special_characters_in_its_path_equals_the_reference(lab, tiny_run, one_node, monkeypatch):
    monkeypatch.setenv("COGDS_PYTHON", sys.executable)
    folder, rest = tiny_run
    (folder / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    output_dir = folder / "h 'o\"s$(touch pwned);t"
    config = ROOT / "launch/configs/cogvideox1.5_i2v_lora.yaml"
    more = ["train.num_steps=4", f"output_dir={output_dir}"]
    words = ["--config", config, "--deepspeed", "ds_configs/zero2.json", *rest, *more]
    done = lab.run("launch/hostfile.sh", folder / "hosts", *words, timeout_s=240)
    assert done.returncode == 0, done.stdout[-4000:]
    assert losses(output_dir) == losses(one_node)[:4]
    assert not (ROOT / "pwned").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "error: hostfile: "),
        (["--script"], "error: hostfile: "),
        (["no/hosts"], "error: hostfile: no such file: no/hosts"),
        (["hosts", "--script"], "error: --script: "),
        (["hosts", "--script", "../x"], "error: --script: no such script: launch/../x.py"),
        (["none"], "error: none: "),
        (["lots"], "error: lots:2: 'n2 lots=8' is not "),
    ],
)
def test_invalid_arguments_are_refused(words, message, checkout):
    (checkout.folder / "none").write_text("# n1 slots=1\n")
    (checkout.folder / "lots").write_text("n1 slots=8\nn2 lots=8\n")
    done = run_command(["launch/hostfile.sh", *words], 20, cwd=checkout.folder)
    assert done.returncode == 2
    assert done.stdout.startswith(message)


def test_a_path_that_remote_shells_would_split_is_refused(checkout, tmp_path):
    odd = tmp_path / "a b"
    shutil.move(checkout.folder, odd)
    done = run_command(["launch/hostfile.sh", "hosts"], 20, cwd=odd)
    assert done.returncode == 2
    assert f"error: path '{odd}': " in done.stdout
