"""`metrics.jsonl`: the scalars of a run, one JSON object a line.

A line is an optimizer step's, which has `train/loss`, or a note of what happened beside the steps (an evaluation, a
save) when so many had been trained. Whatever reads it tells them apart by that name (`step_lines`).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogds.errors import UserError
from cogds.files import whole_file


def metrics_line(step: int, scalars: Mapping[str, float]) -> bytes:
    """One line. What is not finite is null, JSON has no word for it."""
    finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    return json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n"


def step_lines(text: str) -> list[dict[str, Any]]:
    """The lines of optimizer steps, as objects; notes and a line cut short are left out."""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [record for line in whole if "train/loss" in (record := json.loads(line))]


def rewind_metrics(file: Path, step: int, again: tuple[str, ...] = ()) -> None:
    """Drop the lines past `step` (and what a kill or a power cut left half), so that a resumed run writes each step
    once. A note belongs to the step that it names: what was noted when `step` steps had been trained stays.

    again: beginnings of tags that the run is about to note anew at `step`; notes there that hold any of them go.

    Raises UserError where the file is there and cannot be read or replaced: no run has begun that this ends.
    """
    try:
        with file.open("rb") as lines, whole_file(file) as partial, partial.open("wb") as kept:
            for line in lines:
                at = _step_of(line)
                if at < step or (at == step and not _is_note_of(line, again)):
                    kept.write(line.rstrip(b"\n") + b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"{file}: the metrics of the steps before {step} cannot be taken over ({error.strerror or error}): mend "
            "that, or move the file away to begin a new one"
        ) from None


def _is_note_of(line: bytes, prefixes: tuple[str, ...]) -> bool:
    """Whether a whole line is no step's, and holds a tag that begins so."""
    record = json.loads(line)
    return "train/loss" not in record and any(tag.startswith(prefixes) for tag in record)


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinite where it is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
