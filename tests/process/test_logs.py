"""What reaches stdout and stderr, on which rank and at which level."""

import io
import logging
import socket
import sys

import pytest

from cogds.process.logs import RESULT, configure_logging

logger = logging.getLogger("cogds.test")


def log_all():
    logger.debug("detail")
    logger.info("fact")
    logger.log(RESULT, "result")
    logger.warning("disk")
    logger.error("end")


@pytest.mark.parametrize(
    "level, stdout",
    [
        (logging.DEBUG, ["detail", "fact", "result"]),
        (logging.INFO, ["fact", "result"]),
        (RESULT, ["result"]),
    ],
)
def test_the_level_selects_what_rank_0_prints(capsys, level, stdout):
    configure_logging(0, level)
    log_all()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == stdout
    assert printed.err.splitlines() == ["warning: disk", "error: end"]


def test_other_ranks_log_only_warnings_and_errors_and_name_themselves(capsys):
    configure_logging(3, logging.DEBUG)
    log_all()
    printed = capsys.readouterr()
    assert printed.out == ""
    host = socket.gethostname()
    assert printed.err.splitlines() == [f"warning on rank 3 ({host}): disk", f"error on rank 3 ({host}): end"]


def test_configuring_twice_prints_once(capsys):
    configure_logging()
    configure_logging()
    logger.info("fact")
    assert capsys.readouterr().out == "fact\n"


def test_libraries_keep_their_own_loggers(capsys, caplog):
    logging.getLogger("diffusers").warning("theirs")
    assert [record.message for record in caplog.records] == ["theirs"]
    logger.warning("ours")
    assert capsys.readouterr().err == "warning: ours\n"


class Closed(io.StringIO):
    def write(self, _text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_is_gone_ends_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Closed())
    logger.info("fact")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    logger.info("fact")
    assert capsys.readouterr().err == ""
