"""The whole command on one rank, without any check that takes time."""

import pytest

from cogds.arguments import parse_args
from cogds.errors import BugReported, UserError
from cogds.preflight import main as module


@pytest.fixture
def run(monkeypatch):
    """Run the command with this error in the check of versions, and without a config."""

    def refuse(*_):
        raise UserError("no config here")

    def run_with(error):
        def fail():
            raise error

        monkeypatch.setattr(module, "load_preflight_job", refuse)
        monkeypatch.setattr(module, "inspect_versions", fail)
        module.main(parse_args("preflight", ["--skip", "network"], ""))

    return run_with


@pytest.mark.parametrize("error", [TypeError("planted"), AttributeError("planted"), KeyError("planted")])
def test_a_bug_in_a_check_ends_with_its_traceback(run, capsys, error):
    with pytest.raises(BugReported):
        run(error)
    said = capsys.readouterr()
    assert "in fail\n" in said.err
    assert "not ready" in said.out


@pytest.mark.parametrize("error", [OSError("stale file handle"), RuntimeError("no CUDA driver")])
def test_a_fault_of_the_machine_is_a_finding(run, capsys, error):
    with pytest.raises(UserError):
        run(error)
    said = capsys.readouterr()
    assert str(error) in said.out
    assert "Traceback" not in said.err
