"""Combine a DeepSpeed JSON with a run config.

    ds_config, cfg = resolve(load_ds_config(path), cfg, explicit, world_size, hidden_size, path)

Some values have a key on both sides (`SHARED`). If the DeepSpeed file says `"auto"` or nothing, the run config decides.
A value in the DeepSpeed file replaces a default of the run config. If both sides set a value, they must agree.
Whatever DeepSpeed would ignore, reject, or use against this trainer is refused before a model is loaded.
"""

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cogds.config.loading import is_run_config, replace
from cogds.config.schema import RunConfig, get
from cogds.errors import UserError, did_you_mean

# Key in the DeepSpeed file -> key in the run config.
SHARED = {
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
}
_REMOVED = (
    "amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop "
    "quantize_training sparse_attention sparse_gradients zero_optimization.zeropp_loco_param "
    "zero_optimization.mics_shard_size zero_optimization.mics_hierarchical_params_gather"
)
# Keys that are refused with any value: why, and what to do.
REFUSED = dict.fromkeys(_REMOVED.split(), "DeepSpeed has removed it. Delete it") | {
    "scheduler": "the schedule is in the run config. Delete it, and set optimizer.schedule and optimizer.warmup_steps",
    "optimizer.params.max_grad_norm": "gradient_clipping replaces it. Delete it, and set optimizer.max_grad_norm",
    "pipeline": "the transformer has no pipeline stages. Delete it, and shard the model with zero_optimization",
    "sequence_parallel_size": "it is in the run config. Delete it, and set parallel.sequence_size",
    "data_parallel_size": "it follows from the number of ranks and parallel.sequence_size. Delete it",
    "seq_parallel_communication_data_type": "communication_data_type replaces it. Set that",
}
# Keys that are refused with any value but this one: why, and what to do.
_REFUSED_UNLESS: dict[str, tuple[Any, str]] = {
    "zero_optimization.round_robin_gradients": (False, "DeepSpeed then reorders weights in checkpoints. Delete it"),
    "zero_optimization.zenflow": (False, "its optimizer state cannot be assembled for a checkpoint. Delete it"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "checkpoints would lack the state left on the GPU. Delete it"),
    "fp16.enabled": (False, "this model overflows in fp16. Use bf16 (train.precision=bf16)"),
    "data_efficiency.enabled": (False, "cogds plans the order of clips. Delete the section"),
    "tensor_parallel.autotp_size": (
        0,
        "a LoRA cannot be split over ranks. Delete it, and use zero_optimization to shard",
    ),
    "expert_parallel.enabled": (False, "the transformer has no experts. Delete the section"),
    "hybrid_engine.enabled": (False, "it is for text generation during training. Delete the section"),
    "autotuning.enabled": (False, "it would change the batch size that the batch plan relies on. Delete the section"),
    "managed_gradient_accumulation": (True, "DeepSpeed must count the micro-steps. Delete it"),
    "bf16.check_grad_overflow": (True, "a step whose gradient is not finite would destroy the weights. Delete it"),
    # In fp32 and under autocast, DeepSpeed 0.19.8 skips such a step because of its norm.
    "zero_optimization.compute_grad_norm": (
        True,
        "a step whose gradient is not finite would destroy the weights. Delete it",
    ),
}
_SECTIONS = ("optimizer", "optimizer.params", "bf16", "fp16", "torch_autocast", "zero_optimization")
# "auto" is a value of DeepSpeed's own in these.
_OWN_AUTO = ("data_types.keep_in_fp32_modules", "zero_optimization.zenflow.")
# Section of each of DeepSpeed's pydantic models, by the model's name.
_MODEL_SECTIONS = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedBF16Config": "bf16",
    "DeepSpeedFP16Config": "fp16",
    "DeepSpeedMonitorConfig": "",
}
_OPTIMIZERS = ("Adam", "AdamW", "Lion")
_OPTIMIZER_PARAMS = ("lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode", "fused")
_NOT_SET: Any = object()


