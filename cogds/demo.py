"""The tiny model and the clips of the demo, created if they do not exist yet."""

from cogds.config.loading import replace
from cogds.config.schema import RunConfig
from cogds.data.video.drawn import draw_clips
from cogds.model.tiny import create_tiny_model


def protect_given_paths(cfg: RunConfig, overrides: list[str]) -> RunConfig:
    """Return the demo's config changed to create nothing at a model.path or data.path given on the command line."""
    given = {text.partition("=")[0] for text in overrides}
    creators = {"model.path": "model.create_tiny", "data.path": "data.draw_demo_clips"}
    return replace(cfg, {key: False for path, key in creators.items() if path in given and key not in given})


def create_demo_files(cfg: RunConfig) -> None:
    """Create the tiny model and draw the clips, if the config asks for them and they do not exist yet."""
    if cfg.model.create_tiny:
        create_tiny_model(cfg.model.path)
    if cfg.data.draw_demo_clips:
        draw_clips(cfg.data.path)
