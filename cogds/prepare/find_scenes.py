"""From one source to its scenes: where they begin and end, and how they score. Runs in a worker process.

A source is a row of the dataset: a file, or a range of it. Its frames are decoded once, in order, and small facts about
them are kept (`_Track`). The scenes follow from those.
"""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np

from cogds.data.video.frames import iter_frames, read_frame, read_whole_image
from cogds.data.video.images import is_animation, probe_image
from cogds.data.video.media import DecodeError
from cogds.prepare.cuts import CutDetector
from cogds.prepare.scene import CutOptions, Scene, Source, SourceResult, evenly_spaced
from cogds.prepare.scores import NUM_HASHES, TEXT_SIDE, mean_speed, picture_hash, sharpness, text_share

# Longer side of the frames in which cuts, motion and near duplicates are found, as PySceneDetect scales them [px].
SMALL_SIDE = 256
# Longer side of the frames whose sharpness is measured, smaller ones enlarged, so that all sources compare [px].
LARGE_SIDE = 1280
SAMPLES_PER_S = 8
NUM_TEXT_FRAMES = 3


@dataclass
class _Track:
    """Facts about the frames of a source, in order.

    Attributes:
        starts_s, end_s: when each frame is displayed, and when the last one ends.
        cuts: indices of frames that begin a scene.
        samples: indices of the frames that are sampled, with their sharpness and hash.
        speeds: of the picture from each sample to the next.
    """

    size: tuple[int, int] = (0, 0)
    starts_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    cuts: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    error: str | None = None


def find_scenes(source: Source, options: CutOptions) -> SourceResult:
    """Cut a source into scenes and score them. Raises DecodeError if none of it can be used."""
    if source.kind == "image" and not is_animation(source.path):
        return SourceResult([_image_scene(source, options)])
    track = _read_track(source, options)
    boundaries = [0, *track.cuts, len(track.starts_s)]
    if track.error:  # the scene that holds the damage has no known end
        boundaries.pop()
    scenes, num_short = [], 0
    for first, end in itertools.pairwise(boundaries):
        for part in _parts(track, first, end, options.max_s):
            start_s, end_s = _time(track, part[0]), _time(track, part[1])
            # A millisecond less counts as long enough, because containers round times.
            if end_s - start_s < options.min_s - 1e-3:
                num_short += 1
            else:
                scenes.append(_scene(source, track, part, options))
    duration_s = track.end_s - track.starts_s[0]
    return SourceResult(scenes, num_short, duration_s, track.error)


def _read_track(source: Source, options: CutOptions) -> _Track:
    track, detector = _Track(), CutDetector(options.threshold) if options.threshold is not None else None
    previous, next_sample_s = None, -math.inf
    frames = iter_frames(source.path, source.start_s or 0.0, source.end_s)
    try:
        for index, frame in enumerate(frames):
            small = frame.pixels(SMALL_SIDE)
            if detector:
                detector.add(small)
            if frame.start_s >= next_sample_s:
                next_sample_s = (math.floor(frame.start_s * SAMPLES_PER_S + 1e-6) + 1) / SAMPLES_PER_S
                if previous is not None and "motion" in options.scores:
                    track.speeds.append(mean_speed(previous[1], small, frame.start_s - previous[0]))
                if "sharpness" in options.scores:
                    track.sharpness.append(sharpness(frame.pixels(LARGE_SIDE)))
                if "duplicates" in options.scores:
                    track.hashes.append(picture_hash(small))
                previous = frame.start_s, small
                track.samples.append(index)
            track.size, track.end_s = frame.size, frame.end_s
            track.starts_s.append(frame.start_s)
    except DecodeError as error:
        if not track.starts_s:
            raise
        track.error = f"{error}; scenes before that are used"
    if source.end_s is not None and not track.error:
        track.end_s = min(track.end_s, source.end_s)
    track.cuts = detector.cuts() if detector else []
    return track


def _time(track: _Track, index: int) -> float:
    return track.starts_s[index] if index < len(track.starts_s) else track.end_s


def _parts(track: _Track, first: int, end: int, max_s: float) -> list[tuple[int, int]]:
    """Divide a scene (first frame, end) into equal parts that are not longer than max_s."""
    start_s, length_s = _time(track, first), _time(track, end) - _time(track, first)
    num_parts = max(1, math.ceil((length_s - 1e-3) / max_s))
    starts = np.asarray(track.starts_s[first:end])
    limits = [start_s + length_s * part / num_parts for part in range(1, num_parts)]
    inner = [first + int(np.searchsorted(starts, limit, side="left")) for limit in limits]
    edges = [first, *inner, end]
    return [(left, right) for left, right in itertools.pairwise(edges) if left < right]


def _scene(source: Source, track: _Track, part: tuple[int, int], options: CutOptions) -> Scene:
    start_s, end_s = _time(track, part[0]), _time(track, part[1])
    first, end = np.searchsorted(track.samples, part).tolist()
    speeds, sharp, hashes = (
        track.speeds[first : max(first, end - 1)],
        track.sharpness[first:end],
        track.hashes[first:end],
    )
    middles_s = evenly_spaced(start_s, end_s, NUM_HASHES)
    times_s = [track.starts_s[index] for index in track.samples[first:end]]
    return Scene(
        start_s=start_s,
        end_s=end_s,
        width=track.size[1],
        height=track.size[0],
        fps=(part[1] - part[0]) / (end_s - start_s),
        motion=float(np.mean(speeds)) if speeds else None,
        sharpness=float(np.median(sharp)) if sharp else None,
        text_share=_text_share(source, track.size, start_s, end_s) if "text" in options.scores else None,
        hashes=b"".join(hashes[int(np.abs(np.subtract(times_s, time)).argmin())] for time in middles_s)
        if hashes
        else None,
    )


def _text_share(source: Source, size: tuple[int, int], start_s: float, end_s: float) -> float:
    side = min(TEXT_SIDE, max(size))  # in enlarged pictures, RapidOCR finds text that is not there
    times_s = evenly_spaced(start_s, end_s, NUM_TEXT_FRAMES)
    return float(np.mean([text_share(read_frame(source.path, time, side)) for time in times_s]))


def _image_scene(source: Source, options: CutOptions) -> Scene:
    info = probe_image(source.path)
    large = read_whole_image(source.path, LARGE_SIDE)
    side = min(TEXT_SIDE, max(info.height, info.width))
    return Scene(
        start_s=None,
        end_s=None,
        width=info.width,
        height=info.height,
        fps=None,
        sharpness=sharpness(large) if "sharpness" in options.scores else None,
        text_share=text_share(read_whole_image(source.path, side)) if "text" in options.scores else None,
        hashes=picture_hash(read_whole_image(source.path, SMALL_SIDE)) * NUM_HASHES
        if "duplicates" in options.scores
        else None,
    )
