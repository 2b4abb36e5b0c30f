"""Messages of libraries that nobody can act on are left out, and no others."""

import subprocess
import sys

import pytest

from cogds.process.log_filters import without_printed
from tests.conftest import ROOT

SCRIPT = """
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


def test_only_the_listed_messages_are_left_out():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "something else\n"
    assert done.stderr.splitlines() == [
        "Failed to load /x/_C.so: and it matters", "loss scale is 1", "f.py:2: FutureWarning: look here",
    ]  # fmt: skip


def test_what_is_printed_before_an_error_is_kept(capsys):
    def fail():
        print("it went wrong")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), without_printed():
        fail()
    assert capsys.readouterr().out == "it went wrong\n"
