import pytest

from cogds.files import whole_file, whole_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    with whole_file(tmp_path / "new/a.json") as partial:
        partial.write_text("1")
        assert partial.suffix == ".json"
        assert not (tmp_path / "new/a.json").exists()
    assert (tmp_path / "new/a.json").read_text() == "1"
    assert names(tmp_path / "new") == ["a.json"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("old")

    def write_half():
        with whole_file(tmp_path / "a") as partial:
            partial.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_of_two_that_make_a_folder_the_first_stays(tmp_path):
    with whole_folder(tmp_path / "a") as one, whole_folder(tmp_path / "a") as other:
        (one / "x").write_text("one")
        (other / "x").write_text("other")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a/x").read_text() == "other"  # the inner block ended first


def test_a_failure_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no"), whole_folder(tmp_path / "a"):
        raise ValueError("no")
    assert names(tmp_path) == []
