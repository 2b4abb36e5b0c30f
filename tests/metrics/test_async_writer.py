import errno
import os
import threading

import pytest

from cogds.metrics import async_writer as module
from cogds.metrics.async_writer import MAX_KEPT, WARN_EVERY_S, Courier, Outlet


class SlowOutlet(Outlet):
    """A disk that takes each writing when it is let: what a network file system does that has lost its server."""

    def __init__(self, path):
        super().__init__(path)
        self.may_write, self.is_asked = threading.Event(), threading.Event()

    def write(self, records=()):
        self.is_asked.set()
        self.may_write.wait(30)
        super().write(records)


def test_a_disk_that_does_not_answer_holds_up_nobody(tmp_path):
    courier, outlet = Courier(), SlowOutlet(tmp_path / "file")
    threads = []
    outlet.write = lambda records=(), write=outlet.write: (threads.append(threading.current_thread()), write(records))
    for number in range(100):
        courier.hand(outlet, [b"%d\n" % number])
    assert outlet.is_asked.wait(10)
    assert not (tmp_path / "file").exists()
    assert not courier.settle(0.05)
    outlet.may_write.set()
    courier.close()
    assert (tmp_path / "file").read_text().split() == [str(number) for number in range(100)]
    assert threading.main_thread() not in threads


def test_the_end_of_a_run_does_not_wait_for_ever_and_says_what_is_lost(tmp_path, capsys):
    courier, outlet = Courier(), SlowOutlet(tmp_path / "file")
    courier.hand(outlet, [b"one"])
    assert outlet.is_asked.wait(10)
    courier.hand(outlet, [b"two", b"three"])
    courier.close(timeout_s=0.05)
    assert f"{tmp_path}/file: too slow; 2 records or more were not written" in capsys.readouterr().err
    outlet.may_write.set()


def test_what_waits_is_bounded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 10)
    courier, outlet = Courier(), SlowOutlet(tmp_path / "file")
    courier.hand(outlet, [b"first"])
    assert outlet.is_asked.wait(10)
    for _ in range(5):
        courier.hand(outlet, [b"123456"])
    outlet.may_write.set()
    courier.close()
    assert (tmp_path / "file").read_text() == "first123456"
    assert "4 records or more were not written" in capsys.readouterr().err


def test_a_bug_in_one_writing_stops_none_after_it(tmp_path, capsys):
    courier, good, bad = Courier(), Outlet(tmp_path / "good"), Outlet(tmp_path / "bad")
    bad.write = lambda _=(): 1 / 0
    courier.hand(bad, [b"x"])
    courier.hand(good, [b"y"])
    courier.close()
    assert (tmp_path / "good").read_text() == "y"
    assert "bad: ZeroDivisionError" in capsys.readouterr().err


def test_pictures_that_wait_are_bounded_by_their_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 100)
    outlet = Outlet(tmp_path / "no" / "folder" / "file")
    for number in range(5):
        outlet.write([b"%d" % number * 40])
    (tmp_path / "no").mkdir()
    outlet.write([b"."])
    assert (tmp_path / "no/folder/file").read_text() == "3" * 40 + "4" * 40 + "."
    assert "3 older ones are lost" in capsys.readouterr().err


def test_warnings_come_once_a_minute(tmp_path, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    outlet = Outlet(tmp_path / "no" / "folder" / "file")
    said = []
    for _ in range(5):
        for _ in range(100):
            outlet.write([b"x"])
        said.append(len(capsys.readouterr().err.splitlines()))
        now[0] += WARN_EVERY_S / 2 + 1
    assert said == [1, 0, 1, 0, 1]


def test_what_is_kept_is_bounded_and_what_that_loses_is_said(tmp_path, capsys):
    outlet = Outlet(tmp_path / "no" / "folder" / "file")
    for k in range(3):
        outlet.write([b"%d-%d\n" % (k, n) for n in range(MAX_KEPT // 2)])
    outlet.write([b"last\n"])
    (tmp_path / "no").mkdir()
    outlet.write()
    written = (tmp_path / "no/folder/file").read_text().splitlines()
    assert len(written) == MAX_KEPT
    assert (written[0], written[-1]) == ("1-1", "last")
    assert f"{MAX_KEPT} records with it; {MAX_KEPT // 2 + 1} older ones are lost" in capsys.readouterr().err


@pytest.mark.parametrize("late", [False, True])
def test_half_a_record_never_stays(tmp_path, monkeypatch, late):
    """Written in part, or refused when the file is closed, as network disks do; the file is cut at the next chance."""
    outlet, failing = Outlet(tmp_path / "file", b"head\n"), [True]
    outlet.write([b"one\n"])
    real_pwrite, real_truncate, real_close = os.pwrite, os.ftruncate, os.close

    def fail(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    def pwrite(descriptor, data, offset):
        if failing and not late:
            if len(data) > 3:
                return real_pwrite(descriptor, data[:3], offset)
            fail()
        return real_pwrite(descriptor, data, offset)

    def close(descriptor):
        real_close(descriptor)
        if failing and late:
            fail()

    monkeypatch.setattr(module.os, "pwrite", pwrite)
    monkeypatch.setattr(module.os, "close", close)
    monkeypatch.setattr(module.os, "ftruncate", lambda *args: fail() if failing else real_truncate(*args))
    outlet.write([b"two\n"])
    assert (tmp_path / "file").read_bytes() != b"head\none\n"
    outlet.write([b"three\n"])
    failing.clear()
    outlet.write([b"four\n"])
    whole = b"head\none\ntwo\nthree\nfour\n"
    assert (tmp_path / "file").read_bytes() == whole
    # Where the record itself was given up meanwhile, too.
    monkeypatch.setattr(module, "MAX_KEPT", 1)
    outlet = Outlet(tmp_path / "file")
    failing.append(True)
    outlet.write([b"a long record\n"])
    failing.clear()
    outlet.write([b"x\n"])
    assert (tmp_path / "file").read_bytes() == whole + b"x\n"
