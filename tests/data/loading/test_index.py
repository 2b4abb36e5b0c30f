import os
import pickle

import pyarrow as pa
import pytest

import cogds.data.loading.index
from cogds.core.geometry import ClipShape
from cogds.data.loading.index import ClipIndex, write_index
from cogds.errors import UserError

BUCKETS = (ClipShape(9, 64, 96), ClipShape(17, 96, 64), ClipShape(1, 64, 64))
PLACES = {"clips": ["a.safetensors", "b.safetensors"], "captions": ["c.safetensors"]}


def rows(num):
    return pa.table(
        {
            "path": [f"clip {i}.mp4" for i in range(num)],
            "kind": ["video"] * num,
            "image_path": pa.array([None] * num, pa.string()),
            "caption": [f"caption {i % 3}" for i in range(num)],
            "start_s": [i / 16 for i in range(num)],
            "clip_key": pa.array([i.to_bytes(16, "big") for i in range(num)], pa.binary(16)),
            "caption_key": pa.array([bytes([i % 3] * 16) for i in range(num)], pa.binary(16)),
            "clip_place": pa.array([i % 3 - 1 for i in range(num)], pa.int32()),
            "caption_place": pa.array([0] * num, pa.int32()),
        }
    )


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
        assert (clip.path, clip.start_s, clip.caption) == (f"clip {row}.mp4", row / 16, f"caption {row % 3}")
        assert clip.clip_key == f"{row:032x}"
        assert clip.bucket == (0 if row < 11 else 2)
        assert clip.shape == BUCKETS[clip.bucket]
        assert clip.clip_place == ["", "a.safetensors", "b.safetensors"][row % 3]
        assert clip.caption_place == "c.safetensors"
    assert index.row(2, 3) == 14
    assert index.column("path").to_pylist() == table.column("path").to_pylist()
    assert index.keys("caption_key") == {f"{i:02x}" * 16 for i in range(3)}
    for row in (-1, 20):
        with pytest.raises(IndexError):
            index[row]


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
