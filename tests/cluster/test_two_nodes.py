"""Two real nodes on this machine: pdsh over ssh, and SLURM. Needs root and the packages that install.sh installs."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from tests.conftest import run_command
from tests.dist.conftest import losses
from tests.readme import ROOT, command

pytestmark = pytest.mark.cluster
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def overrides(tmp_path_factory, tiny_model):
    """The tiny model and drawn clips in place of the real ones, and where it all is."""
    from cogds.data.synthetic import draw_clips

    folder = tmp_path_factory.mktemp("cluster")
    draw_clips(folder / "clips")
    return folder, [
        f"model.path={tiny_model}",
        f"data.path={folder / 'clips'}",
        f"data.cache_dir={folder / 'cache'}",
        "data.buckets=[17x64x96, 9x96x64, 1x64x64]",
        "train.num_steps=4",
        "train.precision=fp32",
        "lora.rank=4",
    ]


@pytest.fixture(scope="module")
def one_node(overrides, run_train):
    """The run to be equal to: the same command with 2 ranks on one node."""
    folder, rest = overrides
    config = ROOT / "launch/configs/cogvideox1.5_i2v_lora.yaml"
    run_train("--deepspeed", "ds_configs/zero2.json", "--config", config, *rest, f"output_dir={folder / 'one'}")
    return folder / "one"


def in_cluster(*words, env=None):
    """Run a command on the head node of a private cluster of two nodes, n1 and n2; everything ends with it."""
    script = ROOT / "tests/cluster/two_nodes.sh"
    return run_command(["bash", script, "bash", "-c", shlex.join(map(str, words))], 300, env=env)


def test_srun(overrides, one_node):
    folder, rest = overrides
    words = command("srun ")
    words[words.index("--ntasks-per-node=8")] = "--ntasks-per-node=1"
    words[words.index("python")] = sys.executable
    done = in_cluster(words[0], "--nodes=2", *words[1:], *rest, f"output_dir={folder / 'srun'}")
    assert done.returncode == 0, done.stdout[-4000:]
    assert losses(folder / "srun") == losses(one_node)


def test_an_error_ends_an_srun_with_its_code(overrides):
    _, rest = overrides
    words = [sys.executable, "launch/train.py", *rest, "model.path=/nowhere/model"]
    done = in_cluster("srun", "--nodes=2", "--ntasks-per-node=1", *words)
    assert done.returncode == 2, done.stdout[-4000:]
    assert "error: model.path: there is no folder /nowhere/model" in done.stdout
    assert "error on rank 1 (n2):" in done.stdout
    assert "Traceback" not in done.stdout


def test_pdsh(overrides, one_node):
    folder, rest = overrides
    (folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    # What DeepSpeed's launcher passes on to the nodes.
    passed_on = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")}
    (folder / "ds_env").write_text("".join(f"{name}={value}\n" for name, value in passed_on.items()))
    words = command("deepspeed --hostfile")
    words[words.index("hostfile")] = folder / "hostfile"
    launch = [BIN / words[0], *words[1:3], "--master_addr", "n1", "--master_port", "29511", *words[3:]]
    done = in_cluster(*launch, *rest, f"output_dir={folder / 'pdsh'}", env={"DS_ENV_FILE": str(folder / "ds_env")})
    assert done.returncode == 0, done.stdout[-4000:]
    assert losses(folder / "pdsh") == losses(one_node)
