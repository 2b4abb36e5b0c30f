"""The buckets of a run."""

from dataclasses import replace

from cogds.config.schema import RunConfig
from cogds.core.buckets import generate_buckets, parse_buckets
from cogds.core.geometry import ClipShape
from cogds.core.vae_memory import vae_can_encode
from cogds.errors import UserError
from cogds.model.load import ModelFolder


def make_buckets(cfg: RunConfig, model: ModelFolder) -> tuple[ClipShape, ...]:
    """The list in data.buckets, or the grid that the config describes. Raises UserError if the model cannot use it."""
    if cfg.data.buckets:
        buckets = parse_buckets(cfg.data.buckets, model.geometry)
    else:
        buckets = generate_buckets(
            cfg.data.bucket_sizes, cfg.data.bucket_aspect_ratios, cfg.data.bucket_frames, model.geometry
        )
    for shape in buckets:
        # Every step encodes a clip's first frame untiled, as the pipeline does.
        if not vae_can_encode(replace(shape, frames=1), tiling=False, vae=model.vae_size):
            raise UserError(
                f"data.buckets: {shape} does not fit the model: its VAE cannot encode an image of {shape.height}x"
                f"{shape.width} without tiles, as the pipeline does. Choose a smaller bucket."
            )
    return buckets
