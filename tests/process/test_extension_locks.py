"""Locks of killed builds are removed. Locks of running builds are not."""

import os
import subprocess
import time

import pytest

from cogds.process import extension_locks
from cogds.process.extension_locks import announce_build, remove_stale_locks
from tests.process.processes import read_stderr, read_stdout, script

HOLDER = """
    import sys
    from pathlib import Path
    from cogds.process.extension_locks import remove_stale_locks
    remove_stale_locks(Path(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def clean_up():
    yield
    release_file_locks()


def release_file_locks():
    for descriptor in extension_locks._descriptors:
        os.close(descriptor)
    extension_locks._descriptors.clear()


def create_lock(root):
    lock = root / "py311_cpu/some_op/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def test_a_lock_of_a_killed_process_is_removed(tmp_path):
    lock = create_lock(tmp_path)
    with script(HOLDER, str(tmp_path)) as process:
        assert read_stdout(process) == "ready"
        assert read_stderr(process).startswith(f"{lock}: ")
    assert not lock.exists()


def test_nothing_is_removed_while_another_process_uses_the_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extension_locks, "MIN_STALE_AGE_S", 1.0)
    with script(HOLDER, str(tmp_path)) as process:
        assert read_stdout(process) == "ready"
        lock = create_lock(tmp_path)
        start = time.monotonic()
        remove_stale_locks(tmp_path)
        assert time.monotonic() - start > 0.9  # it has waited, because another node may be building
        assert lock.exists()
        assert f"warning: {lock}: " in capsys.readouterr().err
    release_file_locks()
    remove_stale_locks(tmp_path)  # the other process has ended
    assert not lock.exists()


def test_a_process_that_would_not_remove_the_lock_does_not_wait_for_a_build(tmp_path, capsys):
    lock = create_lock(tmp_path)
    with script(HOLDER, str(tmp_path)) as process:
        read_stderr(process)  # it has removed the lock
        lock.touch()
        compiler = subprocess.Popen(["sleep", "60"], cwd=lock.parent)
        try:
            start = time.monotonic()
            remove_stale_locks(tmp_path)  # torch itself waits
            assert time.monotonic() - start < 5
            assert capsys.readouterr().err == ""
        finally:
            compiler.kill()
            compiler.wait()


def test_remaining_compilers_of_a_killed_build_are_waited_for(tmp_path, capsys):
    lock = create_lock(tmp_path)
    compiler = subprocess.Popen(["sleep", "0.7"], cwd=lock.parent)
    remove_stale_locks(tmp_path)
    assert compiler.poll() == 0
    assert str(lock) in capsys.readouterr().err
    assert not lock.exists()


def test_other_files_named_lock_are_not_removed(tmp_path):
    deeper, not_empty = tmp_path / "a/b/c/lock", tmp_path / "a/lock"
    deeper.parent.mkdir(parents=True)
    deeper.touch()
    not_empty.write_text("pid 7")
    remove_stale_locks(tmp_path)
    assert deeper.exists()
    assert not_empty.exists()


def test_a_build_is_announced_once_per_environment(tmp_path, capsys):
    announce_build(tmp_path, "some_op", tmp_path / "deepspeed")
    assert "some_op" in capsys.readouterr().out
    folder = tmp_path / "py311_cpu/some_op"
    folder.mkdir(parents=True)
    (folder / "some_op.so").touch()
    (folder / "build.ninja").write_text(f"cflags = -I{tmp_path}/deepspeed/ops\n")
    announce_build(tmp_path, "some_op", tmp_path / "deepspeed")
    assert capsys.readouterr().out == ""
    announce_build(tmp_path, "some_op", tmp_path / "another/deepspeed")
    assert "some_op" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_not_an_error(tmp_path):
    (tmp_path / "file").touch()
    remove_stale_locks(tmp_path / "file/below")
