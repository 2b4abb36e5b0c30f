"""The list of planted bugs fits the code. `make test-planted` runs it."""

from tests.conftest import ROOT
from tests.planted.check import read_bugs


def test_each_bug_changes_one_place_and_names_a_test():
    for bug in read_bugs():
        assert (ROOT / bug.file).read_text().count(bug.old) == 1, bug
        assert bug.new != bug.old, bug
        file, _, name = bug.test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), bug


def test_every_package_has_a_planted_bug():
    packages = {bug.file.split("/")[1] for bug in read_bugs() if bug.file.startswith("cogds/")}
    expected = {path.parent.name for path in (ROOT / "cogds").glob("*/__init__.py")}
    assert expected <= packages