class _ReadKeys(dict):
    """A dict that records in `read` which keys were asked for."""

    def __init__(self, **entries: Any):
        super().__init__(entries)
        self.read: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (get is this function)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self  # so that `key in config.keys()` is recorded


@functools.cache
def known_keys() -> dict[str, frozenset[str]]:
    """The keys of the installed DeepSpeed, by section ("" for the top level).

    A section with a pydantic model has its fields. DeepSpeed has no model of the others and ignores unknown keys there:
    known are the keys that it reads.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    optimizer, autocast = _ReadKeys(type="AdamW", params={}), _ReadKeys(enabled=True, dtype="bfloat16")
    root = _ReadKeys(train_micro_batch_size_per_gpu=1, optimizer=optimizer, torch_autocast=autocast)
    DeepSpeedConfig(root)
    read = {"": root.read, "optimizer": optimizer.read, "torch_autocast": autocast.read}
    models = {"bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config, "zero_optimization": DeepSpeedZeroConfig}
    for section, model in models.items():
        read[section] = {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}
    return {section: frozenset(names) for section, names in read.items()}


def load_ds_config(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file. Raises UserError unless it is one object without duplicate keys."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: duplicate key '{duplicates[0]}'. Keep one of them.")
        return dict(pairs)

    file = Path(path)
    if not file.is_file():
        near = did_you_mean(file.name, (other.name for other in file.parent.glob("*.json")))
        raise UserError(f"--deepspeed {path}: no such file{near}. Pass the path of a DeepSpeed JSON.")
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}. Fix or replace the file.") from None
    try:
        ds_config = json.loads(text, object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        if file.suffix in (".yaml", ".yml"):
            raise UserError(f"--deepspeed {path}: YAML, so a run config. Pass it to --config.") from None
        raise UserError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}. Remove comments, and any comma "
            "after the last entry."
        ) from None
    if not isinstance(ds_config, dict):
        raise UserError(f"{path}: must be an object in braces, but is a {type(ds_config).__name__}. Wrap it in braces.")
    if is_run_config(ds_config):
        raise UserError(f"--deepspeed {path}: this is a run config. Pass it to --config.")
    return ds_config


def resolve(
    ds_config: Mapping[str, Any],
    cfg: RunConfig,
    explicit: frozenset[str],
    world_size: int,
    hidden_size: int | None,
    ds_path: str,
) -> tuple[dict[str, Any], RunConfig]:
    """The config for deepspeed.initialize, without "auto", and the run config with the DeepSpeed file's values.

    Args:
        ds_config: from `load_ds_config`; not changed.
        explicit: run config keys that were set, from `load_config`.
        world_size: number of ranks.
        hidden_size: width of the transformer, for bucket sizes that are "auto"; None if unknown.
        ds_path: the file, for errors.

    Raises:
        UserError: The two configs contradict each other, or this trainer or DeepSpeed does not support a value.
    """
    resolver = _Resolver(copy.deepcopy(dict(ds_config)), cfg, explicit, ds_path)
    resolver.check_keys()
    resolver.resolve_precision()
    resolver.check_method()
    resolver.check_stage()
    resolver.resolve_shared()
    resolver.resolve_train_batch_size(world_size)
    resolver.fill_bucket_sizes(hidden_size)
    resolver.check_with_deepspeed()
    return resolver.ds, resolver.cfg


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    """ZeRO stage of a resolved DeepSpeed config."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def compiles_extension(ds_config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed compiles C++ code: for its own optimizers, or for weights on NVMe."""
    torch_adam = ds_config.get("optimizer", {}).get("params", {}).get("torch_adam", False)
    offload = ds_config.get("zero_optimization", {}).get("offload_param") or {}
    return not torch_adam or offload.get("device") == "nvme"


