"""Keys, and what is found by them: across chunks, with nulls, with what stands there twice."""

import pyarrow as pa

from cogds.data.manifest.file_keys import condition_kinds, file_key, file_keys, first_occurrences, look_up

CHUNKS = [[b"a", None, b"b"], [], [b"b", b"c", b"a"], [None]]


def keys(*letters: bytes | None) -> pa.Array:
    return pa.array([letter and letter * 16 for letter in letters], pa.binary(16))


def test_a_key_is_of_the_file_and_how_it_is_opened() -> None:
    paths = pa.array(["/a", "/b", None])
    videos, images = file_keys(pa.array(["video"] * 3), paths), file_keys(condition_kinds(3), paths)
    assert len({*videos.to_pylist()[:2], *images.to_pylist()[:2]}) == 4
    assert (videos[2].as_py(), images[2].as_py()) == (None, None)
    assert videos[0].as_py() == file_key("video", "/a")
    assert file_key("video", "/\udce9") is None


def test_the_first_occurrences_key() -> None:
    fresh = first_occurrences([keys(*chunk) for chunk in CHUNKS])
    assert [mask.tolist() for mask in fresh] == [[True, False, True], [], [False, True, False], [False]]


def test_rows_are_found_at_their_first_place() -> None:
    table = pa.table({"key": keys(b"c", b"b", None, b"c"), "number": [1, 2, 3, 4]})
    chunks = [keys(*chunk) for chunk in CHUNKS]
    found = [one["number"].to_pylist() for one in look_up(pa.concat_tables([table, table]), chunks)]
    assert found == [[None, None, 2], [], [2, 1, None], [None]]
    nowhere = [one["number"].to_pylist() for one in look_up(table.slice(0, 0), chunks)]
    assert nowhere == [[None] * len(chunk) for chunk in CHUNKS]
