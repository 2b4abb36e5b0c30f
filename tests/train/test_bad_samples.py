"""Clips that cannot be read during training: listed once, and too many end the run."""

import json

import pytest

from cogds.data.loading.dataset import BadClip
from cogds.errors import UserError
from cogds.train.bad_samples import BadSamples
from tests.jobs import ALONE


def test_each_bad_clip_is_listed_and_logged_once(tmp_path, capsys):
    bad_samples = BadSamples(ALONE, tmp_path, num_clips=100, max_share=0.1)
    bad_samples.sync()
    assert not (tmp_path / "quarantine.jsonl").exists()
    bad_samples.add([BadClip(3, "/a\n.mp4", "gone"), BadClip(5, "/b.mp4", "damaged", 2)])
    bad_samples.add([BadClip(3, "/a\n.mp4", "gone")])
    bad_samples.sync()
    bad_samples.add([BadClip(5, "/b.mp4", "damaged", 2)])
    bad_samples.sync()
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert lines == [
        {"row": 3, "path": "/a\n.mp4", "reason": "gone"},
        {"row": 5, "path": "/b.mp4", "reason": "damaged", "caption": 2},
    ]
    warnings = capsys.readouterr().err
    assert (warnings.count("warning: "), warnings.count("gone"), warnings.count("/b.mp4")) == (2, 1, 1)


def test_too_many_bad_clips_end_the_run(tmp_path):
    bad_samples = BadSamples(ALONE, tmp_path, num_clips=20, max_share=0.1)
    bad_samples.add([BadClip(row, f"{row}.mp4", "gone") for row in range(2)])
    bad_samples.sync()
    bad_samples.add([BadClip(2, "2.mp4", "gone")])
    with pytest.raises(UserError, match=r"^data\.max_unusable: 3 of 20 "):
        bad_samples.sync()
