"""Keys of files, and look-up by them across chunks, with nulls and duplicates."""

import pyarrow as pa

from cogds.data.manifest.file_keys import CONDITION, file_key, file_keys, first_occurrences, kinds_of, look_up

CHUNKS = [[b"a", None, b"b"], [], [b"b", b"c", b"a"], [None]]


def keys(*letters: bytes | None) -> pa.Array:
    return pa.array([letter and letter * 16 for letter in letters], pa.binary(16))


def test_a_key_depends_on_the_path_and_the_kind() -> None:
    paths = pa.array(["/a", "/b", None])
    videos, images = file_keys(pa.array(["video"] * 3), paths), file_keys(kinds_of(CONDITION, 3), paths)
    assert len({*videos.to_pylist()[:2], *images.to_pylist()[:2]}) == 4
    assert (videos[2].as_py(), images[2].as_py()) == (None, None)
    assert videos[0].as_py() == file_key("video", "/a")
    assert file_key("video", "/\udce9") is None


def test_first_occurrences() -> None:
    masks = first_occurrences([keys(*chunk) for chunk in CHUNKS])
    assert [mask.tolist() for mask in masks] == [[True, False, True], [], [False, True, False], [False]]


def test_look_up_takes_the_first_row_with_a_key() -> None:
    table = pa.table({"key": keys(b"c", b"b", None, b"c"), "number": [1, 2, 3, 4]})
    chunks = [keys(*chunk) for chunk in CHUNKS]
    numbers = [columns["number"].to_pylist() for columns in look_up(pa.concat_tables([table, table]), chunks)]
    assert numbers == [[None, None, 2], [], [2, 1, None], [None]]
    numbers = [columns["number"].to_pylist() for columns in look_up(table.slice(0, 0), chunks)]
    assert numbers == [[None] * len(chunk) for chunk in CHUNKS]
