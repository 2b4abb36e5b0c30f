"""Starting a run from a checkpoint or a LoRA: checks that they match the run, and continues its data and plan.

`engine.state` restores the weights and the optimizer in any layout of ranks.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogds.config.schema import KEYS, RunConfig, get
from cogds.core.geometry import ClipShape
from cogds.core.held_out import limit_of_fixed_share
from cogds.core.mixture import Mixture
from cogds.core.plan import Origin, Plan
from cogds.data.loading.index import ClipIndex
from cogds.distributed.collectives import broadcast, on_rank0, rank0_only
from cogds.encode.encoding_plan import EncodedData
from cogds.engine import checkpoint as checkpoints
from cogds.engine.state import TrainState
from cogds.errors import UserError
from cogds.formatting import counted
from cogds.job import Job
from cogds.model.control import add_control
from cogds.model.load import empty_transformer
from cogds.model.lora.adapter import INIT_ALPHA, check_initial_lora, describe_initial_lora, inject
from cogds.model.lora.file import LoraFile, read_loras

logger = logging.getLogger(__name__)

# Config keys that may change when a run is resumed; all others must not. Data and model are compared by their content,
# and the plan adapts to a new layout.
MAY_CHANGE = (
    "output_dir", "model.path", "model.revision", "model.attention", "model.compile", "data.",
    "optimizer.", "train.num_steps", "train.batch_size", "train.tokens_per_batch",
    "train.gradient_accumulation_steps", "train.activation_checkpointing", "train.memory_check", "train.deterministic",
    "train.timeout_s",
    "train.step_timeout_s", "train.max_bad_steps", "parallel.", "eval.every", "eval.path", "eval.num_", "sample.",
    "checkpoint.", "metrics.", "network.", "lora.init_from", "lora.init_alpha", "full.ema_",
)  # fmt: skip


@dataclass
class InitialState:
    """What training starts from: a checkpoint, a LoRA, or neither.

    header: content of the checkpoint's state.json. state: its tensors, on rank 0, until they are restored. notes: lines
    for the startup summary.
    """

    checkpoint: Path | None = None
    header: dict[str, Any] = field(default_factory=dict)
    state: TrainState = field(default_factory=lambda: TrainState({}))
    init_from: LoraFile | None = None
    notes: Sequence[str] = ()

    def release(self) -> None:
        """Free the memory of the checkpoint's tensors."""
        self.state = TrainState({})


def find_initial_state(job: Job) -> InitialState:
    """Find and verify the checkpoint to resume from, or else check `lora.init_from`. Collective.

    Raises UserError for a damaged checkpoint or a LoRA that does not fit.
    """
    cfg, world = job.cfg, job.world
    folder = Path(cfg.output_dir) / "checkpoints"
    loaded = rank0_only(world, lambda: checkpoints.find(folder, cfg.checkpoint.resume))
    checkpoint, header, state = loaded or (None, {}, TrainState({}))
    checkpoint, header = broadcast(world, 0, (checkpoint, header))
    if checkpoint:
        return InitialState(checkpoint, header, state)
    if not cfg.lora.init_from:
        return InitialState()
    lora = on_rank0(world, lambda: check_init(job))
    notes = describe_initial_lora(lora, cfg.conditioning.image_latents, job.model.family.task)
    return InitialState(init_from=lora, notes=notes)


def check_init(job: Job) -> LoraFile:
    """Read the header of `lora.init_from`. Raises UserError if the LoRA does not fit the run."""
    lora, transformer = job.cfg.lora, empty_transformer(job.model)
    file = read_loras([str(lora.init_from)], lora.init_alpha, INIT_ALPHA)[0]
    inject(transformer, lora.rank, lora.alpha, lora.dropout, lora.target_modules, job.cfg.seed)
    if job.cfg.conditioning.control:
        add_control(transformer, job.model.geometry.latent_channels)
    check_initial_lora(transformer, file)
    return file


def run_identity(cfg: RunConfig, optimizer: str, weights_digest: str, buckets: Sequence[ClipShape]) -> dict[str, Any]:
    """Return everything except the data that must be the same when a run is resumed, as JSON-serializable values."""
    unused = () if cfg.trains_lora else ("lora.",)
    settings = {name: get(cfg, name) for name in KEYS if not name.startswith(MAY_CHANGE + unused)}
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "model weights": weights_digest,
        "buckets": [str(shape) for shape in buckets],
        "optimizer": optimizer.lower(),
    }


