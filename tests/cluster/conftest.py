"""Fixtures: a cluster per module, a reference run on one node, and a checkout whose train.py is replaced."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.readme import ROOT

PROGRAMS = f"{os.environ['PATH']}:/usr/sbin:/sbin"
# A value that changes if a shell on the way splits it, expands it or runs it.
ODD = 'it\'s "x" $(touch pwned) ; touch pwned2 `touch pwned3` $HOME %n \\n * \n& tail'


def find_missing():
    """Return what this machine lacks to run a cluster: programs and root rights."""
    programs = [name for name in ("slurmd", "pdsh", "sshd", "ip") if not shutil.which(name, path=PROGRAMS)]
    return [*(["root"] if os.geteuid() else []), *programs]


def pytest_runtest_setup():
    if missing := find_missing():
        pytest.skip(f"not available: {', '.join(missing)}. Run tests/cluster/install.sh as root.")


@pytest.fixture(scope="module")
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_model):
    """A folder, and the arguments of a small run: the tiny model, drawn clips, 60 steps."""
    from tests.drawn import draw_clips

    folder = tmp_path_factory.mktemp("cluster")
    draw_clips(folder / "clips")
    return folder, [
        f"model.path={tiny_model}",
        f"data.path={folder / 'clips'}",
        f"data.cache_dir={folder / 'cache'}",
        "data.buckets=[17x64x96, 9x96x64, 1x64x64]",
        "train.num_steps=60",
        "train.precision=fp32",
        "lora.rank=4",
        "eval.every=null",
    ]


@pytest.fixture(scope="session")
def one_node(tiny_run, run_train):
    """The output folder of the reference run: 2 ranks on one node."""
    folder, arguments = tiny_run
    config = ROOT / "launch/configs/cogvideox1.5_i2v_lora.yaml"
    run_train("--deepspeed", "ds_configs/zero2.json", "--config", config, *arguments, f"output_dir={folder / 'one'}")
    return folder / "one"


class Checkout:
    """A checkout with stand_in.py as its train.py."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT / "launch", folder / "launch")
        shutil.copy(ROOT / "tests/cluster/stand_in.py", folder / "launch/train.py")
        for name in ("cogds", "ds_configs"):
            (folder / name).symlink_to(ROOT / name)
        # As an editor on Windows writes it.
        hosts = "\ufeff# two nodes\r\n\r\nroot@n1 slots=1\r\n n2 slots=1 # the second\r\n"
        (folder / "hosts").write_bytes(hosts.encode())

    def records(self):
        """Return what stand_in.py has recorded, one dict per started rank."""
        file = self.folder / "records.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def file_names(self):
        """Return the names of all files and folders of the checkout."""
        return {path.name for path in self.folder.rglob("*") if not path.is_symlink()}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("COGDS_PYTHON", sys.executable)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return Checkout(tmp_path / "checkout")
