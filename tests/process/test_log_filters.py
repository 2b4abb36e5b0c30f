"""Only the listed messages of libraries are filtered."""

import subprocess
import sys

import pytest

from cogds.process.log_filters import filter_stdout
from tests.conftest import ROOT

SCRIPT = """
import logging, warnings
from cogds.process.log_filters import install_log_filters, filter_stdout
install_log_filters()
install_log_filters()
logging.getLogger("torchao").warning("Failed to load /x/_C.so: no")
logging.getLogger("torchao").error("Failed to load /x/_C.so: an error")
logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If")
logging.getLogger("DeepSpeed").warning("loss scale is 1")
warnings.warn_explicit("renamed", FutureWarning, "f.py", 1, module="torch.distributed.c10d")
warnings.warn_explicit("changed", FutureWarning, "f.py", 2, module="other")
with filter_stdout():
    print("DeepSpeed deepspeed.ops.comm_op built successfully")
    print("something else")
"""


def test_only_the_listed_messages_are_filtered():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "something else\n"
    assert done.stderr.splitlines() == [
        "Failed to load /x/_C.so: an error", "loss scale is 1", "f.py:2: FutureWarning: changed",
    ]  # fmt: skip


def test_output_before_an_error_is_printed(capsys):
    def fail():
        print("message")
        raise ValueError("error")

    with pytest.raises(ValueError, match="error"), filter_stdout():
        fail()
    assert capsys.readouterr().out == "message\n"
