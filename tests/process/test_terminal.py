"""What is said where: hushed, in a panel, and without what libraries say of themselves."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from cogds.process import log_filters as chatter
from cogds.process import terminal
from cogds.train import summary as panel
from cogds.train.summary import show
from tests.conftest import ROOT


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "stream, job, expected", [(Tty(), None, True), (Tty(), "7", False), (io.StringIO(), None, False)]
)
def test_under_slurm_it_is_a_log(monkeypatch, stream, job, expected):
    monkeypatch.setattr(terminal, "settings", lambda name: {name: job} if job else {})
    assert terminal.is_terminal(stream) is expected


def test_a_log_gets_the_lines_as_they_are(capsys):
    lines = ["model /a [b] " + "x" * 300, "  two"]
    show(lines, "cogds")
    assert capsys.readouterr().out.splitlines() == lines


def test_a_terminal_gets_a_panel():
    out = io.StringIO()
    show(["model /a [b]", "LoRA rank 4"], "cogds", Console(file=out, force_terminal=True, width=60, color_system=None))
    drawn = out.getvalue().splitlines()
    assert drawn[0].startswith("╭─ cogds ─")
    assert "model /a [b]" in drawn[1]
    assert all(len(line) == 60 for line in drawn)


HUSHED = """
import sys
from cogds.process.progress import progress
from cogds.process.terminal import hush, last_words
hush()
print("a line")
for _ in progress("reading", "file", 3, items=range(3)):
    pass
print("warning: a disk", file=sys.stderr)
last_words("the end")
sys.exit("error: what is wrong")
"""


def test_quiet_is_errors_warnings_and_the_last_words():
    done = subprocess.run([sys.executable, "-c", HUSHED], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "the end\n"
    assert done.stderr == "warning: a disk\nerror: what is wrong\n"
    assert done.returncode == 1


CHATTY = """
import logging, warnings
from cogds.process.log_filters import leave_out, without_printed
leave_out()
leave_out()
logging.getLogger("torchao").warning("Failed to load /x/_C.so: no")
logging.getLogger("torchao").error("Failed to load /x/_C.so: and it matters")
logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If")
logging.getLogger("DeepSpeed").warning("loss scale is 1")
warnings.warn_explicit("renamed", FutureWarning, "f.py", 1, module="torch.distributed.c10d")
warnings.warn_explicit("look here", FutureWarning, "f.py", 2, module="mine")
with without_printed():
    print("DeepSpeed deepspeed.ops.comm_op built successfully")
    print("something else")
"""


def test_what_libraries_say_of_themselves_is_left_out_and_no_more():
    done = subprocess.run([sys.executable, "-c", CHATTY], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "something else\n"
    assert done.stderr.splitlines() == [
        "Failed to load /x/_C.so: and it matters", "loss scale is 1", "f.py:2: FutureWarning: look here",
    ]  # fmt: skip


def test_what_is_printed_before_an_error_is_not_lost(capsys):
    def fail():
        print("it went wrong")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), chatter.without_printed():
        fail()
    assert capsys.readouterr().out == "it went wrong\n"


def test_devices_are_named(monkeypatch):
    import torch

    assert panel.devices(torch.device("cpu"), 2) == "2 ranks on CPUs"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert panel.devices(torch.device("cuda", 0), 1) == "1 GPU (NVIDIA H100 80GB HBM3)"
