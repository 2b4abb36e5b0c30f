"""Disks that are full, slow, hung or working again: which records are written, kept or lost, and which warnings."""

import resource
import threading

import pytest

from cogds.metrics import async_writer
from cogds.metrics.async_writer import WARN_INTERVAL_S, AppendFile, AsyncWriter


class SlowFile(AppendFile):
    """A file on a disk that hangs until `may_write` is set, like a network file system without its server."""

    def __init__(self, path):
        super().__init__(path)
        self.may_write, self.is_writing = threading.Event(), threading.Event()
        self.threads = set()

    def write(self, records=()):
        self.threads.add(threading.current_thread())
        self.is_writing.set()
        self.may_write.wait(30)
        super().write(records)


@pytest.fixture
def writer():
    writer = AsyncWriter()
    yield writer
    writer.close(timeout_s=0)


@pytest.fixture
def slow_file(tmp_path):
    file = SlowFile(tmp_path / "file")
    yield file
    file.may_write.set()


def test_a_hung_disk_delays_no_caller_and_gets_all_records_in_order(writer, slow_file):
    for number in range(100):
        writer.submit(slow_file, [b"%d\n" % number])
    assert slow_file.is_writing.wait(10)
    assert not slow_file.path.exists()
    assert not writer.drain(0.05)
    slow_file.may_write.set()
    writer.close()
    assert slow_file.path.read_text().split() == [str(number) for number in range(100)]
    assert threading.current_thread() not in slow_file.threads


def test_closing_does_not_wait_forever_and_reports_lost_records(writer, slow_file, capsys):
    writer.submit(slow_file, [b"one"])
    assert slow_file.is_writing.wait(10)
    writer.submit(slow_file, [b"two", b"three"])
    writer.close(timeout_s=0.05)
    (warning,) = capsys.readouterr().err.splitlines()
    assert str(slow_file.path) in warning
    assert " 2 records" in warning


def test_the_queue_is_bounded(monkeypatch, slow_file, capsys):
    monkeypatch.setattr(async_writer, "MAX_QUEUED", 1)
    writer = AsyncWriter()
    writer.submit(slow_file, [b"first"])
    assert slow_file.is_writing.wait(10)
    for _ in range(5):
        writer.submit(slow_file, [b"123456"])
    slow_file.may_write.set()
    writer.close()
    assert slow_file.path.read_text() == "first123456"
    assert " 4 records" in capsys.readouterr().err


def test_a_bug_in_one_sink_does_not_stop_the_others(writer, tmp_path, capsys):
    good, bad = AppendFile(tmp_path / "good"), AppendFile(tmp_path / "bad")
    bad.write = lambda _=(): 1 / 0
    writer.submit(bad, [b"x"])
    writer.submit(good, [b"y"])
    writer.close()
    assert good.path.read_text() == "y"
    assert f"{bad.path}: ZeroDivisionError" in capsys.readouterr().err


@pytest.fixture
def missing_folder(tmp_path):
    """A file that cannot be written until its folder's parent exists."""
    return AppendFile(tmp_path / "no/folder/file")


def test_pending_records_are_bounded_and_their_loss_is_reported(missing_folder, monkeypatch, capsys):
    monkeypatch.setattr(async_writer, "MAX_PENDING_BYTES", 100)
    for number in range(5):
        missing_folder.write([b"%d" % number * 40])
    missing_folder.path.parent.parent.mkdir()
    missing_folder.write([b"."])
    assert missing_folder.path.read_text() == "3" * 40 + "4" * 40 + "."
    assert ", 3 older ones are lost" in capsys.readouterr().err.splitlines()[-1]


def test_a_failing_file_is_reported_once_a_minute(missing_folder, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(async_writer.time, "monotonic", lambda: now[0])
    num_warnings = []
    for _ in range(5):
        for _ in range(100):
            missing_folder.write([b"x"])
        num_warnings.append(len(capsys.readouterr().err.splitlines()))
        now[0] += WARN_INTERVAL_S / 2 + 1
    assert num_warnings == [1, 0, 1, 0, 1]


@pytest.fixture
def limited():
    """`limited(size)` limits the size of files that this process writes. The kernel writes a part up to the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("keeps_record", [True, False])
@pytest.mark.parametrize("is_removed_at_once", [True, False])
def test_an_incomplete_record_never_stays(tmp_path, limited, monkeypatch, keeps_record, is_removed_at_once):
    def refuse(*_):
        raise OSError(5, "Input/output error")

    if not is_removed_at_once:
        monkeypatch.setattr(async_writer.os, "truncate", refuse)
    file = AppendFile(tmp_path / "file", b"header\n")
    file.write([b"one\n"])
    limited(13)
    file.write([b"two\n"])
    assert file.path.read_bytes() == b"header\none\n" + b"tw" * (not is_removed_at_once)
    if not keeps_record:
        monkeypatch.setattr(async_writer, "MAX_PENDING_BYTES", 1)
    limited(resource.RLIM_INFINITY)
    file.write([b"three\n"])
    assert file.path.read_bytes() == b"header\none\n" + b"two\n" * keeps_record + b"three\n"


def test_a_disk_that_refuses_when_the_file_is_closed_loses_nothing(tmp_path, monkeypatch):
    """A network disk may report that it is full only after everything seems to be written."""
    file = AppendFile(tmp_path / "file")
    file.write([b"one\n"])
    open_file = type(file.path).open

    class LateError:
        def __init__(self, path):
            self.file = open_file(path, "ab")

        def __enter__(self):
            return self.file

        def __exit__(self, *_):
            self.file.close()
            raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(type(file.path), "open", lambda path, _mode: LateError(path))
    file.write([b"two\n"])
    monkeypatch.undo()
    file.write([b"three\n"])
    assert file.path.read_text() == "one\ntwo\nthree\n"
