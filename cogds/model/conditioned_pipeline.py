"""diffusers' image-to-video pipeline with further conditions: a last image, a video at either end, and keyframes.

    from cogds.model.conditioned_pipeline import ConditionedPipeline
    pipe = ConditionedPipeline.from_pretrained("zai-org/CogVideoX1.5-5B-I2V", torch_dtype=torch.bfloat16)
    pipe.load_lora_weights("lora/step-500")  # trained with `conditioning.modes`
    pipe(prompt="...", image=first, last_image=last)                # interpolate between two images
    pipe(prompt="...", video=last_frames)                           # continue a clip
    pipe(prompt="...", video=first_frames, video_at="end")          # lead up to a clip
    pipe(prompt="...", keyframes={0: first, 40: middle, 80: last})  # images at frame numbers
    pipe(prompt="...", image=first, control_video=frames)           # follow a control video (docs/conditioning.md)

With `image` alone, everything is identical to diffusers' pipeline, bit for bit.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from diffusers import CogVideoXImageToVideoPipeline

from cogds.core.condition_modes import ConditionSettings, Mode, Piece, pieces_of
from cogds.core.conditioning import image_latent_scale, place_condition
from cogds.core.geometry import ModelGeometry
from cogds.errors import UserError
from cogds.model.control import encode_control, given_control


class ConditionedPipeline(CogVideoXImageToVideoPipeline):
    """CogVideoXImageToVideoPipeline that is conditioned on any frames of the clip.

    `core.condition_modes` says where the latents of each condition are placed.
    """

    _pieces: tuple[tuple[Piece, torch.Tensor], ...] = ()  # with pixels [B, 3, F, H, W], in the order of encoding
    _has_image = True

    def __call__(
        self,
        image: Any = None,
        *args: Any,
        last_image: Any = None,
        video: Any = None,
        video_at: Literal["start", "end"] = "start",
        keyframes: Mapping[int, Any] | None = None,
        control_video: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate a clip with the arguments and the result of diffusers' pipeline, and these additional conditions.

        The order of random numbers is: the image's latents and the noise, as in diffusers, then the latents of the last
        image, of the video, and of the keyframes in ascending order. So the noise is the same for all conditions.
        Without any condition, the clip depends on the prompt alone.

        Args:
            image: the first frame, as in diffusers: a PIL image, a tensor [B, 3, H, W] in [0, 1], or a list with an
                image for each prompt.
            last_image: the last frame, given as `image`.
            video: 4N + 1 frames, at least 5, with which the clip begins or ends: a list of PIL images, an array [F, H,
                W, 3] or a tensor [F, 3, H, W] in [0, 1]; or a list of videos, one for each prompt.
            video_at: "start" or "end".
            keyframes: frame numbers, from 0, and their images, each given as `image`.
            control_video: every frame of a control video, given as `video`, for a LoRA that was trained with them
                (`lora.adapter.load_control`).

        Raises:
            ValueError: two conditions set the same frames, or one does not fit into the clip.
        """
        if control_video is not None:
            conditions = {"last_image": last_image, "video": video, "video_at": video_at, "keyframes": keyframes}
            with given_control(self.transformer, self._encode_control(control_video, kwargs)):
                return self(image, *args, **conditions, **kwargs)
        keyframes = dict(keyframes or {})
        if image is None and 0 in keyframes:
            image = keyframes.pop(0)
        if last_image is None and video is None and not keyframes and image is not None:
            return super().__call__(image, *args, **kwargs)
        if args:
            raise ValueError("Pass everything but `image` by name, as in pipe(image, prompt=...).")
        height, width = self._size(kwargs)
        batch_size = _batch_size(kwargs)
        num_frames = self._num_frames(kwargs)
        clips = self._preprocess(last_image, video, keyframes, (height, width), batch_size)
        num_video_frames = 0 if video is None else clips["video"].shape[2]
        modes = _modes(last_image is not None, num_video_frames, video_at, keyframes, self.vae_scale_factor_temporal)
        pieces = self._place(modes, num_frames, has_image=image is not None)
        try:
            self._pieces = tuple(zip(pieces, clips.values(), strict=True))
            self._has_image = image is not None
            placeholder = torch.zeros(batch_size, 3, height, width)  # `prepare_latents` drops its latents
            return super().__call__(placeholder if image is None else image, **kwargs)
        finally:
            del self._pieces, self._has_image

    def to_json_string(self) -> str:
        """Name diffusers' pipeline in the config, so that what `save_pretrained` writes loads without cogds."""
        config = json.loads(super().to_json_string()) | {"_class_name": CogVideoXImageToVideoPipeline.__name__}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def prepare_latents(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noise and the condition, each [B, F, C, H, W], as diffusers' method, with all conditions placed.

        Takes the arguments of that method.
        """
        latents, condition = super().prepare_latents(*args, **kwargs)
        if not self._has_image:
            condition = torch.zeros_like(condition)
        generator = kwargs["generator"] if "generator" in kwargs else args[8] if len(args) > 8 else None
        for piece, pixels in self._pieces:
            encoded = self._encode(pixels.to(latents.device, condition.dtype), generator)
            place_condition(condition, [(piece, encoded)])
        return latents, condition

    def _encode(self, pixels: torch.Tensor, generator: Any) -> torch.Tensor:
        """Encode pixels [B, 3, F, H, W] to latents [B, F, C, H, W] with the scale of the first image's."""
        generators = generator if isinstance(generator, list) else [generator] * len(pixels)
        samples = zip(pixels, generators, strict=True)
        encoded = [self.vae.encode(clip[None]).latent_dist.sample(random) for clip, random in samples]
        latents = torch.cat(encoded).to(pixels.dtype).permute(0, 2, 1, 3, 4)
        invert = self.vae.config.invert_scale_latents
        return image_latent_scale(self.vae_scaling_factor_image, invert, "pipeline") * latents

    def _encode_control(self, video: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Encode one control video, or one for each prompt, as `encode_control`: latents [B, F, C, H, W].

        kwargs: of the call, with prompts and size. Raises ValueError for another number of videos or frames.
        """
        videos = self.video_processor.preprocess_video(video, *self._size(kwargs))
        if len(videos) not in (1, _batch_size(kwargs)):
            raise ValueError(
                f"`control_video` has {len(videos)} samples, but there are {_batch_size(kwargs)} prompts. Pass one "
                "each."
            )
        if videos.shape[2] != (num_frames := self._num_frames(kwargs)):
            raise ValueError(
                f"`control_video` has {videos.shape[2]} frames, but the clip has {num_frames}. Pass one for each frame."
            )
        pixels = ((videos.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().to(torch.uint8)
        patch_size_t, device = self.transformer.config.patch_size_t, self._execution_device
        return torch.cat([encode_control(self.vae, frames, patch_size_t, device=device) for frames in pixels])

    def _num_frames(self, kwargs: Mapping[str, Any]) -> int:
        """Number of frames of a call. Raises ValueError for one that diffusers' pipeline would round down to 4N + 1."""
        num_frames = kwargs.get("num_frames", 49) or self.transformer.config.sample_frames
        temporal = self.vae_scale_factor_temporal
        if num_frames % temporal != 1:
            raise ValueError(f"`num_frames` is {num_frames}. Use {temporal}N + 1.")
        return num_frames

    def _size(self, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the video of a call [px], by default those of the model, as in diffusers."""
        config, spatial = self.transformer.config, self.vae_scale_factor_spatial
        return (
            kwargs.get("height") or config.sample_height * spatial,
            kwargs.get("width") or config.sample_width * spatial,
        )

    def _preprocess(
        self, last_image: Any, video: Any, keyframes: Mapping[int, Any], size: tuple[int, int], batch_size: int
    ) -> dict[str, torch.Tensor]:
        """Return the pixels [B, 3, F, H, W] of each condition by its name, in the order of encoding."""
        height, width = size
        clips = {}
        if last_image is not None:
            clips["last_image"] = self.video_processor.preprocess(last_image, height, width).unsqueeze(2)
        if video is not None:
            clips["video"] = self.video_processor.preprocess_video(video, height, width)
        for frame in sorted(keyframes):
            clips[f"keyframes[{frame}]"] = self.video_processor.preprocess(keyframes[frame], height, width).unsqueeze(2)
        for name, clip in clips.items():
            if len(clip) not in (1, batch_size):
                raise ValueError(
                    f"`{name}` has {len(clip)} samples, but there are {batch_size} prompts. Pass one each."
                )
        return {name: clip.expand(batch_size, -1, -1, -1, -1) for name, clip in clips.items()}

    def _place(
        self, modes: Iterable[tuple[Mode, ConditionSettings]], num_frames: int, *, has_image: bool
    ) -> list[Piece]:
        """Return the pieces of all conditions but the image. Raises ValueError if one does not fit, or two overlap."""
        geometry = ModelGeometry.from_configs(self.transformer.config, self.vae.config, self.scheduler.config)
        try:
            pieces = [piece for mode, settings in modes for piece in pieces_of(mode, num_frames, geometry, settings)]
        except UserError as error:
            raise ValueError(str(error)) from None
        taken = {0: range(1)} if has_image else {}
        for piece in pieces:
            for place in piece.places(geometry):
                if other := taken.get(place):
                    raise ValueError(
                        f"Two conditions set the same latent frame: {_frames(other)} and {_frames(piece.frames)} of "
                        "the clip. Leave one out."
                    )
                taken[place] = piece.frames
        return pieces


def _modes(
    has_last: bool, num_video_frames: int, video_at: str, keyframes: Mapping[int, Any], vae_temporal: int
) -> list[tuple[Mode, ConditionSettings]]:
    """Return the mode of each condition but the image, in the order of encoding. Raises ValueError."""
    modes: list[tuple[Mode, ConditionSettings]] = []
    if has_last:
        modes.append(("last", ConditionSettings()))
    if num_video_frames:
        if video_at not in ("start", "end"):
            raise ValueError(f"`video_at` is {video_at!r}. Use 'start' or 'end'.")
        if num_video_frames % vae_temporal != 1 or num_video_frames == 1:
            raise ValueError(
                f"`video` has {num_video_frames} frames. Pass {vae_temporal}N + 1 of them, at least {vae_temporal + 1}."
            )
        context = (num_video_frames - 1) // vae_temporal + 1
        modes.append(("prefix" if video_at == "start" else "suffix", ConditionSettings(context)))
    if keyframes:
        if not all(isinstance(frame, int) and frame >= 0 for frame in keyframes):
            raise ValueError(f"`keyframes` has {list(keyframes)}. Use frame numbers from 0.")
        modes.append(("keyframes", ConditionSettings(keyframes=tuple(sorted(keyframes)))))
    return modes


def _batch_size(kwargs: Mapping[str, Any]) -> int:
    """Number of prompts, as in diffusers' pipeline."""
    prompt, states = kwargs.get("prompt"), kwargs.get("prompt_embeds")
    if prompt is None and states is not None:
        return len(states)
    return len(prompt) if isinstance(prompt, list) else 1


def _frames(frames: range) -> str:
    return f"frame {frames[0]}" if len(frames) == 1 else f"frames {frames[0]} to {frames[-1]}"
