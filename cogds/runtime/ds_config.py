"""The DeepSpeed file and the run config become one: pure functions, dicts in, dicts out.

    ds, cfg = resolve(load_ds_config(path), cfg, explicit, world_size, hidden_size, path)

Some values have a place on both sides (`SHARED`). `"auto"` or nothing in the DeepSpeed file takes the run config's.
A value in the DeepSpeed file wins over a run-config default, and the returned RunConfig says so. Set on both sides
they must agree. What DeepSpeed 0.19.8 would ignore, or what contradicts this trainer, is refused here, before a
model is loaded.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cogds.config import RunConfig, get, replace
from cogds.errors import UserError, did_you_mean


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# DeepSpeed's path -> the run config's key.
SHARED = {
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
}

# Keys that DeepSpeed 0.19.8 reads (a test compares them with the installed one). It ignores others without a word at
# the top level and in `optimizer`, and fails on others in the rest with a traceback.
KNOWN_KEYS: dict[str, frozenset[str]] = {
    "": _words("""
        activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
        compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
        disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
        gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
        managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
        seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers torch_autocast
        train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
        wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
        zero_optimization
        """),
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "torch_autocast": frozenset({"enabled", "dtype", "lower_precision_safe_modules"}),
    "bf16": _words(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "zero_optimization": _words("""
        stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
        elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload_param
        cpu_offload_use_pin_memory cpu_offload prefetch_bucket_size stage3_prefetch_bucket_size
        param_persistence_threshold stage3_param_persistence_threshold model_persistence_threshold
        stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters max_reuse_distance
        stage3_max_reuse_distance gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save
        module_granularity_threshold stage3_module_granularity_threshold use_all_reduce_for_fetch_params
        stage3_use_all_reduce_for_fetch_params allgather_sequential stage3_allgather_sequential
        stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1 round_robin_gradients
        parameter_alignment zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights
        zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply
        log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module
        """),
}

_REMOVED = "DeepSpeed has removed it (0.19.8): delete it"
# Paths that are refused wherever they stand, and why.
REFUSED: dict[str, str] = {
    "scheduler": "the learning rate is a function of the step here: delete the section and set optimizer.schedule, "
    "optimizer.warmup_steps and optimizer.final_lr_ratio in the run config",
    "optimizer.params.max_grad_norm": "DeepSpeed clips by gradient_clipping: delete it and set optimizer.max_grad_norm "
    "in the run config",
    "pipeline": "the transformer is not a pipeline of stages: delete it, and use zero_optimization to shard the model",
    "sequence_parallel_size": "it is parallel.sequence of the run config: set that, and delete it here",
    "data_parallel_size": "it follows from the number of ranks and parallel.sequence: delete it",
    "seq_parallel_communication_data_type": "gradients travel as communication_data_type says, also where ranks share "
    "a clip: set that",
    **dict.fromkeys(
        _words(
            "nebula compression_training amp quantize_training sparse_gradients eigenvalue sparse_attention elasticity "
            "graph_harvesting curriculum_learning progressive_layer_drop zero_optimization.mics_shard_size "
            "zero_optimization.mics_hierarchical_params_gather zero_optimization.zeropp_loco_param"
        ),
        _REMOVED,
    ),
}
# Paths that are refused where they are on.
_REFUSED_IF_ON: dict[str, str] = {
    "zero_optimization.round_robin_gradients": "DeepSpeed 0.19.8 then gives the weights in another order than it keeps "
    "them, so that checkpoints and LoRAs would be scrambled: delete it",
    "zero_optimization.zenflow": "its optimizer's state cannot be put together for a checkpoint: delete it",
    "fp16.enabled": "fp16 overflows with this model: use bf16 (train.precision=bf16)",
    "data_efficiency.enabled": "the order of clips is planned by cogds: delete the section",
    "tensor_parallel.autotp_size": "the adapter is not split over tensor-parallel ranks: delete the section, and use "
    "zero_optimization to shard the model",
    "expert_parallel.enabled": "the transformer has no experts: delete the section",
    "hybrid_engine.enabled": "it is for text generation inside training: delete the section",
    "autotuning.enabled": "it changes the batch size behind the batch plan: delete the section",
}
# Paths that are refused if they are false, and why.
_REFUSED_IF_OFF: dict[str, str] = {
    "managed_gradient_accumulation": "DeepSpeed counts the micro-steps here",
    "bf16.check_grad_overflow": "a step whose gradient is NaN or infinite would destroy the weights",
    # In fp32 and under autocast DeepSpeed 0.19.8 skips such a step because of its norm.
    "zero_optimization.compute_grad_norm": "a step whose gradient is NaN or infinite would destroy the weights",
}
# "auto" is DeepSpeed's own value here.
_OWN_AUTO = ("data_types.keep_in_fp32_modules", "zero_optimization.zenflow.")
_SECTIONS = ("optimizer", "optimizer.params", "bf16", "fp16", "torch_autocast", "zero_optimization")
_ADAM = ("adam", "adamw")
_OPTIMIZERS = ("Adam", "AdamW", "Lion")


def load_ds_config(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON file. Raises UserError for what is not one object without duplicate keys."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in (name for name in names if names.count(name) > 1):
            raise UserError(
                f"DeepSpeed config {path} has the key '{name}' more than once in one object: keep one of them"
            )
        return dict(pairs)

    file = Path(path)
    if not file.is_file():
        near = did_you_mean(file.name, (other.name for other in file.parent.glob("*.json")))
        raise UserError(f"DeepSpeed config {path} does not exist or is not a file{near}: give --deepspeed another path")
    try:
        ds = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(
            f"DeepSpeed config {path}:{error.lineno}:{error.colno} is not JSON: {error.msg}; JSON takes no comments "
            "and no comma after the last entry"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"DeepSpeed config {path} cannot be read: {error}; mend or replace it") from None
    if not isinstance(ds, dict):
        raise UserError(f"DeepSpeed config {path} must be an object in braces, but is a {type(ds).__name__}")
    return ds


def resolve(
    ds: Mapping[str, Any],
    cfg: RunConfig,
    explicit: frozenset[str],
    world_size: int,
    hidden_size: int | None,
    ds_path: str,
) -> tuple[dict[str, Any], RunConfig]:
    """What deepspeed.initialize gets, without any "auto", and the run config brought in line with it.

    explicit: the run-config keys that were set (from `load_config`). world_size: all ranks. hidden_size: width of the
    transformer, for the bucket sizes that are "auto". ds_path stands in the errors. ds is left as it is.
    """
    out: dict[str, Any] = copy.deepcopy(dict(ds))
    if "bfloat16" in out:  # DeepSpeed's former name for it
        out.setdefault("bf16", out.pop("bfloat16"))
    _check_keys(out, ds_path)
    cfg = _resolve_precision(out, cfg, explicit, ds_path)
    cfg = _resolve_shared(out, cfg, explicit, ds_path)
    _resolve_train_batch_size(out, cfg, world_size, ds_path)
    _fill_bucket_sizes(out, hidden_size, ds_path)
    for path, value in _leaves(out):
        if value == "auto" and not path.startswith(_OWN_AUTO):
            raise UserError(
                f'{path} is "auto" in {ds_path}, but the run config has no such value: write the value itself'
            )
    return out, cfg


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    """ZeRO stage of a resolved DeepSpeed config."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def _check_keys(ds: dict[str, Any], ds_path: str) -> None:
    for path, why in REFUSED.items():
        if _lookup(ds, path) is not _ABSENT:
            raise UserError(f"{path} in {ds_path} cannot be used: {why}")
    for path in _SECTIONS:
        if not isinstance(_lookup(ds, path, {}), dict):
            hint = ' as in {"stage": 2}' if path == "zero_optimization" else ""
            raise UserError(
                f"{path} in {ds_path} must be an object in braces{hint}, but is {json.dumps(_lookup(ds, path))}"
            )
    for section, known in KNOWN_KEYS.items():
        for name in _lookup(ds, section, {}) if section else ds:
            if name not in known:
                full = f"{section}.{name}".lstrip(".")
                advice = did_you_mean(name, known) or " and DeepSpeed would not use it"
                raise UserError(f"unknown key '{full}' in {ds_path}{advice}: correct or delete it")
    for path, why in _REFUSED_IF_ON.items():
        if _lookup(ds, path, False) not in (False, 0, "auto", None):
            raise UserError(f"{path} is {json.dumps(_lookup(ds, path))} in {ds_path}, which cannot be used: {why}")
    if _lookup(ds, "zero_optimization.offload_optimizer.ratio", 1.0) != 1.0:
        raise UserError(
            f"zero_optimization.offload_optimizer.ratio is not 1 in {ds_path}: of the state that stays on the GPU no "
            "checkpoint can be made; delete it"
        )
    if str(_lookup(ds, "zero_optimization.offload_optimizer.device", "")).lower() == "nvme":
        raise UserError(
            f'zero_optimization.offload_optimizer.device is "nvme" in {ds_path}, from where a checkpoint cannot be '
            'put together: a LoRA\'s optimizer state is small, write "cpu"; offload_param may go to NVMe'
        )
    for path, why in _REFUSED_IF_OFF.items():
        if _lookup(ds, path, True) in (False, None):
            raise UserError(f"{path}: {json.dumps(_lookup(ds, path))} in {ds_path}, but {why}. Delete the key.")


