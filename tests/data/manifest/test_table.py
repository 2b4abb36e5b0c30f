"""The manifest's file: its name, and files that are not manifests."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cogds.data.manifest.table import SCHEMA, DataSet, manifest_file, read_manifest
from cogds.errors import UserError
from tests.data.scanned import scan_folder


def test_the_name_follows_from_the_data_sets(tmp_path: Path) -> None:
    sets = [DataSet("/data/clips"), DataSet("/data/t.parquet", {"path": "url", "caption": "words"})]
    choices = (sets, sets[:1], sets[1:], sets[::-1], [sets[0], DataSet("/data/t.parquet")])
    assert len({manifest_file(choice, tmp_path) for choice in choices}) == len(choices)
    assert manifest_file(sets, tmp_path).name.startswith("clips-")
    assert manifest_file(sets, tmp_path, str(tmp_path / "x")) == tmp_path / "x"


def test_another_table_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"path": ["a"]}), file)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"^data\.manifest: .*mine\.parquet is not a manifest"):
        scan_folder(folder, file)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "mine.parquet"]


def test_a_manifest_that_is_damaged_missing_or_of_another_version_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.parquet"
    file.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"^data\.manifest: .*mine\.parquet \("):
        scan_folder(folder, file)
    pq.write_table(SCHEMA.empty_table().replace_schema_metadata({"cogds.manifest": "0"}), file)
    with pytest.raises(UserError, match=r"^data\.manifest: .*mine\.parquet .* version"):
        scan_folder(folder, file)
    with pytest.raises(UserError, match=r"^data\.manifest: .*nowhere"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match=r"^data\.manifest: .*m\.parquet"):
        scan_folder(folder, tmp_path / "a file" / "m.parquet")
