import gc
import sys
from types import ModuleType

import pytest

from cogds.errors import EXIT_USER_ERROR, UserError
from cogds.start import start


@pytest.fixture
def entry(monkeypatch):
    """`entry(main)`: the name of a module with it."""

    def make(main):
        module = ModuleType("cogds_entry")
        module.main = main
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module.__name__

    yield make
    gc.unfreeze()


def test_what_is_imported_is_left_out_of_the_search_for_garbage(entry, tmp_path):
    seen = []
    assert start(entry(lambda *defaults: seen.extend([defaults, gc.isenabled(), gc.get_freeze_count()])), tmp_path) == 0
    defaults, enabled, frozen = seen
    assert (defaults, enabled) == ((tmp_path,), True)
    assert frozen > 100_000


def test_the_exit_code_is_that_of_the_command_line(entry, capsys):
    def main():
        raise UserError("a: is b")

    assert start(entry(main)) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: a: is b\n"


def test_a_module_that_cannot_be_imported_leaves_the_collector_on():
    with pytest.raises(ModuleNotFoundError):
        start("cogds.nothing")
    gc.unfreeze()
    assert gc.isenabled()
