"""Checkpoints, which are complete or absent, and verified before anything is loaded.

    output_dir/checkpoints/latest               name of the newest complete checkpoint, for people and scripts
    output_dir/checkpoints/step-000500/         the tensors, and state.json, which is written last

Of a LoRA, rank 0 writes all tensors into `trainable.safetensors`; of a full fine-tune, every rank writes its own part
(`engine.shards`). They are written into `step-N.tmp` while training continues: the tensors, then state.json with the
digest of each file. All are flushed to the disk, the folder is renamed, `latest` is replaced, and only then are old
checkpoints removed. Sample order and random draws depend only on the step number, so no state of loaders or generators
is saved. A checkpoint holds only data: JSON and safetensors.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cogds.distributed.collectives import on_all_ranks
from cogds.distributed.world import World
from cogds.engine.state import TrainState
from cogds.errors import UserError
from cogds.files import apply_umask, existing_parent, whole_file

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
TENSORS_FILE = "trainable.safetensors"
LATEST_FILE = "latest"
SAVED_FOLDERS = ("checkpoints", "lora", "model", "model_ema")
RUN_FILES = (
    *SAVED_FOLDERS, "metrics.jsonl", "tensorboard", "run.yaml", "ds_config.json",
    "unusable.jsonl", "quarantine.jsonl", "samples",
)  # fmt: skip
MAX_READERS = 8  # threads that verify files
# Disk space to leave free for logs, metrics and other users of the disk.
SPARE_BYTES = 64e6
STEP_NAME = re.compile(r"step-\d{6,}")


class DamagedCheckpoint(UserError):
    """A file of the checkpoint is missing, unreadable or changed, or the folder is not a checkpoint."""


class Checkpoint(NamedTuple):
    """A verified checkpoint.

    header: the content of its state.json. state: the tensors of a LoRA; empty for a full fine-tune, whose ranks read
    their own parts (`engine.shards`).
    """

    path: Path
    header: dict[str, Any]
    state: TrainState


def step_name(step: int) -> str:
    """Return the name of a checkpoint and of a LoRA export: `step-000500`."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """Return the step of a folder named by `step_name`."""
    return int(path.name.rpartition("-")[2])


def _is_step_folder(path: Path) -> bool:
    """Whether `step_name` named the folder. A user's folder such as `step-000500-backup` is left alone."""
    return STEP_NAME.fullmatch(path.name) is not None


def start_point(resume: str, header: Mapping[str, Any]) -> str:
    """Return the checkpoint that a run started from, which its own checkpoints record, or ""."""
    return header.get("start", "") if resume in ("auto", "none") else str(Path(resume).resolve())


# ------------------------------------------------------------------------------------------------ folders and disk


def replace_folder(partial: Path, final: Path) -> None:
    """Rename a complete folder. A folder that already has the name (the same step, trained again) is removed."""
    if final.exists():
        remove_folder(final)
    partial.rename(final)


