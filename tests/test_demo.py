"""The model and clips that the demo creates."""

import pytest

from cogds.config.loading import load_config
from cogds.demo import protect_given_paths
from tests.conftest import ROOT


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
