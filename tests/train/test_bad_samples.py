import json

import pytest

from cogds.data.loading.dataset import Bad
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.train.bad_samples import Quarantine

ALONE = World(0, 1, 0, 1)


def test_what_is_found_is_written_and_said_once(tmp_path, capsys):
    quarantine = Quarantine(ALONE, tmp_path, num_clips=100, most=0.1)
    quarantine.settle()
    assert not (tmp_path / "quarantine.jsonl").exists()
    quarantine.add([Bad(3, "/a\n.mp4", "gone"), Bad(5, "/b.mp4", "damaged")])
    quarantine.add([Bad(3, "/a\n.mp4", "gone")])
    quarantine.settle()
    quarantine.add([Bad(5, "/b.mp4", "damaged")])
    quarantine.settle()
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert lines == [
        {"row": 3, "path": "/a\n.mp4", "reason": "gone"},
        {"row": 5, "path": "/b.mp4", "reason": "damaged"},
    ]
    assert capsys.readouterr().err.count("replaced by another clip") == 2


def test_too_many_end_the_run(tmp_path):
    quarantine = Quarantine(ALONE, tmp_path, num_clips=20, most=0.1)
    quarantine.add([Bad(row, f"{row}.mp4", "gone") for row in range(2)])
    quarantine.settle()
    quarantine.add([Bad(2, "2.mp4", "gone")])
    with pytest.raises(UserError, match="3 of 20 clips turned out to be unusable"):
        quarantine.settle()