def data_identity(data: EncodedData) -> dict[str, Any]:
    """Return the part of the data that must be the same when a run is resumed, as JSON-serializable values."""
    return {"data": data.fingerprint, "repeats": list(data.mixture.repeats)}


def check_identity(initial: InitialState, identity: Mapping[str, Any]) -> None:
    """Raise UserError, naming each part of the run's identity that differs from the checkpoint's."""
    saved = initial.header["identity"]
    changed = [f"{name} was {before}, now {now}" for name, before, now in _differences(saved, identity)]
    if changed:
        raise UserError(
            f"{initial.checkpoint}: cannot be resumed, because the run has changed: {'; '.join(changed)}. Change them "
            "back, or start a new run with another output_dir or checkpoint.resume=none."
        )


def _differences(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name, now in identity.items():
        # A key that did not exist in the version that saved had its default.
        before = saved.get(name, KEYS[name].default if name in KEYS else None)
        if (list(before) if isinstance(before, tuple) else before) != now:
            yield name, before, now


def saved_held_out_limit(header: Mapping[str, Any]) -> int | None:
    """Return the limit by which the run of a checkpoint holds out files; None without a checkpoint, or if it has none.

    A resumed run keeps it, so that it never evaluates what it has trained, even if files were removed.
    """
    if not header:
        return None
    if "held_out_limit" in header:
        return header["held_out_limit"] or 0  # None: nothing was held out, so nothing is now
    return limit_of_fixed_share(header["identity"].get("eval.held_out") or 0.0)


def resume_data(data: EncodedData, header: Mapping[str, Any], cfg: RunConfig) -> EncodedData:
    """Return the data to resume with: the saved data if clips were only removed, otherwise `data`.

    Removed clips are still read from the cache. If their entries are gone too, they are replaced like bad samples.
    `check_identity` refuses any other change.
    """
    folder = data.index.path.parent
    saved = ClipIndex(folder / header.get("index", data.index.path.name))
    if data.fingerprint == header["identity"].get("data") or not saved.path.exists():
        return data
    before, now = saved.names(), data.index.names()
    if now - before or not before - now:
        logger.info(
            f"data: {counted(len(before - now), 'clip')} of the checkpoint removed, {len(now - before):,} added"
        )
        return data
    logger.info(f"data: {counted(len(before - now), 'clip')} removed; still trained from the cache if possible")
    # Repeats that follow from weights depend on the number of clips. They stay as they were.
    by_weight = bool(cfg.data.sets) and cfg.data.sets[0].weight is not None
    repeats = tuple(header["identity"]["repeats"]) if by_weight else data.mixture.repeats
    mixture = Mixture(saved.sizes, repeats, cfg.seed)
    return dataclasses.replace(data, index=saved, mixture=mixture, fingerprint=header["identity"]["data"])


def resume_plan(plan: Plan, header: Mapping[str, Any], checkpoint: Path) -> Plan:
    """Return the saved plan from its last step on, in the layout of `plan`. No clip is repeated or lost.

    With an unchanged layout this is the saved plan itself, so the run is bitwise the same.
    """
    fields = dict(header.get("plan", {}))
    origin = fields.get("origin", {})
    for kind, values, needed in ((Plan, fields, {"origin"}), (Origin, origin, set[str]())):
        known = dataclasses.fields(kind)
        needed = needed | {field.name for field in known if field.default is dataclasses.MISSING}
        if wrong := (set(values) - {field.name for field in known}) | (needed - set(values)):
            raise UserError(
                f"{checkpoint}: another version of cogds wrote its plan: '{min(wrong)}' is unknown or missing. Resume "
                "with that version, or from another checkpoint."
            )
    del fields["origin"]
    try:
        saved = Plan(**fields, origin=Origin(**origin))
    except ValueError as error:
        raise UserError(f"{checkpoint}: its plan cannot be used ({error}). Resume from another checkpoint.") from None
    return saved.resized(
        header["step"], plan.world_size, plan.accumulation, plan.batch_sizes, plan.costs, plan.tolerance
    )


def describe_layout(plan: Plan) -> str:
    """Return a line about ranks, gradient accumulation, batch sizes and how micro-steps choose buckets."""
    sizes = ", ".join(map(str, sorted(set(plan.batch_sizes))))
    return (
        f"{counted(plan.world_size, 'data-parallel rank')}, gradient accumulation {plan.accumulation}, "
        f"batch size {sizes}, data.sync={'cost' if plan.costs else 'bucket'}"
    )
