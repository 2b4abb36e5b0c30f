import os
import pickle

import pyarrow as pa
import pytest

import cogds.data.loading.index
from cogds.data.loading.index import ClipIndex, IndexedCaption, write_index
from cogds.errors import UserError
from tests.data.loading.indexes import BUCKETS, PLACES, captions_of, rows


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(cogds.data.loading.index, "ROWS_PER_BATCH", 7)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("cut", [0, 1, 7, 19])
def test_rows_are_read_by_number(tmp_path, cut):
    table = rows(20)
    index = write_index(tmp_path, [table[:cut], table[cut:]], BUCKETS, [(5, 6), (0, 0), (9, 0)], PLACES)
    index = pickle.loads(pickle.dumps(index))
    assert (len(index), index.buckets, index.sizes) == (20, BUCKETS, ((5, 6), (0, 0), (9, 0)))
    for row in range(20):
        clip = index[row]
        assert (clip.path, clip.start_s) == (f"clip {row}.mp4", row / 16)
        assert clip.captions == tuple(
            IndexedCaption(f"caption {k}", f"{k:02x}" * 16, "c.safetensors" if k % 2 else "") for k in captions_of(row)
        )
        assert index.num_captions(row) == len(clip.captions)
        assert clip.clip_key == f"{row:032x}"
        assert clip.bucket == (0 if row < 11 else 2)
        assert clip.shape == BUCKETS[clip.bucket]
        assert clip.clip_place == ["", "a.safetensors", "b.safetensors"][row % 3]
    assert index.row(2, 3) == 14
    assert index.column("path").to_pylist() == table.column("path").to_pylist()
    assert index.keys("caption_keys") == {f"{i:02x}" * 16 for i in range(4)}
    assert len(index.names()) == 20
    for row in (-1, 20):
        with pytest.raises(IndexError):
            index[row]
        with pytest.raises(IndexError):
            index.num_captions(row)


def test_a_file_is_named_after_its_content(tmp_path):
    first = write_index(tmp_path, [rows(4)], BUCKETS, [(4,), (0,), (0,)], PLACES)
    same = write_index(tmp_path, [rows(4)[:1], rows(4)[1:]], BUCKETS, [(4,), (0,), (0,)], PLACES)
    other = write_index(tmp_path, [rows(4)], BUCKETS, [(3,), (1,), (0,)], PLACES)
    assert first.path == same.path != other.path
    assert sorted(os.listdir(tmp_path)) == sorted({first.path.name, other.path.name})


def test_invalid_sizes_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="4 rows for sizes"):
        write_index(tmp_path, [rows(4)], BUCKETS, [(3,), (0,), (0,)], PLACES)
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match=r"\.arrow: "):
        len(ClipIndex(tmp_path / "none.arrow"))
    (tmp_path / "torn.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(UserError, match=r"\.arrow: "):
        len(ClipIndex(tmp_path / "torn.arrow"))


def test_an_index_of_another_version_is_refused(tmp_path):
    table = rows(4).drop_columns(["captions"])
    with pa.ipc.new_file(str(tmp_path / "old.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"old\.arrow: another version"):
        ClipIndex(tmp_path / "old.arrow").names()
