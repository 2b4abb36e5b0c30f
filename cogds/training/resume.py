"""What a run goes on from: a checkpoint's facts against the run that is asked for.

The weights, moments and counters are `runtime.state`'s and fit any layout; here stand the rest: what must not have
changed, the data as it was, and the plan from where it stopped, in the layout that there is now.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogds.config import KEYS, RunConfig, get
from cogds.core.geometry import ClipShape
from cogds.core.mixture import Mixture
from cogds.core.plan import Origin, Plan
from cogds.data.index import ClipIndex
from cogds.errors import UserError
from cogds.prepare.encoding import EncodedData
from cogds.wording import counted

# Keys of the config that may differ from one part of a run to the next; all others must not. Data and model are known
# by their content, the layout is the plan's matter.
MAY_CHANGE = (
    "output_dir", "model.path", "model.revision", "model.create_tiny", "model.attention", "model.compile", "data.",
    "optimizer.", "train.num_steps", "train.batch_size", "train.tokens_per_batch",
    "train.gradient_accumulation_steps", "train.recompute", "train.rehearse", "train.timeout_s", "train.step_timeout_s",
    "train.max_bad_steps", "parallel.", "eval.every", "eval.path", "eval.num_", "sample.", "checkpoint.", "monitor.",
    "network.", "lora.init_",
)  # fmt: skip


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


def check_matching(checkpoint: Path, facts: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise UserError naming each part of a run's identity that is not what it was."""
    saved = facts["identity"]
    changed = [f"{name}: {then} then, {now} now" for name, then, now in _differences(saved, identity)]
    if changed:
        raise UserError(
            f"cannot resume from {checkpoint}, because the run has changed: {'; '.join(changed)}. Set these back, or "
            "start a new run with another output_dir (or checkpoint.resume=none)"
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
        print(f"of the clips of the run, {len(then - now)} are no longer in the data, and {len(now - then)} are new")
        return data
    print(
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
        needed = needed | {one.name for one in known if one.default is dataclasses.MISSING}
        if other := (set(values) - {one.name for one in known}) | (needed - set(values)):
            raise UserError(
                f"{checkpoint} holds no plan that can be gone on with ('{min(other)}' is unknown or missing: another "
                "version of cogds wrote it): resume with that version, or from another checkpoint"
            )
    del fields["origin"]
    try:
        saved = Plan(**fields, origin=Origin(**origin))
    except ValueError as error:
        raise UserError(f"{checkpoint} holds no plan that can be gone on with ({error}): resume from another") from None
    return saved.resized(
        facts["step"], plan.world_size, plan.accumulation, plan.batch_sizes, plan.costs, plan.tolerance
    )


def layout_of(plan: Plan) -> str:
    """The layout in words."""
    sizes = ", ".join(map(str, sorted(set(plan.batch_sizes))))
    order = "buckets of one cost" if plan.costs else "one bucket"
    layout = f"{counted(plan.world_size, 'rank')} x {counted(plan.accumulation, 'micro-step')}"
    return f"{layout}, batches of {sizes}, {order} at a time"
