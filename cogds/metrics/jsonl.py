"""`metrics.jsonl`: the scalars of a run, one JSON object per line.

A line belongs to an optimizer step and has `train/loss`, or it is a note about what happened between two steps (an
evaluation, a save) and names the last step before it. Readers tell them apart by `train/loss` (`step_lines`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cogds.errors import UserError
from cogds.files import whole_file


def metrics_line(step: int, scalars: Mapping[str, float]) -> bytes:
    """Return one line. Values that are not finite are null, because JSON cannot represent them."""
    finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    return json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n"


def step_lines(text: str) -> list[dict[str, Any]]:
    """Return the lines of optimizer steps, as objects, without notes and without an incomplete last line."""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [record for line in whole if "train/loss" in (record := json.loads(line))]


def read_scalars(file: Path, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) pairs of these scalars, none if there is no file. Damaged lines and null are left out."""
    scalars: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    if not file.is_file():
        return scalars
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                step = int(record["step"])
            except (ValueError, KeyError, TypeError):
                continue
            for name in names:
                if isinstance(value := record.get(name), (int, float)):
                    scalars[name].append((step, float(value)))
    return scalars


def first_evaluation(file: Path) -> dict[str, float]:
    """Return the losses of a run's first evaluation, {} if there are none or the file cannot be read."""
    try:
        with file.open("rb") as lines:
            for line in lines:
                if _step_of(line) < math.inf and _is_note(line, ("eval/",)):
                    return {tag: value for tag, value in json.loads(line).items() if isinstance(value, float)}
    except OSError:
        pass
    return {}


def rewind_metrics(file: Path, step: int, repeated: tuple[str, ...] = ()) -> None:
    """Remove the lines after `step`, and incomplete lines, so that a resumed run writes each step once.

    Notes that name `step` itself stay, except those with a tag that starts with any of `repeated`: the resumed run
    writes these again. Raises UserError if the file exists but cannot be read or replaced.
    """
    try:
        with file.open("rb") as lines, whole_file(file) as partial, partial.open("wb") as kept:
            for line in lines:
                line_step = _step_of(line)
                if line_step < step or (line_step == step and not _is_note(line, repeated)):
                    kept.write(line.rstrip(b"\n") + b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"{file}: the metrics up to step {step} cannot be kept ({error.strerror or error}). Correct that, or move "
            "the file away to start a new one."
        ) from None


def _is_note(line: bytes, prefixes: tuple[str, ...]) -> bool:
    """Whether a complete line is a note with a tag that starts with any of the prefixes."""
    record = json.loads(line)
    return "train/loss" not in record and any(tag.startswith(prefixes) for tag in record)


def _step_of(line: bytes) -> float:
    """Return the step of a line, or infinity if it is not a line of metrics."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
