"""The training state of a full fine-tune: every rank writes and reads only its own part.

A checkpoint has a file per rank, `shard-00001-of-00008.safetensors`. It holds this rank's parts of the float32
master weights, `weight/NAME`, and the same ranges of the optimizer's states, such as `exp_avg/NAME`, and of the moving
average, all flat. The file's header says at which element of the parameter each fragment starts. So the ranks
of another layout find what they need, whatever ZeRO stage, world size and offload wrote it, and no rank ever holds a
whole model.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogds.distributed.deepspeed_internals import (
    full_shape,
    local_part,
    local_range,
    make_optimizer_states,
    model_part,
    set_local_part,
    update_model_weights,
)
from cogds.engine.ema import Ema
from cogds.engine.state import WEIGHT, optimizer_kinds, set_counters, trainable
from cogds.errors import UserError
from cogds.process.host_memory import HostBuffer
from cogds.tensor_file import TensorEntry, TensorFile, write_tensors

EMA = "ema"  # kind of the moving average
STARTS = "starts"  # key of the header's metadata
ADVICE = "Set full.modules as in the checkpoint, or start a new run with checkpoint.resume=none."


def shard_name(rank: int, num_ranks: int) -> str:
    """Return the name of a rank's file."""
    return f"shard-{rank + 1:05d}-of-{num_ranks:05d}.safetensors"


@dataclass(frozen=True)
class Fragment:
    """A part of a parameter: its elements [start, stop) in flat order. kind: `weight` or a state of the optimizer."""

    kind: str
    name: str
    start: int
    stop: int

    @property
    def entry(self) -> TensorEntry:
        return TensorEntry(f"{self.kind}/{self.name}", (self.stop - self.start,), torch.float32)


