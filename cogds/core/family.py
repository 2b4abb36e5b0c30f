"""What differs between the models of the CogVideoX family, read from the configs of a model folder.

The published models, by these values:

    model                 image  temporal  positions     OFS  VAE scale   image latents  trained sizes
                                 patch
    CogVideoX1.5-5B-I2V   yes    2         sliced RoPE   yes  0.7         x 1/0.7        81x768x1360, 16 frames/s
    CogVideoX1.5-5B       no     2         sliced RoPE   no   0.7         -              81x768x1360, 16 frames/s
    CogVideoX-5b-I2V      yes    -         learned       no   0.7         x 0.7          49x480x720, 8 frames/s
    CogVideoX-5b          no     -         resized RoPE  no   0.7         -              49x480x720, 8 frames/s
    CogVideoX-2b          no     -         sincos        no   1.15258426  -              49x480x720, 8 frames/s

A model is recognized by its configs, never by its name. Everything that depends on a row starts from `Family`: clip
shapes (`geometry`), rotary tables (`rope`), inputs of the transformer (`conditioning`), and the pipeline.

Sources: diffusers' pipeline_cogvideox.py, pipeline_cogvideox_image2video.py, CogVideoXPatchEmbed, and
convert_cogvideox_to_diffusers.py. Sizes and frame rates: the models' cards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cogds.errors import UserError

Config = Mapping[str, Any]
# rope_slice: rotary tables sliced out of a grid of the model's sample size, which no side may exceed. rope_resize: the
# grid stretched over the clip. learned: rope_resize and learned embeddings, which fit one size. sincos: fixed
# embeddings, calculated for any size.
Positions = Literal["rope_slice", "rope_resize", "learned", "sincos"]
SCHEDULERS = ("CogVideoXDPMScheduler", "CogVideoXDDIMScheduler")
IMAGE_PIPELINE, TEXT_PIPELINE = "CogVideoXImageToVideoPipeline", "CogVideoXPipeline"
TASKS = ("image-to-video", "text-to-video")


@dataclass(frozen=True)
class Family:
    """The differences, as values of one model.

    Attributes:
        takes_image: image-to-video: the first frame's latents are concatenated to the noisy ones.
        patch_size_t: latent frames of a token. Clips are padded in front to a multiple of it. None: 1, no padding.
        has_ofs: the transformer takes an OFS embedding.
        scaling_factor: of video latents.
        invert_scale_latents: image latents are divided by `scaling_factor`, not multiplied by it.
        scheduler: class name, one of SCHEDULERS.
    """

    takes_image: bool
    patch_size_t: int | None
    positions: Positions
    has_ofs: bool
    scaling_factor: float
    invert_scale_latents: bool
    scheduler: str

    @classmethod
    def from_configs(cls, transformer: Config, vae: Config, scheduler: Config) -> "Family":
        """Read the configs of `transformer/`, `vae/` and `scheduler/`.

        Raises UserError, with the value found, for a model that no pipeline of diffusers runs.
        """
        channels, latent_channels = transformer["in_channels"], vae["latent_channels"]
        if channels not in (latent_channels, 2 * latent_channels):
            raise UserError(
                f"transformer/config.json: in_channels is {channels}, but text-to-video has {latent_channels} (latents)"
                f" and image-to-video {2 * latent_channels} (latents and image latents). Pass a CogVideoX model."
            )
        takes_image, patch_size_t = channels == 2 * latent_channels, transformer.get("patch_size_t")
        if not takes_image and transformer.get("ofs_embed_dim"):
            raise UserError(
                f"transformer/config.json: ofs_embed_dim is {transformer['ofs_embed_dim']} in a text-to-video model, "
                "but the text-to-video pipeline passes no OFS. Download the model again."
            )
        name = scheduler.get("_class_name")
        if name not in SCHEDULERS or scheduler.get("prediction_type", "epsilon") != "v_prediction":
            raise UserError(
                f"scheduler/scheduler_config.json: {name} with prediction_type {scheduler.get('prediction_type')}, but "
                f"CogVideoX needs {' or '.join(SCHEDULERS)} with v_prediction. Download the model again."
            )
        return cls(
            takes_image=takes_image,
            patch_size_t=patch_size_t,
            positions=_positions(transformer, patch_size_t),
            has_ofs=bool(transformer.get("ofs_embed_dim")),
            scaling_factor=float(vae["scaling_factor"]),
            invert_scale_latents=bool(vae.get("invert_scale_latents", False)),
            scheduler=name,
        )

    @property
    def task(self) -> str:
        """One of TASKS."""
        return TASKS[0 if self.takes_image else 1]

    @property
    def pipeline(self) -> str:
        """Name of diffusers' pipeline class."""
        return IMAGE_PIPELINE if self.takes_image else TEXT_PIPELINE

    @property
    def has_rope(self) -> bool:
        """Whether the transformer takes rotary tables."""
        return self.positions != "sincos"


def _positions(transformer: Config, patch_size_t: int | None) -> Positions:
    rope = transformer.get("use_rotary_positional_embeddings", False)
    learned = transformer.get("use_learned_positional_embeddings", False)
    if patch_size_t and rope and not learned:
        return "rope_slice"
    if not patch_size_t and rope:
        return "learned" if learned else "rope_resize"
    if not patch_size_t and not learned:
        return "sincos"
    raise UserError(
        f"transformer/config.json: patch_size_t {patch_size_t}, use_rotary_positional_embeddings {rope} and "
        f"use_learned_positional_embeddings {learned} are together not a CogVideoX model. Download the model again."
    )
