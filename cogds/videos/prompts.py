"""What videos are asked for: prompts with pictures, from flags or out of a list.

A list is a .csv or .jsonl file with `prompt`, `image`, and if wanted `size` and `seed`; or any other text file, with a
prompt a line. Paths in it are taken from its folder.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogds.errors import UserError, did_you_mean

COLUMNS = ("prompt", "image", "size", "seed")


@dataclass(frozen=True)
class Request:
    """A prompt, a picture file, and what else its line of the list says: a size FRAMESxHEIGHTxWIDTH, a seed."""

    prompt: str
    image: str
    size: str | None = None
    seed: int | None = None


def find_requests(prompts: Sequence[str], images: Sequence[str], file: str | None) -> list[Request]:
    """What is asked for, by flags and by a list. As many prompts as images, or one of either for all.

    An image that is given is for every line of the list that has none. Raises UserError, naming flag or line.
    """
    if file is None:
        if not prompts or not images:
            lacking = " and ".join(flag for flag, given in (("--prompt", prompts), ("--image", images)) if not given)
            raise UserError(f"missing: {lacking}. A video is made from a prompt and an image; or give a --list of them")
        num = max(len(prompts), len(images))
        if {len(prompts), len(images)} - {1, num}:
            raise UserError(
                f"there are {len(prompts)} --prompt and {len(images)} --image: give as many, or one of either for all"
            )
        return [Request(prompts[n % len(prompts)], images[n % len(images)]) for n in range(num)]
    if prompts or len(images) > 1:
        raise UserError("--list has the prompts: give no --prompt beside it, and at most one --image, for all of them")
    requests = [_request(f"{file}:{line}", row, Path(file).parent, images) for line, row in _rows(Path(file))]
    if not requests:
        raise UserError(f"--list {file} holds no prompt: write one a line")
    return requests


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Numbers of lines, and what stands in them."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--list {file} cannot be read ({reason}): give a text, .csv or .jsonl file in UTF-8") from None
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text))  # a prompt in quotes may go over several lines
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if value not in (None, "")}
        return
    # Not splitlines(): U+2028 and its like may stand in a prompt.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if file.suffix.lower() != ".jsonl":
            yield number, {"prompt": line.strip()}
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number} is not JSON ({error}): write an object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number} is no object: write " + '{"prompt": "...", "image": "..."}')
        yield number, {key: value for key, value in row.items() if value is not None}


def _request(where: str, row: Mapping[str, Any], folder: Path, images: Sequence[str]) -> Request:
    for name in row:
        if name not in COLUMNS:
            near = did_you_mean(str(name), COLUMNS)
            raise UserError(f"{where}: unknown column '{name}'{near}: there are {', '.join(COLUMNS)}")
    prompt, image, size, seed = (row.get(name) for name in COLUMNS)
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where} has no prompt: write one, or delete the line")
    if image is None and not images:
        raise UserError(f"{where} has no image: add one, or give --image for all that have none")
    if isinstance(seed, str) and seed.strip().isdecimal():
        seed = int(seed)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise UserError(f"{where}: seed is {seed!r}, which is no whole number of at least 0: correct it")
    found = str(folder / str(image)) if image is not None else images[0]
    return Request(prompt.strip(), found, None if size is None else str(size), seed)