@dataclass
class Shard:
    """This rank's part of the training state. tensors: the live ones, or copies of them, in the order of `fragments`.

    num_updates: number of steps that the optimizer has taken, without skipped steps.
    """

    fragments: Sequence[Fragment]
    tensors: Iterator[torch.Tensor]
    num_updates: float

    @property
    def num_bytes(self) -> int:
        return sum(fragment.entry.num_bytes for fragment in self.fragments)

    def copy(self, buffer: HostBuffer) -> "Shard":
        """Copy the tensors to a buffer of `num_bytes`, so that training can continue."""
        sizes = [fragment.entry.num_bytes for fragment in self.fragments]
        copies = [space.view(torch.float32) for space in buffer.bytes[: self.num_bytes].split(sizes)] if sizes else []
        for copy, tensor in zip(copies, self.tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Shard(self.fragments, iter(copies), self.num_updates)

    def write(self, file: Path) -> dict[str, Any]:
        """Write the file. Returns its size and digest."""
        starts = {fragment.name: fragment.start for fragment in self.fragments}
        entries = [fragment.entry for fragment in self.fragments]
        return write_tensors(file, entries, self.tensors, {STARTS: json.dumps(starts)})


def local_shard(engine: Any, ema: Ema | None = None) -> Shard:
    """Return this rank's part of the current state. Its tensors are read when they are used."""
    kinds, num_updates = optimizer_kinds(engine)
    if not kinds and engine.global_steps > engine.skipped_steps:
        raise RuntimeError(f"{type(engine.basic_optimizer).__name__} has taken steps, but its states are not found")
    parameters = trainable(engine)
    fragments = [
        Fragment(kind, name, part.start, part.stop)
        for name, parameter in parameters.items()
        if (part := local_range(parameter))
        for kind in (WEIGHT, *kinds, *([EMA] if ema else []))
    ]
    tensors = (
        ema.parts[fragment.name]
        if ema and fragment.kind == EMA
        else _read_part(fragment.name, parameters[fragment.name], fragment.kind)
        for fragment in fragments
    )
    return Shard(fragments, tensors, num_updates)


def _read_part(name: str, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    if kind != WEIGHT:
        return local_part(parameter, kind)
    master = local_part(parameter)
    if not torch.equal(master.to(parameter.dtype), model_part(parameter).to(master.device)):
        raise RuntimeError(f"DeepSpeed's master weight of '{name}' is not the model's weight; nothing is saved")
    return master


def shard_header(engine: Any, ema: Ema | None = None) -> dict[str, Any]:
    """Return what a checkpoint's header says about the state: the kinds of tensors, and the parameters' shapes."""
    kinds, _ = optimizer_kinds(engine)
    shapes = {name: list(full_shape(parameter)) for name, parameter in trainable(engine).items()}
    return {"kinds": [WEIGHT, *kinds, *([EMA] if ema else [])], "shapes": shapes}


class ShardReader:
    """Reads any part of a state from the files of all ranks that wrote it."""

    def __init__(self, folder: Path, num_shards: int):
        self._stack = contextlib.ExitStack()
        self._files = [
            self._stack.enter_context(TensorFile(folder / shard_name(rank, num_shards))) for rank in range(num_shards)
        ]
        self._starts: list[Mapping[str, int]] = [json.loads(file.metadata[STARTS]) for file in self._files]

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the elements [start, stop) of a parameter's tensor, flat, from the files that hold them."""
        key, pieces, position = f"{kind}/{name}", [], start
        held = sorted(
            (starts[name], file)
            for file, starts in zip(range(len(self._files)), self._starts)
            if key in self._files[file].entries
        )
        for first, number in held:
            last = first + self._files[number].entries[key].shape[0]
            if first <= position < min(last, stop):
                end = min(last, stop)
                pieces.append(self._files[number].read(key, position - first, end - first))
                position = end
        if position != stop:
            raise RuntimeError(f"the checkpoint lacks elements {position} to {stop} of '{key}'")
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def restore_shards(engine: Any, folder: Path, header: Mapping[str, Any], ema: Ema | None = None) -> None:
    """Restore this rank's part of the state of a checkpoint into a new engine and its moving average. Collective.

    header: content of its state.json. The average begins with the weights if the checkpoint has none.

    Raises:
        UserError: The state belongs to other parameters, or this rank cannot read the files.
    """
    parameters = trainable(engine)
    _check_shapes(header["shapes"], {name: list(full_shape(parameter)) for name, parameter in parameters.items()})
    kinds = [kind for kind in header["kinds"] if kind != EMA]
    if len(kinds) > 1:
        make_optimizer_states(engine)
    try:
        with ShardReader(folder, header["num_shards"]) as reader:
            for name, parameter in parameters.items():
                if part := local_range(parameter):
                    for kind in kinds:
                        value = reader.read(kind, name, part.start, part.stop)
                        set_local_part(parameter, value, None if kind == WEIGHT else kind)
                    if ema:
                        source = EMA if EMA in header["kinds"] else WEIGHT
                        ema.parts[name].copy_(reader.read(source, name, part.start, part.stop))
    except OSError as error:  # rank 0 has verified the files
        raise UserError(
            f"checkpoint.resume: this rank cannot read the checkpoint ({error}). With train.method=full, use a folder "
            "that all nodes share."
        ) from None
    update_model_weights(engine)
    set_counters(engine, header["num_updates"])


def _check_shapes(saved: Mapping[str, list[int]], current: Mapping[str, list[int]]) -> None:
    if different := sorted(saved.keys() ^ current.keys()):
        where = "checkpoint" if different[0] in saved else "run"
        raise UserError(
            f"checkpoint.resume: the checkpoint has other weights: '{different[0]}' is only in the {where}. {ADVICE}"
        )
    for name, shape in saved.items():
        if shape != current[name]:
            raise UserError(
                f"checkpoint.resume: the checkpoint has other weights: '{name}' has shape {shape} instead of "
                f"{current[name]}. {ADVICE}"
            )
