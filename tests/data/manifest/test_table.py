"""The manifest's file: its name, and what is not taken for one."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cogds.data.manifest import table as manifest
from cogds.data.manifest.table import DataSet
from cogds.errors import UserError
from tests.data.surveyed import survey


def test_the_name_follows_from_the_data_sets(tmp_path: Path) -> None:
    sets = [DataSet("/data/clips"), DataSet("/data/t.parquet", {"path": "url", "caption": "words"})]
    others = (sets, sets[:1], sets[1:], sets[::-1], [sets[0], DataSet("/data/t.parquet")])
    assert len({manifest.manifest_file(some, tmp_path) for some in others}) == len(others)
    assert manifest.manifest_file(sets, tmp_path).name.startswith("clips-")
    assert manifest.manifest_file(sets, tmp_path, str(tmp_path / "x")) == tmp_path / "x"


def test_another_table_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"path": ["a"]}), file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="table of something else and would be overwritten"):
        survey(folder, file)
    assert file.read_bytes() == before
    file.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"cannot be read .*: delete it, it is made anew"):
        survey(folder, file)
    pq.write_table(manifest.SCHEMA.empty_table().replace_schema_metadata({"cogds.manifest": "0"}), file)
    with pytest.raises(UserError, match="another version"):
        survey(folder, file)
    with pytest.raises(UserError, match="there is no manifest"):
        manifest.read(tmp_path / "nowhere")
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        survey(folder, tmp_path / "a file" / "m.parquet")
