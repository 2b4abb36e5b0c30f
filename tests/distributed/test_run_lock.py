"""Two runs in one folder. A file lock belongs to an open file, so one process can try to hold two."""

import fcntl
import os
import signal
import threading
import time

import pytest

from cogds.distributed.run_lock import LOCK_FILE, hold_run_lock
from cogds.distributed.world import World
from cogds.errors import UserError

ALONE = World(0, 1, 0, 1)


def test_a_second_run_is_refused_with_the_holders_process(tmp_path, capsys):
    second = hold_run_lock(ALONE, tmp_path, wait_s=0.05)
    with hold_run_lock(ALONE, tmp_path), pytest.raises(UserError, match=f"output_dir: .*process {os.getpid()}"):
        second.__enter__()
    assert capsys.readouterr().out.count(str(tmp_path)) == 1
    with hold_run_lock(ALONE, tmp_path, wait_s=0):
        pass


def test_a_waiting_run_starts_when_the_first_ends(tmp_path):
    entered, left = threading.Event(), threading.Event()

    def first():
        with hold_run_lock(ALONE, tmp_path):
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    threading.Timer(0.2, left.set).start()
    with hold_run_lock(ALONE, tmp_path, wait_s=30):
        assert left.is_set()
    thread.join()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    reader, writer = os.pipe()
    run = os.fork()
    if not run:
        try:
            lock = hold_run_lock(ALONE, tmp_path)
            lock.__enter__()
            if not os.fork():
                os.write(writer, b"%d" % os.getpid())
                time.sleep(60)
        finally:
            os._exit(0)
    os.close(writer)
    worker = int(os.read(reader, 20))
    os.waitpid(run, 0)
    try:
        with hold_run_lock(ALONE, tmp_path, wait_s=0):
            os.kill(worker, 0)  # the child is still alive
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    with hold_run_lock(ALONE, tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
    assert str(tmp_path) in capsys.readouterr().err
