"""The life of a checkpoint: written aside, complete or absent, found again, compared before it is loaded.

    output_dir/checkpoints/latest               the name of the newest complete one
    output_dir/checkpoints/step-000500/         DeepSpeed's files of every rank, and state.json, written last

Every rank writes into `step-N.tmp`; barrier; rank 0 adds state.json, renames, and replaces `latest`; only then are old
ones pruned. Sample order and random draws follow from the step number: there is no loader or generator state.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogds.errors import UserError
from cogds.files import whole_file
from cogds.runtime.world import World, barrier, on_rank0

STATE_FILE = "state.json"
LATEST_FILE = "latest"
OWN_FILES = (
    "checkpoints", "lora", "metrics.jsonl", "tensorboard", "run.yaml", "ds_config.json", "unusable.jsonl",
    "quarantine.jsonl",
)  # fmt: skip


def step_name(step: int) -> str:
    """`step-000500`: the name of a checkpoint and of a LoRA export."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step of a folder that `step_name` named."""
    return int(path.name.rpartition("-")[2])


def replace_folder(partial: Path, final: Path) -> None:
    """Give a finished folder its name; one of that name (the same step, trained again) makes way."""
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)


def _complete(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path.parent for path in checkpoints.glob(f"step-*[0-9]/{STATE_FILE}")), key=step_of)


def save(engine: Any, world: World, checkpoints: Path, step: int, state: Mapping[str, Any], keep_last: int) -> Path:
    """Save the engine and `state` (JSON-able) as checkpoint `step`, then prune all but the newest `keep_last`.

    Collective.
    """
    final = checkpoints / step_name(step)
    partial = checkpoints / f"{final.name}.tmp"
    on_rank0(world, lambda: shutil.rmtree(partial, ignore_errors=True))  # what a killed save left
    engine.save_checkpoint(str(checkpoints), tag=partial.name, save_latest=False, exclude_frozen_parameters=True)
    barrier(world)

    def commit() -> None:
        (partial / STATE_FILE).write_text(json.dumps(dict(state), indent=2))
        replace_folder(partial, final)
        with whole_file(checkpoints / LATEST_FILE) as latest:
            latest.write_text(final.name + "\n")
        for old in _complete(checkpoints)[: -max(keep_last, 1)]:
            if old != final:
                shutil.rmtree(old)

    on_rank0(world, commit)
    return final


def find(checkpoints: Path, resume: str) -> Path | None:
    """The checkpoint that `checkpoint.resume` names: None for a fresh start.

    `auto` is the newest complete one of this run, `none` a fresh start, anything else the folder of a checkpoint, which
    must be there: a wrong path never starts afresh.
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
        return path
    latest = checkpoints / LATEST_FILE
    if latest.is_file():
        named = checkpoints / latest.read_text().strip()
        if (named / STATE_FILE).is_file():
            return named
    complete = _complete(checkpoints)
    return complete[-1] if complete else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state that `save` was given. Raises UserError where the file is damaged."""
    try:
        return json.loads((checkpoint / STATE_FILE).read_text())
    except ValueError as error:
        raise UserError(
            f"{checkpoint / STATE_FILE} is damaged ({error}): resume from another with checkpoint.resume=PATH"
        ) from None


def check_matching(checkpoint: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise UserError naming each field of a state's `identity`, which must not change over a run, that differs."""
    saved = state["identity"]
    changed = [f"{name}: {saved.get(name)} then, {now} now" for name, now in identity.items() if saved.get(name) != now]
    if changed:
        raise UserError(
            f"cannot resume from {checkpoint}, because the run has changed: {'; '.join(changed)}. Set these back, or "
            "start a new run with another output_dir (or checkpoint.resume=none)"
        )


def load(engine: Any, checkpoint: Path) -> None:
    """Load the engine's weights and optimizer state. Collective. Raises UserError where files are torn or missing."""
    others = [path.name for path in _complete(checkpoint.parent) if path != checkpoint]
    advice = f"checkpoint.resume={checkpoint.parent / others[-1]}" if others else "another one"
    try:
        path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False)
    except Exception as error:  # torch and DeepSpeed have no common one for a file that is cut short
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{checkpoint} cannot be loaded ({reason}): resume from {advice}") from None
    if path is None:
        raise UserError(f"{checkpoint} lacks DeepSpeed's files: resume from {advice}")


def set_aside(output_dir: Path, resume_from: Path | None, step: int) -> Path | None:
    """Move what an earlier run left out of the way, losing nothing; returns where to, None if there was nothing.

    For a run that goes on from a checkpoint of its own, that is what lies past `step`; else it is everything.
    """
    if resume_from and resume_from.resolve().parent == (output_dir / "checkpoints").resolve():
        old = [path for path in output_dir.glob("*/step-*[0-9]") if step_of(path) > step]
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
