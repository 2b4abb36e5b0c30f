"""Which files are videos and images, by their suffix."""

import os
from collections.abc import Iterable

from cogds.data.storage.location import display_name, is_url

_VIDEOS = "mp4 m4v mov qt 3gp 3g2 f4v mkv webm avi divx wmv asf flv ogv mpg mpeg vob ts mts m2t m2ts mxf dv gif apng"
_IMAGES = "jpg jpeg jpe jfif png webp bmp tif tiff heic heif hif avif"
VIDEO_SUFFIXES = frozenset(f".{name}" for name in _VIDEOS.split())
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _IMAGES.split())


def suffix_of(location: str) -> str:
    """The suffix of a file's name in lower case, "" if there is none or the text after the dot is something else."""
    name = display_name(location)
    suffix = os.path.splitext(name.split("?")[0] if is_url(name) else name)[1].lower()
    return suffix if len(suffix) <= 10 and suffix[1:].isalnum() else ""


def kind_of(location: str) -> str | None:
    """ "video", "image", or None for a suffix that is neither.

    The suffix only says which library opens the file first. An animation with the suffix of an image (.webp, .png,
    .avif) is read as a video, and a video of one frame (a still .gif) counts as an image wherever clips have lengths.
    """
    suffix = suffix_of(location)
    if suffix in VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix in IMAGE_SUFFIXES else None


CONTROL_SUFFIX = ".control"  # a.control.mp4 is the control video of a.mp4


def control_names(names: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """The controls among the names of clips in a folder.

    All clips of a name share its controls: `a.control.mp4` belongs to `a.mp4` and to `a.mov`, and a poster `a.png` does
    not take it from them. A video may have a thumbnail, so of several controls, a clip's is the first of its own kind.

    Returns:
        Name of a clip -> name of its control, and the names of controls that no clip uses.
    """
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
    controls, files = {}, set()
    for stem, clips in by_stem.items():
        found = by_stem.get(stem + CONTROL_SUFFIX)
        if found and not stem.endswith(CONTROL_SUFFIX):
            files.update(found)
            for clip in clips:
                controls[clip] = next((name for name in found if kind_of(name) == kind_of(clip)), found[0])
    return controls, files - set(controls.values())
