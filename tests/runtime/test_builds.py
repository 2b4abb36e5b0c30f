"""A lock that a killed build left is removed, and never one of a build under way."""

import os
import time

import pytest

from cogds.runtime import builds
from cogds.runtime.builds import clear_builds
from tests.runtime.processes import heard, line, script

HOLDER = """
    import sys
    from pathlib import Path
    from cogds.runtime.builds import clear_builds
    clear_builds(Path(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def freed():
    yield
    for descriptor in builds._held:
        os.close(descriptor)
    builds._held.clear()


def left(root, age_s=0.0):
    lock = root / "py311_cpu/some_op/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age_s,) * 2)
    return lock


def test_what_a_killed_process_left_is_removed(tmp_path):
    lock = left(tmp_path)
    with script(HOLDER, str(tmp_path)) as process:
        assert line(process) == "ready"
        assert heard(process) == f"removed {lock}, which a process left that was killed while it built a DeepSpeed op"
    assert not lock.exists()


def test_while_another_process_is_there_nothing_is_removed(tmp_path, capsys):
    with script(HOLDER, str(tmp_path)) as process:
        assert line(process) == "ready"
        young = left(tmp_path)  # it builds
        clear_builds(tmp_path)
        assert young.exists()
        assert capsys.readouterr().err == ""
        os.utime(young, (time.time() - 600,) * 2)
        clear_builds(tmp_path)
        assert young.exists()
        assert "has been there for 10 minutes" in capsys.readouterr().err
    for descriptor in builds._held:  # those of this process
        os.close(descriptor)
    builds._held.clear()
    clear_builds(tmp_path)  # the other has been killed
    assert not young.exists()


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "file").touch()
    clear_builds(tmp_path / "file/below")
