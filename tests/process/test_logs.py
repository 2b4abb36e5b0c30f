"""Records on stdout and stderr, by rank and level."""

import io
import logging
import socket
import sys

import pytest

from cogds.errors import UserError
from cogds.process.logs import RESULT, configure_logging, log_failure

logger = logging.getLogger("cogds.test")


def log_all():
    logger.debug("a detail")
    logger.info("a fact")
    logger.log(RESULT, "a result")
    logger.warning("a warning")
    logger.error("an error")


@pytest.mark.parametrize(
    "level, stdout",
    [
        (logging.DEBUG, ["a detail", "a fact", "a result"]),
        (logging.INFO, ["a fact", "a result"]),
        (RESULT, ["a result"]),
    ],
)
def test_the_level_selects_the_output_of_rank_0(capsys, level, stdout):
    configure_logging(0, level)
    log_all()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == stdout
    assert printed.err.splitlines() == ["warning: a warning", "error: an error"]


def test_other_ranks_log_only_warnings_and_errors_with_rank_and_host(capsys):
    configure_logging(3, logging.DEBUG)
    log_all()
    printed = capsys.readouterr()
    assert printed.out == ""
    place = f"on rank 3 ({socket.gethostname()})"
    assert printed.err.splitlines() == [f"warning {place}: a warning", f"error {place}: an error"]


def test_configuring_twice_prints_once(capsys):
    configure_logging()
    configure_logging()
    logger.info("a fact")
    assert capsys.readouterr().out == "a fact\n"


@pytest.mark.parametrize(
    "error, has_traceback", [(UserError("no disk"), False), (OSError("full"), False), (TypeError("planted"), True)]
)
def test_a_failure_that_may_be_a_bug_is_logged_with_its_traceback(capsys, error, has_traceback):
    try:
        raise error
    except Exception as caught:
        log_failure(logger, "an image is missing", caught)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: an image is missing\n")
    assert ("Traceback" in warning and __file__ in warning) == has_traceback


def test_loggers_of_libraries_are_not_changed(capsys, caplog):
    logging.getLogger("diffusers").warning("library")
    assert [record.message for record in caplog.records] == ["library"]
    logger.warning("cogds")
    assert capsys.readouterr().err == "warning: cogds\n"


class BrokenPipe(io.StringIO):
    def write(self, _text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_closed_stdout_is_not_an_error(monkeypatch, capsys):
    closed = io.StringIO()
    closed.close()
    for stdout in (BrokenPipe(), closed):
        monkeypatch.setattr(sys, "stdout", stdout)
        logger.info("a fact")
    assert capsys.readouterr().err == ""