def _resolve_precision(ds: dict[str, Any], cfg: RunConfig, explicit: frozenset[str], ds_path: str) -> RunConfig:
    fp16 = _lookup(ds, "fp16", {})
    if fp16.get("enabled") == "auto":
        fp16["enabled"] = False
    autocast, bf16 = ds.get("torch_autocast", {}), ds.setdefault("bf16", {"enabled": "auto"})
    autocast_on, stated = autocast.get("enabled", False) is True, bf16.get("enabled", False)
    if stated not in (True, False, "auto"):
        raise UserError(f'bf16.enabled must be true, false or "auto", but is {json.dumps(stated)} in {ds_path}')
    if autocast_on:
        # Without a dtype torch takes fp16 on a GPU.
        dtype = str(autocast.setdefault("dtype", "bfloat16")).removeprefix("torch.")
        if dtype not in ("bfloat16", "bf16"):
            raise UserError(
                f"torch_autocast.dtype is {dtype} in {ds_path}: fp16 overflows with this model; use bfloat16"
            )
    found = "bf16" if stated is True or autocast_on else cfg.train.precision if stated == "auto" else "fp32"
    if found != cfg.train.precision and "train.precision" in explicit:
        what = "torch_autocast.enabled is true" if autocast_on else f"bf16.enabled is {json.dumps(stated)}"
        raise UserError(
            f"{what} in {ds_path} and train.precision={cfg.train.precision} in the run config disagree: set "
            f'bf16.enabled to "auto"{" and torch_autocast.enabled to false" if autocast_on else ""} in {ds_path}, or '
            f"remove train.precision"
        )
    if found != cfg.train.precision:
        cfg = replace(cfg, {"train.precision": found}, f"in {ds_path}")
    # Autocast keeps the adapter in fp32; the bf16 section would cast it.
    bf16["enabled"] = (found == "bf16" and not autocast_on) if stated == "auto" else stated
    # Skip steps whose gradient is not finite. Written out, because the default of DeepSpeed has changed before.
    bf16.setdefault("check_grad_overflow", True)
    stage = _lookup(ds, "zero_optimization.stage", 0)
    if stage == "auto" or type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(f"zero_optimization.stage must be 1, 2 or 3, but is {json.dumps(stage)} in {ds_path}")
    if stage == 0:
        raise UserError(
            f"zero_optimization.stage is 0 in {ds_path}: without ZeRO DeepSpeed does not see a gradient that is not "
            'finite, and nothing is gained over stage 1; write "zero_optimization": {"stage": 1}'
        )
    accumulated = _lookup(ds, "data_types.grad_accum_dtype", None)
    if stage == 1 and bf16["enabled"] and accumulated not in (None, "bf16"):
        raise UserError(
            f"data_types.grad_accum_dtype is {json.dumps(accumulated)} with bf16 at stage 1 in {ds_path}, where "
            "DeepSpeed keeps its state in another way, which cannot be saved: use stage 2, or delete it"
        )
    return cfg