def remove_folder(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that an interrupted removal leaves no incomplete folder of that name."""
    shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.old.tmp")))


def remove_partial(folder: Path) -> None:
    """Remove the files of interrupted saves from a folder of checkpoints or exports."""
    for partial in folder.glob("*.tmp"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def remove_all_partial(output_dir: Path) -> None:
    """Remove the files of interrupted saves of a run, which may fill the disk. No run may be saving there."""
    for name in SAVED_FOLDERS:
        remove_partial(output_dir / name)


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    folders = (file.parent for file in checkpoints.glob(f"step-*/{STATE_FILE}"))
    return sorted(filter(_is_step_folder, folders), key=step_of)


def step_folders(parent: Path) -> list[Path]:
    """Return the folders that `step_name` named, in no particular order."""
    return [path for path in parent.glob("step-*") if _is_step_folder(path)]


def check_space(folder: Path, num_bytes: float) -> None:
    """Raise UserError if the disk does not have room for `num_bytes` more. The folder need not exist yet."""
    free, needed = shutil.disk_usage(existing_parent(folder)).free, num_bytes + SPARE_BYTES
    if free < needed:
        raise UserError(
            f"{folder}: the disk is nearly full; a checkpoint and what is exported need {needed / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free. Make room or lower checkpoint.keep_last, then run the same command again "
            "to continue from the last checkpoint."
        )


def _flush_to_disk(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot flush folders.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ writing


def write(
    checkpoints: Path, step: int, state: TrainState, header: Mapping[str, Any], keep_last: int, keep_every: int | None
) -> Path:
    """Write checkpoint `step` with `header` in its state.json, then remove old checkpoints that need not be kept.

    If writing fails, no earlier checkpoint is lost.
    """
    partial = begin_folder(checkpoints, step)
    save_file(state.tensors, partial / TENSORS_FILE)
    apply_umask(partial / TENSORS_FILE)
    _flush_to_disk(partial / TENSORS_FILE)
    files = {TENSORS_FILE: _file_digest(partial / TENSORS_FILE)}
    return commit(
        partial, {"step": step, "num_updates": state.num_updates, "files": files, **header}, keep_last, keep_every
    )


def begin_folder(parent: Path, step: int) -> Path:
    """Create the temporary folder of a checkpoint or an export in `parent`, without the files of interrupted saves."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_partial(parent)
    partial = parent / f"{step_name(step)}.tmp"
    partial.mkdir()
    return partial


def commit(partial: Path, header: Mapping[str, Any], keep_last: int, keep_every: int | None) -> Path:
    """Complete a checkpoint whose tensors are written and flushed, then remove old checkpoints.

    header: with `step`, `num_updates` and the digests of the `files`. Returns the checkpoint's folder.
    """
    checkpoints, final = partial.parent, partial.with_suffix("")
    (partial / STATE_FILE).write_text(json.dumps({**header, "digest": _header_digest(header)}, indent=2))
    _flush_to_disk(partial / STATE_FILE)
    _flush_to_disk(partial)
    replace_folder(partial, final)
    _flush_to_disk(checkpoints)
    with whole_file(checkpoints / LATEST_FILE) as latest:
        latest.write_text(final.name + "\n")
    for old in complete_checkpoints(checkpoints)[: -max(keep_last, 1)]:
        if old != final and not (keep_every and step_of(old) % keep_every == 0):
            remove_folder(old)
    return final


# A part of a save: gets every rank's result of the part before, in rank order.
Phase = Callable[[list[Any]], Any]


class Saver:
    """Writes in a background thread of each rank, one save at a time.

    A save has phases, and a phase begins when all ranks have finished the one before. So a file can depend on the files
    of other ranks, and no rank waits in its thread for another.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "saver")
        self._phases: list[Phase] = []
        self._current: Future[Any] | None = None
        self._began = 0.0

    def start(self, *phases: Phase) -> None:
        """Begin a save on every rank. The previous one must be finished."""
        self._began = time.perf_counter()
        self._phases = list(phases)
        self._next([])

    def _next(self, results: list[Any]) -> None:
        phase = self._phases.pop(0) if self._phases else None
        self._current = self._executor.submit(_translate_errors, phase, results) if phase else None

    @property
    def is_saving(self) -> bool:
        """Whether a save has begun and is not finished. The same on all ranks."""
        return self._current is not None

    @property
    def is_busy(self) -> bool:
        """Whether this rank's thread is writing."""
        return self._current is not None and not self._current.done()

    def advance(self, world: World) -> float | None:
        """Wait for the current phase on all ranks and begin the next. Returns the duration of a finished save [s].

        None if the save is not finished, or there is none. Collective.

        Raises:
            UserError: The disk failed or is full.
        """
        current, self._current = self._current, None
        if current is None:
            return None
        self._next(on_all_ranks(world, current.result))
        return None if self.is_saving else time.perf_counter() - self._began

    def finish(self, world: World) -> float | None:
        """Wait for the save in progress and return its duration in seconds; None if there is none. Collective.

        Raises:
            UserError: The disk failed or is full.
        """
        seconds = None
        while self.is_saving:
            seconds = self.advance(world)
        return seconds


def _translate_errors(phase: Phase, results: list[Any]) -> Any:
    try:
        return phase(results)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"output_dir: saving failed ({error}). Correct that, then run the same command again to continue from the "
            "previous checkpoint."
        ) from None


# ------------------------------------------------------------------------------------------------ reading


