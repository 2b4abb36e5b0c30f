"""The demo's own files."""

from pathlib import Path

import pytest

from cogds.config.loading import load_config
from cogds.demo import protect_given_paths

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "overrides, tiny, clips",
    [
        ([], True, True),
        (["model.path=x"], False, True),
        (["data.path=x"], True, False),
        (["model.path=x", "model.create_tiny=true", "data.path=y"], True, False),
    ],
)
def test_the_demo_creates_nothing_at_a_given_path(overrides, tiny, clips):
    cfg, _ = load_config(str(ROOT / "launch/configs/demo.yaml"), overrides)
    cfg = protect_given_paths(cfg, overrides)
    assert (cfg.model.create_tiny, cfg.data.draw_demo_clips) == (tiny, clips)
