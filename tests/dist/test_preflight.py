"""The preflight command with two real ranks."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, free_port, run_command

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LEVELS = re.compile(r"^(\w+) +(ok|WARN|FAIL) ", re.MULTILINE)


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model):
    """A folder, and the overrides of all ranks."""
    from tests.drawn import draw_clips

    folder = tmp_path_factory.mktemp("preflight")
    draw_clips(folder / "clips")
    return folder, [
        f"model.path={tiny_model}",
        f"data.path={folder / 'clips'}",
        "data.buckets=[17x64x96, 1x64x64]",
        f"output_dir={folder / 'run'}",
        "train.precision=fp32",
        "train.gradient_accumulation_steps=3",
        "lora.rank=4",
    ]


def test_a_cluster_without_problems_is_ready(job):
    folder, overrides = job
    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc_per_node", 2, "--master_port", free_port()]
    words = ["--deepspeed", ROOT / "ds_configs/zero3.json", *overrides, f"data.cache_dir={folder / 'cache'}"]
    start = time.monotonic()
    done = run_command([*torchrun, ROOT / "launch/preflight.py", *words], 240, cwd=folder)
    print(f"preflight with 2 ranks: {time.monotonic() - start:.1f} s")
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.rstrip().splitlines()[-1].startswith("ready: 2 ranks on 1 node")
    rows = LEVELS.findall(done.stdout)
    # A machine without GPUs causes a warning.
    assert {level for name, level in rows if name != "gpu"} == {"ok"}, done.stdout
    assert dict(rows)["gpu"] == ("ok" if torch.cuda.is_available() else "WARN")
    names = ["versions", "config", "tools", "sources", "disk", "gpu", "network", "folders", "exchange", "step"]
    assert list(dict.fromkeys(name for name, _ in rows)) == names
    assert "17x64x96, batch 1, activation checkpointing none: " in done.stdout
    assert [path for path in folder.rglob("*") if "preflight" in path.name] == []
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "clips", "run"]


def test_a_folder_that_is_not_shared_names_key_rank_and_paths(job):
    """The ranks are started by hand with different working folders, and only one of them with NCCL_DEBUG."""
    folder, overrides = job
    port, ranks = str(free_port()), []
    words = ["--wait", "10", "--skip", "versions,tools,gpu,exchange,step", *overrides, "data.cache_dir=shared"]
    for rank in range(2):
        (folder / f"node{rank}").mkdir()
        environ = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        environ |= {"MASTER_PORT": port} | ({"NCCL_DEBUG": "WARN"} if rank else {})
        ranks.append(
            subprocess.Popen(
                [sys.executable, ROOT / "launch/preflight.py", *words],
                cwd=folder / f"node{rank}",
                env={**os.environ, **environ},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [2, 2], outputs
    assert outputs[0].rstrip().splitlines()[-1] == "not ready: 1 check failed, 1 warning"
    assert "Traceback" not in outputs[0] + outputs[1]
    text = " ".join(outputs[0].split())
    assert "folders FAIL data.cache_dir: not shared on rank 1 (" in text
    assert f" {folder}/node1/shared" in text
    assert f" {folder}/node0/shared" in text
    assert "NCCL_DEBUG: not set on rank 0" in text
    assert LEVELS.findall(outputs[1]) == []  # only rank 0 prints the table
    assert list((folder / "node1").iterdir()) == []
    assert list((folder / "node0/shared").iterdir()) == []