def _file_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _header_digest(header: Mapping[str, Any]) -> str:
    """Return a digest of the values, which does not depend on the layout of the file."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def read_header(checkpoint: Path) -> dict[str, Any]:
    """Return the content of state.json after verifying every file of the checkpoint.

    Raises:
        DamagedCheckpoint: A file is missing, unreadable, or not what was written.
    """
    file = checkpoint / STATE_FILE
    try:
        try:
            header = json.loads(file.read_text())
        except ValueError as error:
            raise DamagedCheckpoint(f"{file}: is damaged ({error}).") from None
        if not isinstance(header, dict) or not isinstance(header.get("files"), dict):
            raise DamagedCheckpoint(f"{file}: has no file digests: it is damaged or from an early version of cogds.")
        if header.pop("digest", "") != _header_digest(header) or header["step"] != step_of(checkpoint):
            raise DamagedCheckpoint(f"{file}: is damaged: its content is not what was written.")
        paths = [checkpoint / Path(name).name for name in header["files"]]
        with ThreadPoolExecutor(MAX_READERS) as pool:  # the digests of a full fine-tune take minutes on one core
            digests = list(pool.map(_file_digest, paths))
        for path, digest, expected in zip(paths, digests, header["files"].values()):
            if digest["bytes"] != expected["bytes"]:
                raise DamagedCheckpoint(
                    f"{path}: is damaged: it has {digest['bytes']} bytes instead of {expected['bytes']}."
                )
            if digest != expected:
                raise DamagedCheckpoint(f"{path}: is damaged: its content is not what was written.")
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename or file}: cannot be read ({error.strerror or error}).") from None
    return header


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify and read a checkpoint.

    Raises:
        DamagedCheckpoint: A file is missing, unreadable, not what was written, or not a safetensors file.
    """
    header = read_header(path)
    if TENSORS_FILE not in header["files"]:
        return Checkpoint(path, header, TrainState({}, float(header["num_updates"])))
    try:
        tensors = load_file(path / TENSORS_FILE)
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpoint(
            f"{path / TENSORS_FILE}: is not a safetensors file ({error}). No other format is read, because pickled "
            "objects can run code."
        ) from None
    return Checkpoint(path, header, TrainState(tensors, float(header["num_updates"])))


def find(checkpoints: Path, resume: str) -> Checkpoint | None:
    """Find and verify the checkpoint that `checkpoint.resume` names; None to start from scratch.

    resume: `auto` is the newest undamaged checkpoint; damaged ones are reported. `none` starts from scratch. Any other
    value is the folder of a checkpoint to start from, but a run that has already started from it continues from its
    own newest checkpoint.

    Raises:
        UserError: The folder is not a checkpoint or is damaged, or `auto` finds only damaged checkpoints, because
            only `none` may start from scratch when there are checkpoints.
    """
    if resume == "none":
        return None
    if resume != "auto":
        path = Path(resume)
        if not (path / STATE_FILE).is_file():
            raise UserError(
                f"checkpoint.resume: {resume} is not a complete checkpoint: it has no {STATE_FILE}. Pass a folder such "
                f"as {checkpoints / step_name(500)}, or auto."
            )
        starts = (_start_point_of(own) for own in reversed(complete_checkpoints(checkpoints)))
        if next((start for start in starts if start is not None), None) != start_point(resume, {}):
            return read_checkpoint(path)
    candidates = complete_checkpoints(checkpoints)[::-1]
    for path in candidates:
        try:
            return read_checkpoint(path)
        except DamagedCheckpoint as error:
            logger.warning(f"{error} Trying the previous checkpoint.")
    if candidates:
        raise UserError(
            f"checkpoint.resume: all {len(candidates)} checkpoints in {checkpoints} are damaged; see the warnings "
            "above. To start from scratch and keep them, set checkpoint.resume=none."
        )
    return None


def _start_point_of(checkpoint: Path) -> str | None:
    try:
        return read_header(checkpoint).get("start")
    except DamagedCheckpoint:
        return None


def set_aside(output_dir: Path, resume_from: Path | None, step: int) -> Path | None:
    """Move the files of an earlier run to `previous-N` and return that folder; None if there is nothing to move.

    A run that continues from its own checkpoint moves only what is after `step`; any other run moves everything.
    """
    if resume_from and resume_from.resolve().parent == (output_dir / "checkpoints").resolve():
        folders = (path for kind in (*SAVED_FOLDERS, "samples") for path in (output_dir / kind).glob("step-*"))
        old = [path for path in folders if _is_step_folder(path) and step_of(path) > step]
    else:
        old = [output_dir / name for name in RUN_FILES if (output_dir / name).exists()]
    if not old:
        return None
    number = 1
    while (previous := output_dir / f"previous-{number}").exists():
        number += 1
    metrics = output_dir / "metrics.jsonl"
    if metrics.exists() and metrics not in old:
        previous.mkdir()
        shutil.copy(metrics, previous)  # the run itself keeps the lines up to `step`
    for path in old:
        kept = previous / path.relative_to(output_dir)
        kept.parent.mkdir(parents=True, exist_ok=True)
        path.rename(kept)
    return previous
