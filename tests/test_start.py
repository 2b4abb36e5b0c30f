import gc

import pytest

from cogds.start import importing


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()


def test_what_is_imported_is_left_out_of_the_search_for_garbage():
    with importing():
        assert not gc.isenabled()
        kept = [[]]
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000
    assert not any(one is kept for one in gc.get_objects())


def test_an_import_that_fails_leaves_the_collector_on():
    with pytest.raises(ModuleNotFoundError), importing():
        import cogds.nothing  # noqa: F401
    assert gc.isenabled()
