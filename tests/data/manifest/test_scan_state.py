"""The work folder of a scan: later runs use the results of killed ones."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from cogds.data.manifest import scan as scan_module
from cogds.data.manifest import scan_state
from cogds.data.manifest.scan import scan_share
from cogds.data.manifest.table import DataSet
from cogds.data.video.media import VideoInfo, write_video
from cogds.data.video.probe_task import ProbeTask, probe_file
from tests.data.scanned import listed, names_beside, names_of, scan_folder


def test_a_killed_scan_is_resumed(
    folder: Path, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_state, "FLUSH_FILES", 1)
    file = tmp_path / "manifest.parquet"

    def interrupted_at_c(task: ProbeTask) -> VideoInfo:
        if Path(task.path).name == "c.mp4":
            raise KeyboardInterrupt
        return probe_file(task)

    scan = listed([DataSet(str(folder))], file)
    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "probe_file", interrupted_at_c)
        with pytest.raises(KeyboardInterrupt):
            scan_share(scan, (0, 1), 0)
    assert not file.exists()
    # Files of another process that was killed while it wrote.
    ended = scan.run.replace(f"@{os.getpid()}-", "@999999999-")
    temporary = f"{scan_state._RESULTS}{ended}-00000-000009.{ended[21:].rpartition('-')[0]}-0a.tmp.arrow"
    for name in (temporary, f"files-{ended}.arrow"):
        (scan.folder / name).write_bytes(b"torn")
    rows = scan_folder(folder, file)
    assert opened == ["c.mp4", "d.png"]
    assert names_of(rows, "ok") == ["a.mp4", "b.mp4", "c.mp4", "d.png"]
    assert all(row["digest"] for row in rows)
    # The lists of the interrupted scan stay while its process, which is this one, runs.
    assert names_beside(file) == ["clips", f"{file.name}.work"]
    assert sorted(path.name.split("-")[0] for path in scan.folder.iterdir()) == ["entries", "files", "parts"]


def test_the_newest_results_of_unfinished_scans_are_used(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    file = tmp_path / "manifest.parquet"
    lines = [{"path": str(folder / f"{name}.mp4"), "text": "x"} for name in "ab"]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    os.rename(folder / "a.mp4", tmp_path / "away.mp4")
    for num_frames in (6, 7):  # two scans that do not reach the last step, each of a new b
        write_video(folder / "b.mp4", np.zeros((num_frames, 32, 48, 3), np.uint8), 10)
        scan_share(listed([DataSet(str(tmp_path / "l.jsonl"))], file), (0, 1), 0)
    os.rename(tmp_path / "away.mp4", folder / "a.mp4")
    opened.clear()
    rows = scan_folder(tmp_path / "l.jsonl", file)
    assert opened == ["a.mp4"]
    assert [(row["frames"], row["status"]) for row in rows] == [(5, "ok"), (7, "ok")]
