"""A DeepSpeed file combined with a run config: results, and the keys that errors name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cogds.config import deepspeed
from cogds.config.deepspeed import REFUSED, SHARED, compiles_extension, known_keys, load_ds_config, zero_stage
from cogds.config.loading import load_config
from cogds.config.schema import get
from cogds.errors import UserError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
ZERO2: dict[str, Any] = {"zero_optimization": {"stage": 2}}


def resolve(ds: dict[str, Any], *overrides: str, world_size: int = 2, hidden_size: int | None = 64) -> tuple:
    cfg, explicit = load_config(None, ["model.path=m", "data.path=d", *overrides])
    return deepspeed.resolve(ds, cfg, explicit, world_size, hidden_size, "x.json")


def refused(ds: dict[str, Any], *overrides: str, **kwargs: Any) -> str:
    with pytest.raises(UserError) as error:
        resolve(ds, *overrides, **kwargs)
    assert "x.json" in str(error.value)
    return str(error.value)


def nested(path: str, value: Any) -> dict[str, Any]:
    """`ZERO2` with another value at a dotted path."""
    ds = copy.deepcopy(ZERO2)
    node = ds
    *parents, name = path.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = value
    return ds


# Results.


@pytest.mark.parametrize("run", sorted(file.stem for file in (ROOT / "launch/configs").glob("*.yaml")))
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_every_shipped_file_resolves_with_every_shipped_run(file, run):
    cfg, explicit = load_config(str(ROOT / f"launch/configs/{run}.yaml"), ["data.path=d"])
    ds, resolved = deepspeed.resolve(load_ds_config(str(file)), cfg, explicit, 8, 3072, str(file))
    assert resolved == cfg
    assert '"auto"' not in json.dumps(ds)
    assert ds["train_batch_size"] == 8 * cfg.train.batch_size
    assert ds["bf16"]["enabled"] == (cfg.train.precision == "bf16")
    assert ds["optimizer"]["params"] == {
        "lr": cfg.optimizer.lr, "betas": list(cfg.optimizer.betas), "eps": 1e-8, "weight_decay": 1e-3,
        "torch_adam": True, "fused": True,
    }  # fmt: skip


def test_the_shipped_files_have_the_stage_and_offload_in_their_names():
    zero = {file.stem: load_ds_config(str(file))["zero_optimization"] for file in SHIPPED}
    offloads = {name: {key for key in section if key.startswith("offload")} for name, section in zero.items()}
    assert {name: section["stage"] for name, section in zero.items()} == {
        "zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3
    }  # fmt: skip
    assert offloads["zero2_offload"] == {"offload_optimizer"}
    assert offloads["zero3_offload"] == {"offload_optimizer", "offload_param"}
    assert not any(offloads[name] for name in ("zero1", "zero2", "zero3"))


def test_auto_is_filled_from_the_run_config():
    ds = {
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    before = copy.deepcopy(ds)
    overrides = ["train.batch_size=3", "train.gradient_accumulation_steps=5", "optimizer.max_grad_norm=0.5"]
    overrides += ["optimizer.lr=2e-4", "optimizer.betas=[0.8,0.9]", "optimizer.eps=1e-6", "optimizer.weight_decay=0.1"]
    out, _ = resolve(ds, *overrides, world_size=4)
    assert out == {
        "train_batch_size": 60,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1}},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 4096,
            "stage3_prefetch_bucket_size": 14 * 4096,
            "stage3_param_persistence_threshold": 200 * 64,
        },
    }
    assert ds == before
    assert json.loads(json.dumps(out)) == out


def test_missing_keys_are_filled_and_resolving_twice_changes_nothing():
    out, cfg = resolve(ZERO2)
    assert out == {
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 2,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "torch_adam": True,
                "fused": True,
                "lr": 1e-4,
                "betas": [0.9, 0.95],
                "eps": 1e-8,
                "weight_decay": 1e-3,
            },
        },
    }
    assert resolve(out) == (out, cfg)


SHARED_CASES = [
    ("train_micro_batch_size_per_gpu", 3, "train.batch_size", "2"),
    ("gradient_accumulation_steps", 4, "train.gradient_accumulation_steps", "2"),
    ("gradient_clipping", 0.5, "optimizer.max_grad_norm", "2.0"),
    ("optimizer.params.lr", 0.5, "optimizer.lr", "2.0"),
    ("optimizer.params.betas", [0.5, 0.6], "optimizer.betas", "[0.1, 0.2]"),
    ("optimizer.params.eps", 0.5, "optimizer.eps", "2.0"),
    ("optimizer.params.weight_decay", 0.5, "optimizer.weight_decay", "2.0"),
]


@pytest.mark.parametrize("path, value, key, other", SHARED_CASES)
def test_a_value_of_the_deepspeed_file_replaces_a_default_and_must_agree_with_a_set_value(path, value, key, other):
    out, cfg = resolve(nested(path, value))
    resolved = get(cfg, key)
    assert (list(resolved) if isinstance(resolved, tuple) else resolved) == value
    assert out["train_batch_size"] == cfg.train.batch_size * cfg.train.gradient_accumulation_steps * 2
    message = refused(nested(path, value), f"{key}={other}")
    assert all(part in message for part in (path, json.dumps(value), key, other))
    out, cfg = resolve(nested(path, value), f"{key}={json.dumps(value)}")
    assert resolve(out, f"{key}={json.dumps(value)}")[1] == cfg


def test_every_shared_key_is_covered():
    assert {case[0]: case[2] for case in SHARED_CASES} == SHARED


@pytest.mark.parametrize(
    "sections, overrides, bf16, precision",
    [
        ({}, [], True, "bf16"),
        ({}, ["train.precision=fp32"], False, "fp32"),
        ({"bf16": {"enabled": "auto"}}, ["train.precision=fp32"], False, "fp32"),
        ({"bf16": {"enabled": False}}, [], False, "fp32"),
        ({"bf16": {}}, [], False, "fp32"),
        ({"bfloat16": {"enabled": True}}, ["train.precision=bf16"], True, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, [], False, "bf16"),
        ({"torch_autocast": {"enabled": True}, "bf16": {"enabled": "auto"}}, ["train.precision=bf16"], False, "bf16"),
        ({"torch_autocast": {"enabled": False}}, [], True, "bf16"),
    ],
)
def test_sections_and_run_config_decide_the_precision(sections, overrides, bf16, precision):
    out, cfg = resolve({**ZERO2, **sections}, *overrides)
    assert out["bf16"]["enabled"] is bf16
    assert cfg.train.precision == precision
    if sections.get("torch_autocast", {}).get("enabled"):
        assert out["torch_autocast"]["dtype"] == "bfloat16"


def test_sections_that_are_off_are_accepted():
    off = {"fp16": {"enabled": False}, "data_efficiency": {"enabled": False}, "tensor_parallel": {"autotp_size": 0}}
    own_auto = {"data_types": {"keep_in_fp32_modules": "auto"}}
    out, _ = resolve({**ZERO2, **off, **own_auto})
    assert out["data_types"] == own_auto["data_types"]


def test_another_optimizer_keeps_its_own_parameters():
    lion = nested("optimizer", {"type": "Lion", "params": {"betas": [0.9, 0.99]}})
    out, cfg = resolve(lion)
    assert out["optimizer"]["params"] == {"betas": [0.9, 0.99], "lr": 1e-4}
    assert cfg.optimizer.betas == (0.9, 0.99)
    assert "optimizer.eps" in refused(lion, "optimizer.eps=1e-6")


def test_float32_accumulation_and_a_matching_batch_size_are_accepted():
    types = {"grad_accum_dtype": "fp32"}
    assert resolve(nested("data_types", types))[0]["data_types"] == types
    matching = ["train.batch_size=3", "train.gradient_accumulation_steps=2"]
    assert resolve(nested("train_batch_size", 12), *matching)[0]["train_batch_size"] == 12
    assert resolve(nested("train_micro_batch_size_per_gpu", "auto"), "train.tokens_per_batch=100")


# Errors.


@pytest.mark.parametrize(
    "sections, override, keys",
    [
        ({"bf16": {"enabled": False}}, "train.precision=bf16", ["bf16.enabled", "train.precision"]),
        ({"bf16": {}}, "train.precision=bf16", ["bf16.enabled", "train.precision"]),
        ({"bf16": {"enabled": True}}, "train.precision=fp32", ["bf16.enabled", "train.precision"]),
        ({"torch_autocast": {"enabled": True}}, "train.precision=fp32", ["torch_autocast.enabled", "train.precision"]),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "seed=0", ["torch_autocast.dtype", "float16"]),
        ({"fp16": {"enabled": True}}, "seed=0", ["fp16.enabled"]),
        ({"bf16": {"enabled": "yes"}}, "seed=0", ["bf16.enabled", '"yes"']),
        ({"train_micro_batch_size_per_gpu": 2}, "train.tokens_per_batch=100",
         ["train_micro_batch_size_per_gpu", "train.tokens_per_batch", "100"]),
        ({"gradient_accumulation_steps": 2.5}, "seed=0", ["train.gradient_accumulation_steps", "2.5"]),
    ],
)  # fmt: skip
def test_a_contradiction_names_both_keys(sections, override, keys):
    message = refused({**ZERO2, **sections}, override)
    assert all(key in message for key in keys)


@pytest.mark.parametrize(
    "total, overrides, parts",
    [
        (32, [], ["32", " 2.", "gradient_accumulation_steps to 16"]),
        (9, ["train.batch_size=3"], ["9", " 6."]),
        (2.5, [], ["2.5", " 2."]),
    ],
)
def test_a_batch_size_that_contradicts_other_keys_is_refused(total, overrides, parts):
    message = refused(nested("train_batch_size", total), *overrides)
    assert all(part in message for part in ["train_batch_size", *parts])


@pytest.mark.parametrize("stage", [None, 0, 4, -1, "auto", "2", True, 2.0])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_stage_is_1_to_3(stage, precision):
    ds = {} if stage is None else {"zero_optimization": {"stage": stage}}
    assert "zero_optimization.stage" in refused(ds, f"train.precision={precision}")


@pytest.mark.parametrize("path", REFUSED)
def test_a_key_that_this_trainer_does_not_support_is_refused(path):
    assert refused(nested(path, {} if path in ("scheduler", "pipeline") else 1)).startswith(f"x.json: {path} ")


@pytest.mark.parametrize(
    "path, value",
    [
        ("zero_optimization.round_robin_gradients", True),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}),
        ("zero_optimization.offload_optimizer", {"device": "cpu", "ratio": 0.5}),
        ("zero_optimization.offload_optimizer.device", "nvme"),
        ("fp16.enabled", True),
        ("data_efficiency.enabled", True),
        ("tensor_parallel.autotp_size", 2),
        ("expert_parallel.enabled", True),
        ("hybrid_engine.enabled", True),
        ("autotuning.enabled", True),
        ("managed_gradient_accumulation", False),
        ("managed_gradient_accumulation", None),  # DeepSpeed reads null as false
        ("bf16.check_grad_overflow", False),
        ("zero_optimization.compute_grad_norm", False),
        ("optimizer.type", "SGD"),
        ("optimizer.type", "OneBitAdam"),
        ("zero_optimization", True),
        ("optimizer", "AdamW"),
        ("aio.block_size", "auto"),
        ("compile.passes", ["auto"]),
        ("communication_data_type", "fp8"),
        # These are refused by DeepSpeed's own models.
        ("zero_optimization.offload_optimizer.devic", "cpu"),
        ("zero_optimization.reduce_bucket_size", "big"),
        ("fp16.loss_scal", 1),
        ("tensorboard.enabld", True),
    ],
)
def test_an_unsupported_value_is_refused(path, value):
    assert path in refused(nested(path, value))


def test_accumulation_in_float32_at_stage_1_is_refused():
    ds = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert "data_types.grad_accum_dtype" in refused(ds)


@pytest.mark.parametrize(
    "path, near",
    {
        "optimiser": "optimizer",
        "zero_optimisation": "zero_optimization",
        "qqq": None,
        "zero_optimization.offload_optimiser": "offload_optimizer",
        "zero_optimization.stage3_max_live_params": "stage3_max_live_parameters",
        "optimizer.parms": "params",
        "torch_autocast.enable": "enabled",
        "bf16.enbled": "enabled",
    }.items(),
)
def test_an_unknown_key_is_refused_with_the_nearest(path, near):
    message = refused(nested(path, 1))
    assert message.startswith(f"x.json: unknown key {path}")
    assert near is None or f"did you mean '{near}'?" in message


@pytest.mark.parametrize(
    "path, parts",
    {
        "loss_scale": ["fp16", "Delete it"],
        "initial_scale_power": ["fp16", "Delete it"],
        "bf16.loss_scale": ["fp16", "Delete it"],
        "stage": ["zero_optimization", "Move it there"],
        "lr": ["optimizer.params", "Move it there"],
        "torch_adam": ["optimizer.params", "Move it there"],
        "zero_optimization.gradient_clipping": ["the top level", "Move it there"],
        "enabled": ["torch_autocast, bf16 or fp16", "Move it"],
    }.items(),
)
def test_a_key_in_the_wrong_section_is_refused_with_the_right_section(path, parts):
    message = refused(nested(path, 0))
    assert message.startswith(f"x.json: unknown key {path}: ")
    assert all(part in message for part in parts)


def test_auto_bucket_sizes_need_the_width():
    assert "zero_optimization.reduce_bucket_size" in refused(
        nested("zero_optimization.reduce_bucket_size", "auto"), hidden_size=None
    )
    assert resolve(ZERO2, hidden_size=None)


# Files.


@pytest.mark.parametrize(
    "text, start",
    [
        ('{"a": 1,\n "b": }', ":2:7: "),
        ("[1]", ": "),
        ('{"bf16": {"enabled": true, "enabled": false}}', ": duplicate key 'enabled'"),
        (b"\xff", ": "),
    ],
)
def test_a_bad_file_is_named(text, start, tmp_path):
    file = tmp_path / "zero2.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_ds_config(str(file))
    assert str(error.value).startswith(f"{file}{start}")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "zero2.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ZERO2).encode())
    assert load_ds_config(str(tmp_path / "zero2.json")) == ZERO2


def test_a_missing_file_names_its_neighbor(tmp_path):
    (tmp_path / "zero2.json").write_text("{}")
    with pytest.raises(UserError, match=r"zero-2\.json: .*did you mean 'zero2\.json'\?"):
        load_ds_config(str(tmp_path / "zero-2.json"))


@pytest.mark.parametrize("name, text", [("run.yaml", "train: {num_steps: 3}\n"), ("run.json", '{"train": {}}')])
def test_a_run_config_given_as_deepspeed_config_is_recognized(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="Pass it to --config"):
        load_ds_config(str(tmp_path / name))


# The installed DeepSpeed.


def test_known_keys_contain_those_of_shipped_files_and_no_sections_of_the_run_config():
    known = known_keys()
    for file in SHIPPED:
        ds = load_ds_config(str(file))
        assert set(ds) <= known[""]
        assert set(ds["zero_optimization"]) <= known["zero_optimization"]
    assert {"type", "params"} <= known["optimizer"]
    assert {"enabled", "dtype"} <= known["torch_autocast"]
    assert not {"model", "data", "train", "lora", "metrics", "output_dir"} & known[""]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_the_installed_deepspeed_accepts_every_resolved_file(file):
    from deepspeed.runtime.config import DeepSpeedConfig

    out, _ = resolve(load_ds_config(str(file)), world_size=1, hidden_size=3072)
    parsed = DeepSpeedConfig(out)
    assert parsed.zero_config.stage == zero_stage(out) == out["zero_optimization"]["stage"]
    assert parsed.zero_config.reduce_bucket_size == 3072**2
    assert parsed.bfloat16_config.enabled
    assert not parsed.timers_config.enabled  # timers would synchronize the device in every micro-step
    assert zero_stage({}) == 0


@pytest.mark.parametrize(
    "optimizer, offload_param, compiles",
    [
        ({"type": "AdamW", "params": {"torch_adam": True}}, None, False),
        ({"type": "AdamW", "params": {}}, None, True),
        ({"type": "Lion", "params": {}}, None, True),
        ({"type": "AdamW", "params": {"torch_adam": True}}, {"device": "cpu"}, False),
        ({"type": "AdamW", "params": {"torch_adam": True}}, {"device": "nvme"}, True),
    ],
)
def test_configs_that_compile_an_extension(optimizer, offload_param, compiles):
    assert (
        compiles_extension({"optimizer": optimizer, "zero_optimization": {"offload_param": offload_param}}) == compiles
    )


@pytest.mark.parametrize(
    "path, value, key",
    [
        ("torch_autocast", {"enabled": True}, "torch_autocast.enabled"),
        (
            "zero_optimization",
            {"stage": 3, "offload_param": {"device": "nvme"}},
            "zero_optimization.offload_param.device",
        ),
    ],
)
def test_what_a_full_fine_tune_cannot_use_is_refused(path, value, key):
    ds = ZERO2 | {path: value}
    resolve(ds)  # a LoRA can
    assert key in refused(ds, "train.method=full")
