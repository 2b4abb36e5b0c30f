"""The life of a checkpoint: written aside, complete or absent, found again, verified before anything is loaded.

    output_dir/checkpoints/latest               the name of the newest complete one, for people and scripts
    output_dir/checkpoints/step-000500/         trainable.safetensors, and state.json, written last

Rank 0 writes into `step-N.tmp` while training goes on: the tensors, then state.json with the digest of each file; both
are brought to the disk, the folder is renamed, `latest` replaced, and only then are old ones pruned. Sample order and
random draws follow from the step number: there is no loader or generator state. Everything in it is data: JSON and
safetensors.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cogds.errors import UserError
from cogds.files import whole_file
from cogds.runtime.state import TrainState
from cogds.runtime.world import World, on_rank0

STATE_FILE = "state.json"
TENSORS_FILE = "trainable.safetensors"
LATEST_FILE = "latest"
OWN_FILES = (
    "checkpoints", "lora", "metrics.jsonl", "tensorboard", "run.yaml", "ds_config.json", "unusable.jsonl",
    "quarantine.jsonl", "samples",
)  # fmt: skip
# What is left free beside a checkpoint: logs, metrics, and whoever else writes there.
SPARE_BYTES = 64e6
STEP_NAME = re.compile(r"step-\d{6,}")


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written, or never was one."""


def step_name(step: int) -> str:
    """`step-000500`: the name of a checkpoint and of a LoRA export."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step of a folder that `step_name` named."""
    return int(path.name.rpartition("-")[2])


def _is_own(path: Path) -> bool:
    """Whether `step_name` names it: a user's `step-000500-backup` is no matter of ours."""
    return STEP_NAME.fullmatch(path.name) is not None


def start_point(resume: str, facts: Mapping[str, Any]) -> str:
    """Where a run began: a checkpoint that it was told to begin with, or "". Kept in its checkpoints."""
    return facts.get("start", "") if resume in ("auto", "none") else str(Path(resume).resolve())


def replace_folder(partial: Path, final: Path) -> None:
    """Give a finished folder its name; one of that name (the same step, trained again) makes way."""
    if final.exists():
        remove_folder(final)
    partial.rename(final)


def remove_folder(folder: Path) -> None:
    """Remove a folder that is never seen in part, whenever the removal is cut short: its name goes first."""
    shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.old.tmp")))


