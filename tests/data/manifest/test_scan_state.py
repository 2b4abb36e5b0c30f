"""The work folder: what a kill loses, and what later runs take over."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cogds.data.manifest import scan as inventory
from cogds.data.manifest import scan_state as journal
from cogds.data.manifest.scan_state import ALONE
from cogds.data.manifest.table import DataSet
from cogds.data.video.media import write_video
from cogds.data.video.probe_task import FileFacts, ProbeTask, probe_file
from tests.data.surveyed import leftovers, names_of, survey


class KilledError(BaseException):
    """Ends a run as a signal would."""


def test_a_killed_run_is_taken_up_where_it_was(
    folder: Path, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "JOURNAL_FILES", 1)
    file = tmp_path / "manifest.parquet"

    def killed_at(name: str) -> Callable[[ProbeTask], FileFacts]:
        def probe(task: ProbeTask) -> FileFacts:
            if Path(task.path).name == name:
                raise KilledError
            return probe_file(task)

        return probe

    job = inventory.begin([DataSet(str(folder))], file)
    with pytest.raises(KilledError):
        inventory.probe_share(job, ALONE, 0, probe=killed_at("c.mp4"))
    assert not file.exists()
    # What a kill in the middle of writing leaves, of a process that is gone.
    dead = job.run.replace(f"-{os.getpid()}-", "-999999999-")
    for name in (f"facts-{dead}-00000-000009.0a.tmp.arrow", f"files-{dead}.arrow"):
        (job.folder / name).write_bytes(b"torn")
    rows = survey(folder, file)
    assert opened == ["c.mp4", "d.png"]
    assert names_of(rows, "ok") == ["a.mp4", "b.mp4", "c.mp4", "d.png"]
    # The listing of the run that was killed stays as long as its process, this one, lives.
    assert leftovers(file) == ["clips", f"{file.name}.work"]
    assert sorted(one.name.split("-")[0] for one in job.folder.iterdir()) == ["entries", "files"]


def test_of_several_killed_runs_the_newest_facts_count(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    file = tmp_path / "manifest.parquet"
    lines = [{"path": str(folder / f"{name}.mp4"), "text": "x"} for name in "ab"]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    os.rename(folder / "a.mp4", tmp_path / "away.mp4")
    for num_frames in (6, 7):  # b is written anew before each of two runs that end before the last step
        write_video(folder / "b.mp4", np.zeros((num_frames, 32, 48, 3), np.uint8), 10)
        inventory.probe_share(inventory.begin([DataSet(str(tmp_path / "l.jsonl"))], file), ALONE, 0)
    os.rename(tmp_path / "away.mp4", folder / "a.mp4")  # that it was away is forgotten
    opened.clear()
    rows = survey(tmp_path / "l.jsonl", file)
    assert opened == ["a.mp4"]
    assert [(row["frames"], row["status"]) for row in rows] == [(5, "ok"), (7, "ok")]
