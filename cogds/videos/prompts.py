"""Prompts and first frames of the videos to make, from the command line or a list file.

A list is a .csv or .jsonl file with the columns `prompt` and `image`, and optionally `size`, `seed`, `last_image` and
`video`. Any other file is read as text with one prompt per line. Paths are relative to the list's folder.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cogds.data.storage.location import join
from cogds.errors import UserError, did_you_mean

COLUMNS = ("prompt", "image", "size", "seed", "last_image", "video")


@dataclass(frozen=True)
class PromptSpec:
    """A prompt, its first frame, and what a list may set: size FRAMESxHEIGHTxWIDTH, seed, files of other conditions.

    image: a file; None in text-to-video, and if other conditions replace it. size_key: what sets the size, for errors.
    place: `FILE:LINE` in a list, for errors.
    """

    prompt: str
    image: str | None
    size: str | None = None
    seed: int | None = None
    size_key: str = "--size"
    last_image: str | None = None
    video: str | None = None
    place: str = field(default="", compare=False)


def read_prompt_specs(
    prompts: Sequence[str],
    images: Sequence[str],
    file: str | None,
    takes_image: bool = True,
    *,
    has_conditions: bool = False,
) -> list[PromptSpec]:
    """Combine --prompt, --image and --list.

    Without a list, prompts and images are paired; a single prompt or image applies to all. With a list, a single image
    applies to the lines that have neither an image nor a video. Without `takes_image`, there must be no images.
    has_conditions: whether other conditions are given, which can replace the image. Raises UserError, naming the flag
    or the line.
    """
    if images and not takes_image:
        raise UserError(
            f"--image: {images[0]} is given, but this model makes videos from the prompt alone. Leave --image out."
        )
    if file is None and not takes_image:
        if not prompts:
            raise UserError("command line: --prompt missing. A video is made from a prompt: pass one, or --list.")
        return [PromptSpec(prompt, None) for prompt in prompts]
    if file is None and has_conditions and prompts and not images:
        return [PromptSpec(prompt, None) for prompt in prompts]
    if file is None:
        if not prompts or not images:
            missing = " and ".join(flag for flag, values in (("--prompt", prompts), ("--image", images)) if not values)
            raise UserError(
                f"command line: {missing} missing. A video is made from a prompt and an image: pass both, or --list."
            )
        num = max(len(prompts), len(images))
        if {len(prompts), len(images)} - {1, num}:
            raise UserError(
                f"command line: {len(prompts)} --prompt and {len(images)} --image cannot be paired. Pass as many of "
                "both, or one of either."
            )
        return [PromptSpec(prompts[n % len(prompts)], images[n % len(images)]) for n in range(num)]
    if prompts:
        raise UserError("command line: --list and --prompt were both given. Put all prompts into the list.")
    if len(images) > 1:
        raise UserError(
            f"command line: --list was given with {len(images)} --image. Pass one for the lines that have no image."
        )
    specs = []
    for line, row in _read_rows(Path(file)):
        specs.append(spec := _make_spec(f"{file}:{line}", row, Path(file).parent, images))
        if takes_image and not (has_conditions or spec.image or spec.last_image or spec.video):
            raise UserError(f"{file}:{line}: no image. Add one, or pass --image for all lines that have none.")
        given = [name for name in ("image", "last_image", "video") if name in row]
        if not takes_image and given:
            raise UserError(
                f"{file}:{line}: {given[0]} {row[given[0]]} is given, but this model makes videos from the prompt "
                "alone. Remove it."
            )
    if not specs:
        raise UserError(f"{file}: no prompts. Write one per line.")
    return specs


def _read_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield each row of the list with its line number."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: cannot be read ({reason}). Pass a text, .csv or .jsonl file in UTF-8.") from None
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text))  # a quoted prompt may span several lines
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if value not in (None, "")}
        return
    # Not splitlines(), which would split prompts at U+2028 and the like.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if file.suffix.lower() != ".jsonl":
            yield number, {"prompt": line.strip()}
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not valid JSON ({error}). Write one JSON object per line.") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: not a JSON object. Write " + '{"prompt": "...", "image": "..."}.')
        yield number, {key: value for key, value in row.items() if value is not None}


def _make_spec(place: str, row: Mapping[str, Any], folder: Path, images: Sequence[str]) -> PromptSpec:
    """Check one row. place: `FILE:LINE` for errors."""
    for name in row:
        if name not in COLUMNS:
            near = did_you_mean(str(name), COLUMNS)
            raise UserError(f"{place}: unknown column '{name}'{near}. Use only {', '.join(COLUMNS)}.")
    prompt, image, size, seed, *others = (row.get(name) for name in COLUMNS)
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{place}: no prompt. Write one, or delete the line.")
    if isinstance(seed, str) and seed.strip().isdecimal():
        seed = int(seed)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise UserError(f"{place}: seed is {seed!r}. Use a whole number of at least 0.")
    image, last_image, video = (None if file is None else join(str(folder), str(file)) for file in (image, *others))
    if image is None and video is None:
        image = next(iter(images), None)
    spec = PromptSpec(prompt.strip(), image, seed=seed, last_image=last_image, video=video, place=place)
    return spec if size is None else replace(spec, size=str(size), size_key=f"{place}: size")