def remove_partial(folder: Path) -> None:
    """Remove what a killed save has left in a folder of checkpoints or exports."""
    for left in folder.glob("*.tmp"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def complete(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (file.parent for file in checkpoints.glob(f"step-*/{STATE_FILE}"))
    return sorted(filter(_is_own, found), key=step_of)


def check_space(folder: Path, num_bytes: float) -> None:
    """Raise UserError where the disk has no room for so many bytes more: before writing, not in the middle of it."""
    free, needed = shutil.disk_usage(folder).free, num_bytes + SPARE_BYTES
    if free < needed:
        raise UserError(
            f"the disk of {folder} is nearly full: a checkpoint and its LoRA need {needed / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free: make room, or lower checkpoint.keep_last; the same command then goes on "
            "from the last checkpoint, where there is one"
        )


def write(
    checkpoints: Path, step: int, state: TrainState, facts: Mapping[str, Any], keep_last: int, keep_every: int | None
) -> Path:
    """Write checkpoint `step` with `facts` (JSON-able) in its state.json, then prune those that are not to be kept.

    Whatever it raises, the checkpoints before it stay.
    """
    final = checkpoints / step_name(step)
    partial = final.with_name(f"{final.name}.tmp")
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_partial(checkpoints)
    partial.mkdir()
    save_file(state.tensors, partial / TENSORS_FILE)
    _to_disk(partial / TENSORS_FILE)
    files = {TENSORS_FILE: _fingerprint(partial / TENSORS_FILE)}
    facts = {"step": step, "num_updates": state.num_updates, "files": files, **facts}
    (partial / STATE_FILE).write_text(json.dumps({**facts, "digest": _digest(facts)}, indent=2))
    _to_disk(partial / STATE_FILE)
    _to_disk(partial)
    replace_folder(partial, final)
    _to_disk(checkpoints)
    with whole_file(checkpoints / LATEST_FILE) as latest:
        latest.write_text(final.name + "\n")
    for old in complete(checkpoints)[: -max(keep_last, 1)]:
        if old != final and not (keep_every and step_of(old) % keep_every == 0):
            remove_folder(old)
    return final


def _to_disk(path: Path) -> None:
    """What was written survives a power failure; of a folder, its names do."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks have none
            raise
    finally:
        os.close(handle)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(facts: Mapping[str, Any]) -> str:
    """Of what state.json holds, however it is laid out."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """What state.json holds, once every file was found to be as it was written. Raises DamagedCheckpoint."""
    try:
        try:
            facts = json.loads((checkpoint / STATE_FILE).read_text())
        except ValueError as error:
            raise DamagedCheckpoint(f"{checkpoint / STATE_FILE} is damaged ({error})") from None
        if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
            raise DamagedCheckpoint(
                f"{checkpoint} names no files with their digests in its {STATE_FILE}: it is damaged, or of a version "
                "of cogds from before it kept them"
            )
        if facts.pop("digest", "") != _digest(facts) or facts["step"] != step_of(checkpoint):
            raise DamagedCheckpoint(f"{checkpoint / STATE_FILE} is damaged: it is not what was written")
        for name, expected in facts["files"].items():
            found = _fingerprint(checkpoint / Path(name).name)
            if found != expected:
                what = f"{found['bytes']} bytes instead of {expected['bytes']}"
                differs = "other content" if found["bytes"] == expected["bytes"] else what
                raise DamagedCheckpoint(f"{checkpoint / name} is damaged: it has {differs} than was written")
    except OSError as error:
        raise DamagedCheckpoint(f"{checkpoint} cannot be read ({error})") from None
    return facts


def read_train_state(checkpoint: Path, facts: Mapping[str, Any]) -> TrainState:
    """The state that `facts`, of `read_facts`, belong to. Raises DamagedCheckpoint where it is no safetensors file."""
    try:
        tensors = load_file(checkpoint / TENSORS_FILE)
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpoint(
            f"{checkpoint / TENSORS_FILE} is not a safetensors file ({error}); nothing else is loaded, least of all "
            "pickled objects"
        ) from None
    return TrainState(tensors, float(facts["num_updates"]))


def find(checkpoints: Path, resume: str) -> tuple[Path, dict[str, Any], TrainState] | None:
    """What to resume from, as `checkpoint.resume` says, verified: its path, facts and state. None for a fresh start.

    `auto` is the newest sound one; damaged ones are named on the way. `none` is a fresh start, anything else the folder
    of a checkpoint to begin with: a run that began with it goes on from its own newest. Raises UserError where a path
    is no sound checkpoint, and where `auto` finds only damaged ones: a run never starts afresh by itself.
    """
    if resume == "none":
        return None
    if resume != "auto":
        path = Path(resume)
        if not (path / STATE_FILE).is_file():
            raise UserError(
                f"checkpoint.resume: {resume} is not a complete checkpoint (it has no {STATE_FILE}); "
                f"give a folder such as {checkpoints / step_name(500)}, or auto"
            )
        starts = (_start_of(own) for own in reversed(complete(checkpoints)))
        if next((start for start in starts if start is not None), None) != start_point(resume, {}):
            facts = read_facts(path)
            return path, facts, read_train_state(path, facts)
    candidates = complete(checkpoints)[::-1]
    for path in candidates:
        try:
            facts = read_facts(path)
            return path, facts, read_train_state(path, facts)
        except DamagedCheckpoint as error:
            print(f"WARNING: {error}; trying the checkpoint before it", file=sys.stderr, flush=True)
    if candidates:
        raise UserError(
            f"not one of the {len(candidates)} checkpoints in {checkpoints} is sound: the reasons stand above; "
            "checkpoint.resume=none starts afresh and keeps them"
        )
    return None


def _start_of(checkpoint: Path) -> str | None:
    try:
        return read_facts(checkpoint).get("start")
    except DamagedCheckpoint:
        return None


class Saver:
    """Writes behind the training's back, on rank 0, one thing at a time. Every rank has one."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "cogds-save")
        self._writing: Future[float] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Call `write` in the background. The one before must have been finished."""

        def timed() -> float:
            start = time.perf_counter()
            try:
                write()
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"saving failed ({error}): the run ends here; the same command goes on from the checkpoint before, "
                    "once the disk takes it"
                ) from None
            return time.perf_counter() - start

        self._writing = self._thread.submit(timed)

    @property
    def done(self) -> bool:
        """Whether something was written, or failed to be, and is not yet finished with."""
        return self._writing is not None and self._writing.done()

    def finish(self, world: World) -> float | None:
        """Wait for what is being written; its seconds, None where nothing was. What failed raises. Collective."""
        writing, self._writing = self._writing, None
        return on_rank0(world, lambda: writing.result() if writing else None)


def set_aside(output_dir: Path, resume_from: Path | None, step: int) -> Path | None:
    """Move what an earlier run left out of the way, losing nothing; returns where to, None if there was nothing.

    For a run that goes on from a checkpoint of its own, that is what lies past `step`; else it is everything.
    """
    if resume_from and resume_from.resolve().parent == (output_dir / "checkpoints").resolve():
        steps = (path for kind in ("checkpoints", "lora", "samples") for path in (output_dir / kind).glob("step-*"))
        old = [path for path in steps if _is_own(path) and step_of(path) > step]
    else:
        old = [output_dir / name for name in OWN_FILES if (output_dir / name).exists()]
    if not old:
        return None
    number = 1
    while (aside := output_dir / f"previous-{number}").exists():
        number += 1
    if (output_dir / "metrics.jsonl").exists() and output_dir / "metrics.jsonl" not in old:
        aside.mkdir()
        shutil.copy(output_dir / "metrics.jsonl", aside)  # the run itself goes on in the first of its lines
    for path in old:
        kept = aside / path.relative_to(output_dir)
        kept.parent.mkdir(parents=True, exist_ok=True)
        path.rename(kept)
    return aside
