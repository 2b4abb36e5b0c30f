"""The frames that `cogds sample` conditions a video on, read from files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from cogds.core.condition_modes import (
    MIN_CONTEXT,
    ConditionSettings,
    Mode,
    Piece,
    is_first_image,
    pieces_of,
    pixel_frames,
)
from cogds.core.geometry import ClipShape, ModelGeometry, latent_frames
from cogds.data.video.kinds import kind_of
from cogds.data.video.media import DecodeError, num_frames_at, probe_video, read_clip, read_image
from cogds.errors import UserError
from cogds.model.pipelines import Conditions

VideoPlace = Literal["start", "end"]


@dataclass(frozen=True)
class ConditionFiles:
    """Files of conditions besides the first frame.

    Attributes:
        keyframes: times [s] and images.
        context: `--context`: latent frames (`3`) or seconds (`1.5s`) of the video; None: as the LoRA was trained.
        loop: the last frame is the first.
        segments: clips that continue each other.
    """

    last_image: str | None = None
    video: str | None = None
    video_at: VideoPlace = "start"
    keyframes: Sequence[tuple[float, str]] = ()
    context: str | None = None
    loop: bool = False
    segments: int = 1

    @property
    def need_no_image(self) -> bool:
        """Whether they can replace the first frame."""
        return bool(self.last_image or self.video or self.keyframes)

    def check(self, *, has_image: bool) -> None:
        """Raise UserError if the files exclude each other. has_image: whether a first frame is given."""
        others = [
            flag
            for flag, value in (
                ("--last-image", self.last_image),
                ("--keyframe", self.keyframes),
                ("--loop", self.loop),
                ("--video-at end", self.video and self.video_at == "end"),
            )
            if value
        ]
        if self.segments > 1 and others:
            raise UserError(f"--segments: {others[0]} is given, which belongs to a single clip. Leave one of them out.")
        if self.loop and (self.last_image or self.video):
            other = "--last-image" if self.last_image else "--video"
            raise UserError(f"--loop: {other} is also given, but the last frame is the first. Leave one of them out.")
        if self.loop and not has_image:
            raise UserError("--loop: there is no first frame to return to. Pass --image.")
        if self.video and self.video_at == "start" and has_image:
            raise UserError(
                "--video: --image is also given, but the video sets the first frame. Leave one of them out."
            )
        if self.video and self.video_at == "end" and self.last_image:
            raise UserError(
                "--video: --last-image is also given, but the video sets the last frame. Leave one of them out."
            )
        if self.context is not None and not self.video and self.segments == 1:
            raise UserError("--context: there is no video to take frames from. Pass --video or --segments.")


def context_latents(text: str | None, recorded: int | None, fps: float, geometry: ModelGeometry) -> int:
    """Return the latent frames of the context.

    text: `3` (latent frames), `1.5s` (seconds), or None for what the LoRA recorded or MIN_CONTEXT. Raises UserError.
    """
    if text is None:
        return recorded or MIN_CONTEXT
    match = re.fullmatch(r"(\d+)|(\d*\.?\d+) ?s", text.strip())
    if not match:
        raise UserError(f"--context: '{text}' is neither latent frames nor seconds. Write, for example, 3 or 1.5s.")
    if match[1]:
        context = int(match[1])
    else:
        context = latent_frames(max(1, round(float(match[2]) * fps)), geometry)
    if context < MIN_CONTEXT:
        raise UserError(
            f"--context: {text} is {context} latent frame{'s' * (context != 1)}. Use at least {MIN_CONTEXT} latent "
            f"frames, which are {pixel_frames(MIN_CONTEXT, geometry)} frames."
        )
    return context


def read_conditions(
    image: np.ndarray | None, files: ConditionFiles, context: int, shape: ClipShape, fps: float, geometry: ModelGeometry
) -> Conditions:
    """Read all files. Raises UserError if one cannot be read or does not fit into the clip.

    image: the first frame, uint8 [H, W, 3]. context: latent frames of the video.
    """
    files.check(has_image=image is not None)
    keyframes = {}
    for time_s, file in files.keyframes:
        frame = round(time_s * fps)
        if frame in keyframes or (frame == 0 and image is not None):
            raise UserError(f"--keyframe: {time_s:g} s is given twice (frame {frame}). Leave one out.")
        if frame >= shape.frames:
            end_s = (shape.frames - 1) / fps
            raise UserError(
                f"--keyframe: {time_s:g} s is after the last frame, which is at {end_s:.4g} s. Use an earlier time, or "
                "--size for a longer video."
            )
        keyframes[frame] = _read("--keyframe", file, shape)
    video = None
    if files.video is not None:
        num_frames = pixel_frames(context, geometry)
        video = _read_context(files.video, files.video_at, ClipShape(num_frames, shape.height, shape.width), fps)
    last = image if files.loop else _read("--last-image", files.last_image, shape) if files.last_image else None
    conditions = Conditions(image, last, video, files.video_at, keyframes)
    _check_fit(conditions, files, context, shape, geometry)
    return conditions


def modes_of(conditions: Conditions) -> tuple[Mode, ...]:
    """Return the mode that these conditions are; several if training never combined them."""
    images = ("first",) if conditions.image is not None else ()
    has_last = conditions.last_image is not None
    modes: list[Mode] = []
    if conditions.keyframes:
        modes.append("keyframes")  # also with a first and a last image, which are keyframes too
    elif has_last:
        modes.append("first_last" if images else "last")
    elif images:
        modes.append("first")
    if conditions.video is not None:
        modes.append("prefix" if conditions.video_at == "start" else "suffix")
    return tuple(modes) or ("none",)


def untrained_warning(modes: Sequence[Mode], trained: Mapping[str, Any], trained_name: str) -> str | None:
    """Return a warning if the modes were not trained, or None. trained_name: `the LoRA` or `the model`."""
    names = ", ".join(trained)
    if len(modes) > 1:
        return (
            f"{' and '.join(modes)} together were not trained: {trained_name} was trained with {names}, each alone. "
            "The video may not follow them."
        )
    if modes[0] not in trained:
        return (
            f"mode {modes[0]} was not trained: {trained_name} was trained with {names}. The video may not follow the "
            f"given frames. Train a LoRA with conditioning.modes={{{modes[0]}: 1}}."
        )
    return None


def _check_fit(
    conditions: Conditions, files: ConditionFiles, context: int, shape: ClipShape, geometry: ModelGeometry
) -> None:
    """Raise UserError if a condition does not fit into the clip, or nothing is left to generate."""
    settings = ConditionSettings(context, tuple(sorted(conditions.keyframes)))
    modes: list[tuple[str, Mode]] = []
    if conditions.video is not None:
        modes.append(("--context", "prefix" if files.video_at == "start" else "suffix"))
    if files.segments > 1:
        modes.append(("--segments", "prefix"))
    if shape.frames == 1 and (conditions.video is not None or files.segments > 1):
        flag = "--video" if conditions.video is not None else "--segments"
        raise UserError(f"{flag}: the size {shape} is that of an image, which continues nothing. Use a longer size.")
    if conditions.keyframes:
        modes.append(("--keyframe", "keyframes"))
    if conditions.last_image is not None:
        modes.append(("--loop" if files.loop else "--last-image", "last"))
    taken = {0: "--image"} if conditions.image is not None else {}
    for flag, mode in modes:
        try:
            pieces = pieces_of(mode, shape.frames, geometry, settings)
        except UserError as error:
            raise UserError(f"{flag}: {error}") from None
        if flag == "--segments":
            continue
        for piece in pieces:
            for place in piece.places(geometry):
                if other := taken.get(place):
                    raise UserError(
                        f"{flag}: sets the same latent frame as {other}, which holds {geometry.vae_temporal} frames. "
                        "Leave one out, or use times that are further apart."
                    )
                taken[place] = flag


def _read(flag: str, file: str, shape: ClipShape) -> np.ndarray:
    """Read an image, or the first frame of a video: uint8 [H, W, 3] of that size."""
    try:
        if kind_of(file) == "video":
            return read_clip(file, ClipShape(1, shape.height, shape.width), fps=1.0)[0]
        return read_image(file, shape.height, shape.width)
    except (DecodeError, OSError) as error:
        raise UserError(f"{flag}: {file}: {error}. Choose another image.") from None


def _read_context(file: str, video_at: VideoPlace, shape: ClipShape, fps: float) -> np.ndarray:
    """Read the frames of a video that a clip continues (its last) or leads up to (its first), resampled to `fps`."""
    try:
        num_available = num_frames_at(probe_video(file), fps)
        if num_available < shape.frames:
            raise UserError(
                f"--video: {file} has {num_available} frames at {fps:g} frames/s, but {shape.frames} are needed. Use a "
                "longer video, or a shorter --context."
            )
        start = num_available - shape.frames if video_at == "start" else 0
        return read_clip(file, shape, fps, start_s=start / fps)
    except (DecodeError, OSError) as error:
        raise UserError(f"--video: {file}: {error}. Choose another video.") from None


def conditions_of_clip(
    mode: Mode, pieces: Sequence[Piece], encoded: Mapping[str, torch.Tensor], numbers: Sequence[int]
) -> Conditions:
    """Return the frames of an encoded clip that a mode conditions on.

    pieces: of the mode and the clip. encoded: `first_frame` and `condition_frames`, whose frame numbers are `numbers`.
    """
    images = {}
    for piece in pieces:
        if is_first_image(piece):
            frames = encoded["first_frame"][None]
        else:
            frames = encoded["condition_frames"][[numbers.index(frame) for frame in piece.frames]]
        images[piece.frames[0]] = frames.permute(0, 2, 3, 1).contiguous().numpy()
    if mode == "keyframes":
        return Conditions(keyframes={frame: image[0] for frame, image in images.items()})
    if mode in ("prefix", "suffix") and not is_first_image(pieces[0]):
        return Conditions(video=images[pieces[0].frames[0]], video_at="start" if mode == "prefix" else "end")
    image = images.pop(0, None)
    last = next(iter(images.values()), None)
    return Conditions(None if image is None else image[0], None if last is None else last[0])


def shown_image(conditions: Conditions) -> np.ndarray | None:
    """Return the image to show for a video, uint8 [H, W, 3]: the first of its conditions; None without any."""
    array = next(iter(conditions.arrays()), None)
    return array[0] if array is not None and array.ndim == 4 else array