def _resolve_shared(ds: dict[str, Any], cfg: RunConfig, explicit: frozenset[str], ds_path: str) -> RunConfig:
    optimizer = ds.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})  # no op to compile
    optimizer.setdefault("type", "AdamW")
    optimizer.setdefault("params", {})
    kind = str(optimizer["type"])
    if kind.lower() not in map(str.lower, _OPTIMIZERS):
        raise UserError(
            f"optimizer.type is {json.dumps(optimizer['type'])} in {ds_path}"
            f"{did_you_mean(str(optimizer['type']), _OPTIMIZERS)}: use one of {', '.join(_OPTIMIZERS)}, whose state "
            "can be saved whole and put back"
        )
    adam = str(optimizer["type"]).lower() in _ADAM
    for path, key in SHARED.items():
        value = _lookup(ds, path)
        # betas, eps and weight_decay are Adam's; another optimizer may have none of them.
        if value is _ABSENT and path.startswith("optimizer.params.") and not adam and key != "optimizer.lr":
            if key in explicit:
                name = path.rpartition(".")[2]
                raise UserError(
                    f"{key} is set in the run config, but the optimizer {optimizer['type']} in {ds_path} has no "
                    f'{path}: add "{name}": "auto" there if it takes one, or remove {key}'
                )
            continue
        if value is not _ABSENT and value != "auto":
            theirs = replace(cfg, {key: value}, f"in {ds_path} ({path})")
            if path == "train_micro_batch_size_per_gpu" and cfg.train.tokens_per_batch is not None:
                raise UserError(
                    f"{path} is {json.dumps(value)} in {ds_path} and train.tokens_per_batch is set in the run config, "
                    f'which decides the batch size: set {path} to "auto" or remove it'
                )
            if key in explicit and theirs != cfg:
                raise UserError(
                    f"{path} is {json.dumps(value)} in {ds_path} and {key}={_plain(get(cfg, key))} in the run config: "
                    f'set {path} to "auto" in {ds_path}, or remove {key}'
                )
            cfg = theirs
        _put(ds, path, _plain(get(cfg, key)))
    return cfg


