"""The commands of docs/quickstart.md on two nodes: srun, and pdsh over ssh."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.dist.conftest import losses
from tests.readme import QUICKSTART, command

pytestmark = pytest.mark.cluster
BIN = Path(sys.executable).parent


def test_srun(lab, tiny_run, one_node):
    folder, rest = tiny_run
    words = command("srun ", QUICKSTART)
    words[words.index("--ntasks-per-node=8")] = "--ntasks-per-node=1"
    words[words.index("python")] = sys.executable
    more = [*rest, "train.num_steps=4", f"output_dir={folder / 'srun'}"]
    done = lab.run(words[0], "--nodes=2", *words[1:], *more, timeout_s=240)
    assert done.returncode == 0, done.stdout[-4000:]
    assert losses(folder / "srun") == losses(one_node)[:4]


def test_an_error_ends_srun_with_its_exit_code(lab, tiny_run):
    _, rest = tiny_run
    words = [sys.executable, "launch/train.py", *rest, "model.path=/nowhere/model"]
    done = lab.run("srun", "--nodes=2", "--ntasks-per-node=1", *words, timeout_s=120)
    assert done.returncode == 2, done.stdout[-4000:]
    assert re.search(r"^error: model\.path: .*/nowhere/model", done.stdout, re.MULTILINE)
    assert "error on rank 1 (n2):" in done.stdout
    assert "Traceback" not in done.stdout


def test_pdsh(lab, tiny_run, one_node):
    folder, rest = tiny_run
    (folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    # The variables that DeepSpeed's launcher passes to the nodes.
    variables = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")}
    (folder / "ds_env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    words = command("deepspeed --hostfile", QUICKSTART)
    words[words.index("hostfile")] = folder / "hostfile"
    launch = [BIN / words[0], *words[1:3], "--master_addr", "n1", "--master_port", "29511", *words[3:]]
    more = [*rest, "train.num_steps=4", f"output_dir={folder / 'pdsh'}"]
    done = lab.run(*launch, *more, timeout_s=240, env={"DS_ENV_FILE": str(folder / "ds_env")})
    assert done.returncode == 0, done.stdout[-4000:]
    assert losses(folder / "pdsh") == losses(one_node)[:4]
