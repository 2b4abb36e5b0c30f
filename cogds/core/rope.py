"""Rotary tables for a clip shape, computed by diffusers' functions with the arguments that its pipeline passes.

Source: `_prepare_rotary_positional_embeddings` of the pipelines, which is the same for images and text.
"""

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import get_resize_crop_region_for_grid

from cogds.core.geometry import ClipShape, ModelGeometry, check_shape, token_grid

RotaryTables = tuple[torch.Tensor, torch.Tensor]


def rotary_tables(shape: ClipShape, geometry: ModelGeometry, device: torch.device | str = "cpu") -> RotaryTables | None:
    """Cosines and sines, each float32 [video tokens, head_dim]. None if the model does not use rotary tables.

    1.5 slices the tables out of a grid of the model's sample size. 1.0 stretches that grid over the clip. Raises
    UserError if an axis is longer than the grid, since slicing would silently return too few positions.
    """
    if not geometry.family.has_rope:
        return None
    check_shape(shape, geometry)
    time, height, width = token_grid(shape, geometry)
    base_height, base_width = (
        geometry.sample_height // geometry.patch_size,
        geometry.sample_width // geometry.patch_size,
    )
    if geometry.family.positions != "rope_slice":
        return get_3d_rotary_pos_embed(
            embed_dim=geometry.head_dim,
            crops_coords=get_resize_crop_region_for_grid((height, width), base_width, base_height),
            grid_size=(height, width),
            temporal_size=time,
            device=device,
        )
    return get_3d_rotary_pos_embed(
        embed_dim=geometry.head_dim,
        crops_coords=None,
        grid_size=(height, width),
        temporal_size=time,
        grid_type="slice",
        max_size=(base_height, base_width),
        device=device,
    )