def _resolve_train_batch_size(ds: dict[str, Any], cfg: RunConfig, num_ranks: int, ds_path: str) -> None:
    micro, accumulation, sequence = cfg.train.batch_size, cfg.train.gradient_accumulation_steps, cfg.parallel.sequence
    world_size, who = num_ranks // sequence, f"groups of {sequence} ranks" if sequence > 1 else "ranks"
    total, stated = micro * accumulation * world_size, ds.get("train_batch_size", "auto")
    if stated not in ("auto", total):
        if type(stated) is not int or stated < 1:
            raise UserError(
                f'train_batch_size must be a whole number or "auto", but is {json.dumps(stated)} in {ds_path}'
            )
        if stated % (micro * world_size) == 0:
            fix = f"set gradient_accumulation_steps to {stated // (micro * world_size)}"
        elif stated % micro == 0:
            ranks = [str(n) for n in range(1, stated // micro + 1) if stated // micro % n == 0]
            fix = f"{world_size} {who} do not divide it, {', '.join(ranks)} do"
        else:
            fix = f"a batch size of {micro} does not divide it"
        raise UserError(
            f"train_batch_size is {stated} in {ds_path}, but train.batch_size {micro} x gradient_accumulation_steps "
            f'{accumulation} x {world_size} {who} is {total}: {fix}; or set train_batch_size to "auto"'
        )
    if sequence > 1:  # DeepSpeed works it out for itself, and would count ranks that share a clip as if they did not
        ds.pop("train_batch_size", None)
    else:
        ds["train_batch_size"] = total


def _fill_bucket_sizes(ds: dict[str, Any], hidden_size: int | None, ds_path: str) -> None:
    # In widths of the transformer. A block, which ZeRO-3 brings together as one, has 12 squares and a little more: one
    # runs while the next comes, and a third may still be there. What is smaller than a LoRA's matrix stays everywhere:
    # bringing it would cost more time than keeping it costs memory.
    block = 14
    for name, size in (
        ("reduce_bucket_size", lambda width: width * width),
        ("stage3_prefetch_bucket_size", lambda width: block * width * width),
        ("stage3_max_live_parameters", lambda width: 3 * block * width * width),
        ("stage3_max_reuse_distance", lambda width: 3 * block * width * width),
        ("stage3_param_persistence_threshold", lambda width: 200 * width),
    ):
        if _lookup(ds, f"zero_optimization.{name}") != "auto":
            continue
        if hidden_size is None:
            raise UserError(
                f'zero_optimization.{name} is "auto" in {ds_path}, but the width is not known: write a number'
            )
        ds["zero_optimization"][name] = size(hidden_size)


_ABSENT: Any = object()


def _lookup(ds: Mapping[str, Any], path: str, default: Any = _ABSENT) -> Any:
    node: Any = ds
    for name in path.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return default
        node = node[name]
    return node


def _put(ds: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        ds = ds[parent]
    ds[name] = value


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(child, f"{path}.{name}".lstrip("."))
    else:
        yield path, node


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
