"""What a run goes on from: a checkpoint's facts against the run that is asked for.

The weights, moments and counters are `engine.state`'s and fit any layout; here stand the rest: what must not have
changed, the data as it was, and the plan from where it stopped, in the layout that there is now.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogds.config.schema import KEYS, RunConfig, get
from cogds.core.geometry import ClipShape
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
from cogds.model.load import empty_transformer
from cogds.model.lora.adapter import INIT_ALPHA, check_start, describe_start, inject
from cogds.model.lora.file import LoraFile, read_loras

logger = logging.getLogger(__name__)

# Keys of the config that may differ from one part of a run to the next; all others must not. Data and model are known
# by their content, the layout is the plan's matter.
MAY_CHANGE = (
    "output_dir", "model.path", "model.revision", "model.create_tiny", "model.attention", "model.compile", "data.",
    "optimizer.", "train.num_steps", "train.batch_size", "train.tokens_per_batch",
    "train.gradient_accumulation_steps", "train.activation_checkpointing", "train.memory_check", "train.timeout_s",
    "train.step_timeout_s", "train.max_bad_steps", "parallel.", "eval.every", "eval.path", "eval.num_", "sample.",
    "checkpoint.", "metrics.", "network.", "lora.init_from", "lora.init_alpha",
)  # fmt: skip


@dataclass
class Start:
    """What a run starts from: a checkpoint, a LoRA, or neither.

    facts: what the checkpoint's state.json says. state: on rank 0, its tensors, until they are restored. notes: lines
    for the summary.
    """

    checkpoint: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    state: TrainState = field(default_factory=lambda: TrainState({}))
    init_from: LoraFile | None = None
    notes: Sequence[str] = ()

    def release(self) -> None:
        """Free the memory of the checkpoint's tensors."""
        self.state = TrainState({})


def find_start(job: Job) -> Start:
    """Find and verify the checkpoint to resume from, else check `lora.init_from`. Collective.

    Raises UserError for a damaged checkpoint, and for a LoRA that does not fit.
    """
    cfg, world = job.cfg, job.world
    found = rank0_only(world, lambda: checkpoints.find(Path(cfg.output_dir) / "checkpoints", cfg.checkpoint.resume))
    checkpoint, facts, state = found or (None, {}, TrainState({}))
    checkpoint, facts = broadcast(world, 0, (checkpoint, facts))
    if checkpoint:
        return Start(checkpoint, facts, state)
    if not cfg.lora.init_from:
        return Start()
    lora = on_rank0(world, lambda: check_init(job))
    return Start(init_from=lora, notes=describe_start(lora, cfg.conditioning.image_latents))


def check_init(job: Job) -> LoraFile:
    """Read the header of the LoRA that the run starts with. Raises UserError if it does not fit."""
    lora, probe = job.cfg.lora, empty_transformer(job.model)
    file = read_loras([str(lora.init_from)], lora.init_alpha, INIT_ALPHA)[0]
    inject(probe, lora.rank, lora.alpha, lora.dropout, lora.target_modules, job.cfg.seed)
    check_start(probe, file)
    return file


def identity(cfg: RunConfig, optimizer: str, weights: str, buckets: Sequence[ClipShape]) -> dict[str, Any]:
    """What must be the same when a run is resumed, but for the data; JSON-able. weights: digest of the model's."""
    settings = {name: get(cfg, name) for name in KEYS if not name.startswith(MAY_CHANGE)}
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "model weights": weights,
        "buckets": [str(shape) for shape in buckets],
        "optimizer": optimizer.lower(),
    }


def data_identity(data: EncodedData) -> dict[str, Any]:
    """What of the data must be the same too; JSON-able."""
    return {"data": data.fingerprint, "repeats": list(data.mixture.repeats)}


def check_matching(start: Start, identity: Mapping[str, Any]) -> None:
    """Raise UserError naming each part of the run's identity that differs from the checkpoint's."""
    saved = start.facts["identity"]
    changed = [f"{name}: {then} then, {now} now" for name, then, now in _differences(saved, identity)]
    if changed:
        raise UserError(
            f"{start.checkpoint}: cannot be resumed, because the run has changed: {'; '.join(changed)}. Set these "
            "back, or start a new run with another output_dir or checkpoint.resume=none."
        )


def _differences(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name, now in identity.items():
        # A key that the version which saved did not have yet was as it is by default.
        then = saved.get(name, KEYS[name].default if name in KEYS else None)
        if (list(then) if isinstance(then, tuple) else then) != now:
            yield name, then, now


def resumed_data(data: EncodedData, facts: Mapping[str, Any], cfg: RunConfig) -> EncodedData:
    """The data that a resumed run goes on with: as it was, if nothing happened to it but that clips have gone.

    Their encodings are read from the cache as before; those that are not there are replaced as the run meets them.
    Other changes are left for `check_matching` to refuse.
    """
    folder = data.index.path.parent
    saved = ClipIndex(folder / facts.get("index", data.index.path.name))
    if data.fingerprint == facts["identity"].get("data") or not saved.path.exists():
        return data
    then, now = saved.names(), data.index.names()
    if now - then or not then - now:
        logger.info(
            f"of the clips of the run, {len(then - now)} are no longer in the data, and {len(now - then)} are new"
        )
        return data
    logger.info(
        f"no longer in the data: {counted(len(then - now), 'clip')} of the run, which goes on with them as long "
        "as it can"
    )
    # By weight they follow from the sizes, and stay what they were.
    by_weight = bool(cfg.data.sets) and cfg.data.sets[0].weight is not None
    repeats = tuple(facts["identity"]["repeats"]) if by_weight else data.mixture.repeats
    mixture = Mixture(saved.sizes, repeats, cfg.seed)
    return dataclasses.replace(data, index=saved, mixture=mixture, fingerprint=facts["identity"]["data"])


def continued_plan(plan: Plan, facts: Mapping[str, Any], checkpoint: Path) -> Plan:
    """The saved plan, from the step where it stopped, in the layout of `plan`: no clip is repeated or lost.

    In an unchanged layout it is the saved plan itself, so the run is the same bit for bit.
    """
    fields = dict(facts.get("plan", {}))
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
        facts["step"], plan.world_size, plan.accumulation, plan.batch_sizes, plan.costs, plan.tolerance
    )


def layout_of(plan: Plan) -> str:
    """The layout in words."""
    sizes = ", ".join(map(str, sorted(set(plan.batch_sizes))))
    order = "buckets of one cost" if plan.costs else "one bucket"
    layout = f"{counted(plan.world_size, 'rank')} x {counted(plan.accumulation, 'micro-step')}"
    return f"{layout}, batches of {sizes}, {order} at a time"
