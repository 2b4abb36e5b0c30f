"""The work folder of a scan: what a kill loses, and what later runs use."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from cogds.data.manifest import scan as scan_module
from cogds.data.manifest import scan_state
from cogds.data.manifest.scan import scan_share, start_scan
from cogds.data.manifest.table import DataSet
from cogds.data.video.media import write_video
from cogds.data.video.probe_task import ProbeResult, ProbeTask, probe_file
from tests.data.scanned import leftovers, names_of, scan_folder


class KilledError(BaseException):
    """Ends a run as a signal would."""


def test_a_killed_scan_is_resumed(
    folder: Path, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_state, "FLUSH_FILES", 1)
    file = tmp_path / "manifest.parquet"

    def killed_at_c(task: ProbeTask) -> ProbeResult:
        if Path(task.path).name == "c.mp4":
            raise KilledError
        return probe_file(task)

    scan = start_scan([DataSet(str(folder))], file)
    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "probe_file", killed_at_c)
        with pytest.raises(KilledError):
            scan_share(scan, (0, 1), 0)
    assert not file.exists()
    # What a kill in the middle of writing leaves, of a process that has ended.
    ended = scan.run.replace(f"@{os.getpid()}-", "@999999999-")
    temporary = f"{scan_state._RESULTS}{ended}-00000-000009.{ended[21:].rpartition('-')[0]}-0a.tmp.arrow"
    for name in (temporary, f"files-{ended}.arrow"):
        (scan.folder / name).write_bytes(b"torn")
    rows = scan_folder(folder, file)
    assert opened == ["c.mp4", "d.png"]
    assert names_of(rows, "ok") == ["a.mp4", "b.mp4", "c.mp4", "d.png"]
    assert all(row["digest"] for row in rows)
    # The killed scan's lists stay as long as its process, which is this one, lives.
    assert leftovers(file) == ["clips", f"{file.name}.work"]
    assert sorted(path.name.split("-")[0] for path in scan.folder.iterdir()) == ["entries", "files"]


def test_the_newest_results_of_killed_scans_count(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    file = tmp_path / "manifest.parquet"
    lines = [{"path": str(folder / f"{name}.mp4"), "text": "x"} for name in "ab"]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    os.rename(folder / "a.mp4", tmp_path / "away.mp4")
    for num_frames in (6, 7):  # b is written again before each of two scans that end before the last step
        write_video(folder / "b.mp4", np.zeros((num_frames, 32, 48, 3), np.uint8), 10)
        scan_share(start_scan([DataSet(str(tmp_path / "l.jsonl"))], file), (0, 1), 0)
    os.rename(tmp_path / "away.mp4", folder / "a.mp4")  # that it was missing is forgotten
    opened.clear()
    rows = scan_folder(tmp_path / "l.jsonl", file)
    assert opened == ["a.mp4"]
    assert [(row["frames"], row["status"]) for row in rows] == [(5, "ok"), (7, "ok")]
