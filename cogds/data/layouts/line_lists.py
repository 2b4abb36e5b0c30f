"""CogVideo's and finetrainers' lists: videos.txt and prompts.txt, one line per clip.

Optional are images.txt, with the first frames, and controls.txt, with the control videos.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from cogds.data.layouts.text_tables import opened_text
from cogds.data.storage.access import is_file
from cogds.data.storage.location import join, parent
from cogds.errors import UserError

VIDEO_LISTS = ("videos.txt", "video.txt")
IMAGE_LISTS = ("images.txt", "image.txt")
CONTROL_LISTS = ("controls.txt", "control.txt")
CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")


def main_list(names: Iterable[str], need_captions: bool) -> str | None:
    """The list of clips among the names of a folder, if there is one: of images only if there are no videos.

    need_captions: whether a list counts only if there is one of captions, too.
    """
    present = set(names)
    has_captions = any(name in present for name in CAPTION_LISTS)
    lists = (*(VIDEO_LISTS if has_captions or not need_captions else ()), *(IMAGE_LISTS if has_captions else ()))
    return next((name for name in lists if name in present), None)


def read_lines(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows (path, caption, image, control) of a list, numbered. Raises UserError if the lists differ."""
    folder, name = parent(file), file.rsplit("/", 1)[-1]
    captions = [other for other in CAPTION_LISTS if other != name and is_file(join(folder, other))]
    videos = [other for other in VIDEO_LISTS if is_file(join(folder, other))]
    if name in CAPTION_LISTS or (name in IMAGE_LISTS and videos):
        raise UserError(
            f"data.path: {file} is not the list of clips. Set data.path to {folder}/{(*videos, 'videos.txt')[0]}."
        )
    if len(captions) != 1:
        problem = f"both {' and '.join(captions)}. Keep one" if captions else "no prompts.txt. Add it"
        raise UserError(f"data.path: {folder} holds {name} and {problem}, with one caption per line.")
    images = [other for other in IMAGE_LISTS if name not in IMAGE_LISTS and is_file(join(folder, other))][:1]
    controls = [other for other in CONTROL_LISTS if is_file(join(folder, other))][:1]
    files = [name, *captions, *images, *controls]
    counts = {other: sum(1 for _ in _lines(join(folder, other))) for other in files}
    if len(set(counts.values())) > 1:
        lengths = ", ".join(f"{other} has {count}" for other, count in counts.items())
        raise UserError(
            f"data.path: the lists in {folder} have different numbers of lines: {lengths}. Line N of each must be of "
            "clip N."
        )
    columns = ("path", "caption", *("image" for _ in images), *("control" for _ in controls))
    for number, lines in enumerate(zip(*(_lines(join(folder, other)) for other in files)), 1):
        for other, line in zip(files, lines):
            if other not in captions and not line.strip():
                raise UserError(f"{folder}/{other}:{number}: empty line. Remove it here and in the other lists.")
        yield number, dict(zip(columns, lines))


def _lines(file: str) -> Iterator[str]:
    """Yield lines without their ends; split at line feeds only, because captions may hold other separators."""
    num_blank = 0
    with opened_text(file) as text:
        for line in text:
            content = line.removesuffix("\n").removesuffix("\r")
            if not content.strip():
                num_blank += 1  # blank lines at the end of a file are ignored
                continue
            yield from [""] * num_blank
            num_blank = 0
            yield content