class _Resolver:
    """A DeepSpeed config and a run config while they are combined, step by step."""

    def __init__(self, ds: dict[str, Any], cfg: RunConfig, explicit: frozenset[str], path: str):
        self.ds, self.cfg, self.explicit, self.path = ds, cfg, explicit, path
        if "bfloat16" in ds:  # DeepSpeed's former name for it
            ds.setdefault("bf16", ds.pop("bfloat16"))

    def error(self, message: str) -> UserError:
        """Return an error about the DeepSpeed file; the message lacks its final period."""
        return UserError(f"{self.path}: {message}.")

    def look_up(self, key: str, default: Any = _NOT_SET) -> Any:
        """Return the value of a dotted key of the DeepSpeed file."""
        node: Any = self.ds
        for name in key.split("."):
            if not isinstance(node, Mapping) or name not in node:
                return default
            node = node[name]
        return node

    def check_keys(self) -> None:
        """Refuse unknown keys, and keys and values that this trainer does not support."""
        for key, reason in REFUSED.items():
            if self.look_up(key) is not _NOT_SET:
                raise self.error(f"{key} is not supported: {reason}")
        for key in _SECTIONS:
            if not isinstance(value := self.look_up(key, {}), dict):
                raise self.error(f"{key} must be an object, but is {json.dumps(value)}. Put it in braces")
        for section, known in known_keys().items():
            for name in self.look_up(section, {}) if section else self.ds:
                if name not in known:
                    key = f"{section}.{name}".lstrip(".")
                    raise self.error(f"unknown key {key}{_advice(name, section)}")
        for key, (accepted, reason) in _REFUSED_UNLESS.items():
            value = self.look_up(key, accepted)
            is_unset = value is None and accepted is not True  # DeepSpeed reads null as false
            if value not in ("auto", accepted) and not is_unset:
                raise self.error(f"{key}={json.dumps(value)} is not supported: {reason}")
        if str(self.look_up("zero_optimization.offload_optimizer.device", "")).lower() == "nvme":
            raise self.error(
                'zero_optimization.offload_optimizer.device="nvme" is not supported: a checkpoint cannot read it back. '
                'Set it to "cpu"; offload_param may go to NVMe'
            )

    def resolve_precision(self) -> None:
        """Make train.precision, bf16.enabled and torch_autocast agree."""
        fp16, autocast = self.ds.get("fp16", {}), self.ds.get("torch_autocast", {})
        bf16 = self.ds.setdefault("bf16", {"enabled": "auto"})
        if fp16.get("enabled") == "auto":
            fp16["enabled"] = False
        uses_autocast, enabled = autocast.get("enabled", False) is True, bf16.get("enabled", False)
        if enabled not in (True, False, "auto"):
            raise self.error(f'bf16.enabled must be true, false or "auto", but is {json.dumps(enabled)}. Change it')
        if uses_autocast:
            # Without a dtype, torch uses fp16 on a GPU.
            dtype = str(autocast.setdefault("dtype", "bfloat16")).removeprefix("torch.")
            if dtype not in ("bfloat16", "bf16"):
                raise self.error(f"torch_autocast.dtype={dtype} is not supported: only bfloat16 is. Use bfloat16")
        configured = self.cfg.train.precision
        precision = "bf16" if enabled is True or uses_autocast else configured if enabled == "auto" else "fp32"
        if precision != configured:
            if "train.precision" in self.explicit:
                key = "torch_autocast.enabled" if uses_autocast else "bf16.enabled"
                advice = " and torch_autocast.enabled to false" if uses_autocast else ""
                raise self.error(
                    f"{key} is {json.dumps(uses_autocast or enabled)}, but train.precision is {configured} in the run "
                    f'config. Set bf16.enabled to "auto"{advice}, or remove train.precision'
                )
            self.cfg = replace(self.cfg, {"train.precision": precision}, f"in {self.path}")
        # Autocast keeps the LoRA in fp32. The bf16 section would cast it.
        bf16["enabled"] = (precision == "bf16" and not uses_autocast) if enabled == "auto" else enabled
        # Skip steps whose gradient is not finite. Set here because DeepSpeed has changed this default before.
        bf16.setdefault("check_grad_overflow", True)

    def check_method(self) -> None:
        """Check that the trained weights have float32 masters, and are in memory when they are restored."""
        if self.cfg.trains_lora:
            return
        if self.look_up("torch_autocast.enabled", False) is True:
            raise self.error(
                "torch_autocast.enabled is true, but train.method=full trains bf16 weights with float32 masters, which "
                "is the bf16 section. Set it to false"
            )
        if str(self.look_up("zero_optimization.offload_param.device", "")).lower() == "nvme":
            raise self.error(
                'zero_optimization.offload_param.device="nvme" is not supported with train.method=full: a checkpoint '
                'cannot restore trained weights there. Set it to "cpu"'
            )

    def check_stage(self) -> None:
        """Check the ZeRO stage, and a setting that stage 1 does not support."""
        stage = self.look_up("zero_optimization.stage", 0)
        if type(stage) is not int or not 0 <= stage <= 3:
            raise self.error(f"zero_optimization.stage must be 1, 2 or 3, but is {json.dumps(stage)}. Change it")
        if stage == 0:
            raise self.error("zero_optimization.stage is 0: DeepSpeed then misses non-finite gradients. Set it to 1")
        dtype = self.look_up("data_types.grad_accum_dtype", None)
        if stage == 1 and self.ds["bf16"]["enabled"] and dtype not in (None, "bf16"):
            raise self.error(
                f"data_types.grad_accum_dtype={json.dumps(dtype)} is not supported with bf16 at stage 1: its state "
                "cannot be saved. Use stage 2, or delete it"
            )

    def resolve_shared(self) -> None:
        """Check the optimizer, and make the keys of `SHARED` agree."""
        # DeepSpeed compiles an extension for its own Adam, but not for torch's.
        optimizer = self.ds.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True, "fused": True}})
        kind = optimizer.setdefault("type", "AdamW")
        optimizer.setdefault("params", {})
        if str(kind).lower() not in map(str.lower, _OPTIMIZERS):
            raise self.error(
                f"optimizer.type={json.dumps(kind)} is not supported{did_you_mean(str(kind), _OPTIMIZERS)}: its state "
                f"cannot be saved and restored. Use {', '.join(_OPTIMIZERS)}"
            )
        is_adam = str(kind).lower() != "lion"
        for ds_key, key in SHARED.items():
            value = self.look_up(ds_key)
            # betas, eps and weight_decay are Adam's; another optimizer may lack them.
            if value is _NOT_SET and ds_key.startswith("optimizer.params.") and not is_adam and key != "optimizer.lr":
                if key in self.explicit:
                    raise self.error(
                        f"{key} is set in the run config, but {ds_key} is not, and {kind} may not have it. If it does, "
                        f'set {ds_key} to "auto". If not, remove {key}'
                    )
                continue
            if value is not _NOT_SET and value != "auto":
                self._take(ds_key, key, value)
            value = get(self.cfg, key)
            section, _, name = ds_key.rpartition(".")
            (self.look_up(section) if section else self.ds)[name] = list(value) if isinstance(value, tuple) else value

    def _take(self, ds_key: str, key: str, value: Any) -> None:
        """Put a value of the DeepSpeed file into the run config, unless a different value was set there."""
        changed = replace(self.cfg, {key: value}, f"in {self.path} ({ds_key})")
        other = key
        if key == "train.batch_size" and self.cfg.train.tokens_per_batch is not None:
            other = "train.tokens_per_batch"
        if other != key or (key in self.explicit and changed != self.cfg):
            configured = json.dumps(get(self.cfg, other))
            raise self.error(
                f"{ds_key} is {json.dumps(value)}, but {other} is {configured} in the run config. "
                f'Set {ds_key} to "auto", or remove {other}'
            )
        self.cfg = changed

    def resolve_train_batch_size(self, num_ranks: int) -> None:
        """Set train_batch_size, the number of clips per optimizer step, which follows from other keys."""
        train, sequence_size = self.cfg.train, self.cfg.parallel.sequence_size
        num_groups, total = num_ranks // sequence_size, self.ds.get("train_batch_size", "auto")
        groups = f"groups of {sequence_size} ranks" if sequence_size > 1 else "ranks"
        expected = train.batch_size * train.gradient_accumulation_steps * num_groups
        if total not in ("auto", expected):
            advice = 'Set it to "auto"'
            if type(total) is int and total > 0 and total % (train.batch_size * num_groups) == 0:
                advice += f", or gradient_accumulation_steps to {total // (train.batch_size * num_groups)}"
            raise self.error(
                f"train_batch_size is {json.dumps(total)}, but train.batch_size {train.batch_size} x "
                f"gradient_accumulation_steps {train.gradient_accumulation_steps} x {num_groups} {groups} is "
                f"{expected}. {advice}"
            )
        if sequence_size > 1:  # DeepSpeed computes its own, which counts every rank of a group
            self.ds.pop("train_batch_size", None)
        else:
            self.ds["train_batch_size"] = expected

    def fill_bucket_sizes(self, hidden_size: int | None) -> None:
        """Set the sizes of zero_optimization that are "auto", in numbers of parameters."""
        # A block, which ZeRO-3 gathers as a unit, has a little more than 12 width^2 parameters. While one block runs,
        # the next is gathered, and a third may not be released yet. Parameters smaller than a matrix of the LoRA stay
        # on every rank, because gathering them would take time and save little memory.
        width = hidden_size or 0
        block = 14 * width * width
        sizes = {
            "reduce_bucket_size": width * width,
            "stage3_prefetch_bucket_size": block,
            "stage3_max_live_parameters": 3 * block,
            "stage3_max_reuse_distance": 3 * block,
            "stage3_param_persistence_threshold": 200 * width,
        }
        for name, size in sizes.items():
            if self.look_up(f"zero_optimization.{name}") == "auto":
                if hidden_size is None:
                    raise self.error(f'zero_optimization.{name} is "auto", but the model is unknown. Set a number')
                self.ds["zero_optimization"][name] = size

    def check_with_deepspeed(self) -> None:
        """Let DeepSpeed check the names and values of all sections."""
        from deepspeed.runtime.config import DeepSpeedConfig

        for key, value in _leaves(self.ds):
            if value == "auto" and not key.startswith(_OWN_AUTO):
                raise self.error(f'{key} is "auto", but the run config has no such value. Set the value itself')
        batch = {"train_batch_size": None, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        try:
            DeepSpeedConfig(copy.deepcopy(self.ds) | batch)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, (_MODEL_SECTIONS.get(error.title, error.title), *first["loc"]))).lstrip(".")
            raise self.error(
                f"{key} is {first['input']!r}, which DeepSpeed refuses: {first['msg']}. Change it"
            ) from None
        except Exception as error:  # DeepSpeed raises many kinds
            raise self.error(f"DeepSpeed refuses it: {str(error).splitlines()[0] or repr(error)}") from None


def _advice(name: str, section: str) -> str:
    """Return what to do about a key that its section does not have."""
    homes = [other or "the top level" for other, known in known_keys().items() if name in known and other != section]
    homes += ["optimizer.params"] if name in _OPTIMIZER_PARAMS else []
    if homes == ["fp16"]:
        return ": it is a key of fp16, in which this model overflows. Delete it: bf16 needs no loss scale"
    if homes:
        text = " or ".join(filter(None, [", ".join(homes[:-1]), homes[-1]]))
        return f": it is a key of {text}. Move it there, or delete it"
    return f"{did_you_mean(name, known_keys()[section])}. Correct or delete it"


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(child, f"{path}.{name}".lstrip("."))
    else:
        yield path, node
