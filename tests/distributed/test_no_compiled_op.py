"""A default run compiles nothing: it starts without a C++ compiler and in seconds."""

import os

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_a_process_group_starts_without_a_compiler(warm, tmp_path):
    script = tmp_path / "join.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from cogds.distributed.process_group import connect, disconnect\n"
        "from cogds.distributed.world import read_world\n"
        "connect(read_world(), 60)\n"
        "disconnect()\n"
    )
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "PATH": str(tmp_path), "CXX": "false"}
    assert warm(script, [], ranks=2, env=environment).returncode == 0
    assert not os.path.exists(tmp_path / "extensions")
