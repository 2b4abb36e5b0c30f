"""A lock that a killed build left is removed, and never one of a build under way."""

import os
import subprocess
import time

import pytest

from cogds.process import extension_locks as builds
from cogds.process.extension_locks import announce_build, clear_builds
from tests.process.processes import heard, line, script

HOLDER = """
    import sys
    from pathlib import Path
    from cogds.process.extension_locks import clear_builds
    clear_builds(Path(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def freed():
    yield
    let_go()


def let_go():
    for descriptor in builds._held:
        os.close(descriptor)
    builds._held.clear()


def left(root):
    lock = root / "py311_cpu/some_op/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def test_what_a_killed_process_left_is_removed(tmp_path):
    lock = left(tmp_path)
    with script(HOLDER, str(tmp_path)) as process:
        assert line(process) == "ready"
        assert heard(process) == f"removed {lock}, which a process left that was killed while it built a DeepSpeed op"
    assert not lock.exists()


def test_while_another_process_is_there_nothing_is_removed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(builds, "YOUNG_S", 1.0)
    with script(HOLDER, str(tmp_path)) as process:
        assert line(process) == "ready"
        lock = left(tmp_path)
        start = time.monotonic()
        clear_builds(tmp_path)
        assert time.monotonic() - start > 0.9  # another node may have begun to build
        assert lock.exists()
        assert f"{lock} is there and nobody builds here" in capsys.readouterr().err
    let_go()
    clear_builds(tmp_path)  # the other has been killed
    assert not lock.exists()


def test_a_build_under_way_is_waited_for_by_nobody_but_who_would_remove_its_lock(tmp_path, capsys):
    lock = left(tmp_path)
    with script(HOLDER, str(tmp_path / "elsewhere")) as other, script(HOLDER, str(tmp_path)) as ours:
        assert line(other) == "ready"
        heard(ours)  # removed the lock
        lock.touch()
        compiler = subprocess.Popen(["sleep", "60"], cwd=lock.parent)
        try:
            start = time.monotonic()
            clear_builds(tmp_path)  # beside a process of ours: torch itself waits
            assert time.monotonic() - start < 5
            assert capsys.readouterr().err == ""
        finally:
            compiler.kill()
            compiler.wait()


def test_compilers_that_outlived_a_killed_build_are_waited_for(tmp_path, capsys):
    lock = left(tmp_path)
    compiler = subprocess.Popen(["sleep", "2"], cwd=lock.parent)
    clear_builds(tmp_path)
    assert compiler.poll() == 0
    assert "removed" in capsys.readouterr().err
    assert not lock.exists()


def test_other_files_called_lock_stay(tmp_path):
    deep, full = tmp_path / "a/b/c/lock", tmp_path / "a/lock"
    deep.parent.mkdir(parents=True)
    deep.touch()
    full.write_text("pid 7")
    clear_builds(tmp_path)
    assert deep.exists()
    assert full.exists()


def test_a_build_is_announced_once(tmp_path, capsys):
    announce_build(tmp_path, "some_op")
    assert "some_op" in capsys.readouterr().out
    (tmp_path / "py311_cpu/some_op").mkdir(parents=True)
    (tmp_path / "py311_cpu/some_op/some_op.so").touch()
    announce_build(tmp_path, "some_op")
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "file").touch()
    clear_builds(tmp_path / "file/below")
