"""Sources, scenes, and how the one is cut into the other. Needs none of the libraries that do it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CutOptions:
    """How sources are cut and scored.

    Attributes:
        threshold: of the detector (`cuts.CutDetector`); None: each source is one scene.
        min_s, max_s: shorter scenes are left out, and longer ones divided into equal parts.
        scores: names in arguments.SCORES.
    """

    threshold: float | None
    min_s: float
    max_s: float
    scores: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A row of the dataset. start_s, end_s: the part to use, in seconds after the file's first frame."""

    path: str
    kind: str
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class Scene:
    """A scene. Scores that were not asked for, or cannot be measured, are None; `scores` defines them.

    Attributes:
        start_s, end_s: when its first frame is displayed, and the first frame of the next scene, in seconds after the
            file's first frame. None for an image.
        hashes: of NUM_HASHES pictures, evenly spaced, as bytes (`scores.picture_hash`).
    """

    start_s: float | None
    end_s: float | None
    width: int
    height: int
    fps: float | None
    motion: float | None = None
    sharpness: float | None = None
    text_share: float | None = None
    hashes: bytes | None = None


@dataclass(frozen=True)
class SourceResult:
    """The scenes of a source.

    Attributes:
        num_short: scenes left out because they are shorter than the minimum.
        duration_s: of the source.
        reason: why it cannot be used, or only up to some time.
    """

    scenes: list[Scene]
    num_short: int = 0
    duration_s: float = 0.0
    reason: str | None = None


def evenly_spaced(start_s: float, end_s: float, num: int) -> list[float]:
    """The middles of `num` equal parts of a range."""
    return [start_s + (end_s - start_s) * (number + 0.5) / num for number in range(num)]
