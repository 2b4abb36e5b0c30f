"""The quick start's own model and clips, made where they are missing."""

from cogds.config.loading import replace
from cogds.config.schema import RunConfig
from cogds.data.video.drawn import draw_clips
from cogds.model.tiny import create_tiny_model


def only_own_demo(cfg: RunConfig, overrides: list[str]) -> RunConfig:
    """The demo's config makes a model and clips at the demo's own paths, never at a path given on the command line."""
    given = {text.partition("=")[0] for text in overrides}
    makers = {"model.path": "model.create_tiny", "data.path": "data.draw_demo_clips"}
    return replace(cfg, {maker: False for path, maker in makers.items() if path in given and maker not in given})


def make_demo(cfg: RunConfig) -> None:
    """The tiny model and the drawn clips, where the config asks for them and they are not there yet."""
    if cfg.model.create_tiny:
        create_tiny_model(cfg.model.path)
    if cfg.data.draw_demo_clips:
        draw_clips(cfg.data.path)
