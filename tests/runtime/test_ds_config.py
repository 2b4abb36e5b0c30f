"""The DeepSpeed file and the run config become one, or say why not."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cogds import config
from cogds.errors import UserError
from cogds.runtime import ds_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
ZERO2: dict[str, Any] = {"zero_optimization": {"stage": 2}}


def resolve(ds: dict[str, Any], *overrides: str, world_size: int = 2, hidden_size: int | None = 64) -> tuple:
    cfg, explicit = config.load_config(None, ["model.path=m", "data.path=d", *overrides])
    return ds_config.resolve(ds, cfg, explicit, world_size, hidden_size, "x.json")


def refused(ds: dict[str, Any], *overrides: str, **kwargs: Any) -> str:
    with pytest.raises(UserError) as error:
        resolve(ds, *overrides, **kwargs)
    assert "x.json" in str(error.value)
    return str(error.value)


def autos(node: Any) -> list:
    if isinstance(node, dict):
        return [hit for child in node.values() for hit in autos(child)]
    return [node] if node == "auto" else []


@pytest.mark.parametrize("run", ["demo", "cogvideox1.5_i2v_lora"])
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_every_shipped_file_resolves_with_every_shipped_run(file, run):
    cfg, explicit = config.load_config(str(ROOT / f"launch/configs/{run}.yaml"), ["data.path=d"])
    ds, same = ds_config.resolve(ds_config.load_ds_config(str(file)), cfg, explicit, 8, 3072, str(file))
    assert same == cfg
    assert autos(ds) == []
    assert ds["train_batch_size"] == 8
    assert ds["bf16"]["enabled"] == (cfg.train.precision == "bf16")
    assert ds["optimizer"]["params"] == {
        "lr": cfg.optimizer.lr,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 1e-3,
        "torch_adam": True,
    }


def test_the_five_files_are_what_their_names_say():
    zero = {file.stem: ds_config.load_ds_config(str(file))["zero_optimization"] for file in SHIPPED}
    assert {name: z["stage"] for name, z in zero.items()} == {
        "zero1": 1,
        "zero2": 2,
        "zero2_offload": 2,
        "zero3": 3,
        "zero3_offload": 3,
    }
    offloads = {name: {key for key in z if key.startswith("offload")} for name, z in zero.items()}
    assert offloads["zero2_offload"] == {"offload_optimizer"}
    assert offloads["zero3_offload"] == {"offload_optimizer", "offload_param"}
    assert not any(offloads[name] for name in ("zero1", "zero2", "zero3"))


def test_auto_is_filled_from_the_run_config():
    ds = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
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
    assert ds == before  # the input is left alone
    assert json.loads(json.dumps(out)) == out


def test_what_is_missing_is_filled():
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
            "params": {"torch_adam": True, "lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-3},
        },
    }
    assert resolve(out)[0] == out  # and stays
    assert cfg == resolve(out)[1]


SHARED_CASES = [
    ("train_micro_batch_size_per_gpu", 3, "train.batch_size", "2"),
    ("gradient_accumulation_steps", 4, "train.gradient_accumulation_steps", "2"),
    ("gradient_clipping", 0.5, "optimizer.max_grad_norm", "2.0"),
    ("optimizer.params.lr", 0.5, "optimizer.lr", "2.0"),
    ("optimizer.params.betas", [0.5, 0.6], "optimizer.betas", "[0.1, 0.2]"),
    ("optimizer.params.eps", 0.5, "optimizer.eps", "2.0"),
    ("optimizer.params.weight_decay", 0.5, "optimizer.weight_decay", "2.0"),
]


def with_value(path: str, value: Any) -> dict[str, Any]:
    ds = copy.deepcopy(ZERO2)
    node = ds
    *parents, name = path.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[name] = value
    return ds


@pytest.mark.parametrize("path, value, key, other", SHARED_CASES)
def test_a_value_of_the_deepspeed_file_wins_over_a_default_and_reaches_the_run_config(path, value, key, other):
    out, cfg = resolve(with_value(path, value))
    found = config.get(cfg, key)
    assert (list(found) if isinstance(found, tuple) else found) == value
    assert out["train_batch_size"] == cfg.train.batch_size * cfg.train.gradient_accumulation_steps * 2
    message = refused(with_value(path, value), f"{key}={other}")
    assert f"{path} is {json.dumps(value)} in x.json and {key}={other} in the run config" in message
    assert f'set {path} to "auto"' in message
    out, cfg = resolve(with_value(path, value), f"{key}={json.dumps(value)}")  # set alike on both sides
    assert resolve(out, f"{key}={json.dumps(value)}")[1] == cfg


def test_every_shared_key_is_covered():
    assert {case[0]: case[2] for case in SHARED_CASES} == ds_config.SHARED


def test_a_value_of_the_wrong_kind_names_both_keys():
    message = refused(with_value("gradient_accumulation_steps", 2.5))
    assert "train.gradient_accumulation_steps must be a whole number, but is 2.5" in message
    assert "(gradient_accumulation_steps)" in message


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
def test_precision_is_settled(sections, overrides, bf16, precision):
    out, cfg = resolve({**ZERO2, **sections}, *overrides)
    assert out["bf16"]["enabled"] is bf16
    assert cfg.train.precision == precision
    if sections.get("torch_autocast", {}).get("enabled"):
        assert out["torch_autocast"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "sections, overrides, parts",
    [
        (
            {"bf16": {"enabled": False}},
            ["train.precision=bf16"],
            ["bf16.enabled is false", "train.precision=bf16", "auto"],
        ),
        ({"bf16": {}}, ["train.precision=bf16"], ["bf16.enabled is false", "train.precision=bf16"]),
        ({"bf16": {"enabled": True}}, ["train.precision=fp32"], ["bf16.enabled is true", "train.precision=fp32"]),
        ({"torch_autocast": {"enabled": True}}, ["train.precision=fp32"], ["torch_autocast.enabled is true", "fp32"]),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, [], ["torch_autocast.dtype", "use bfloat16"]),
        ({"fp16": {"enabled": True}}, [], ["fp16.enabled is true", "use bf16"]),
        ({"bf16": {"enabled": "yes"}}, [], ["bf16.enabled must be true, false"]),
    ],
)
def test_precision_that_disagrees_is_refused(sections, overrides, parts):
    message = refused({**ZERO2, **sections}, *overrides)
    for part in parts:
        assert part in message


def test_there_is_no_training_without_zero():
    for ds in ({}, {"zero_optimization": {"stage": 0}}):
        for precision in ("bf16", "fp32"):
            message = refused(ds, f"train.precision={precision}")
            assert 'write "zero_optimization": {"stage": 1}' in message


@pytest.mark.parametrize("stage", [4, -1, "auto", "2", True, 2.0])
def test_the_stage_is_1_to_3(stage):
    assert "zero_optimization.stage must be 1, 2 or 3" in refused({"zero_optimization": {"stage": stage}})


def test_an_optimizer_that_cannot_be_saved_whole_is_refused():
    message = refused({**ZERO2, "optimizer": {"type": "AdamWW"}})
    assert 'optimizer.type is "AdamWW"' in message
    assert "did you mean 'AdamW'?" in message
    for kind in ("OneBitAdam", "SGD", "Adagrad"):
        assert "use one of Adam, AdamW, Lion" in refused({**ZERO2, "optimizer": {"type": kind}})


@pytest.mark.parametrize(
    "zero, says",
    [
        ({"stage": 2, "round_robin_gradients": True}, "scrambled: delete it"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio is not 1"),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "cannot be put together for a checkpoint"),
    ],
)
def test_what_would_spoil_a_checkpoint_is_refused(zero, says):
    assert says in refused({"zero_optimization": zero})


def test_float32_accumulation_at_stage_1_is_refused():
    types = {"data_types": {"grad_accum_dtype": "fp32"}}
    assert "use stage 2, or delete it" in refused({"zero_optimization": {"stage": 1}, **types})
    assert resolve({"zero_optimization": {"stage": 2}, **types})[0]["data_types"] == types["data_types"]


def test_optimizer_state_on_nvme_is_refused():
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}
    assert 'small, write "cpu"' in refused({"zero_optimization": zero})


@pytest.mark.parametrize(
    "total, overrides, parts",
    [
        (32, [], ["32", "train.batch_size 1 x gradient_accumulation_steps 1 x 2 ranks is 2", "_steps to 16"]),
        (9, ["train.batch_size=3"], ["2 ranks do not divide it, 1, 3 do"]),
        (7, ["train.batch_size=3"], ["a batch size of 3 does not divide it"]),
        (2.5, [], ["must be a whole number"]),
    ],
)
def test_a_batch_that_ranks_and_accumulation_do_not_make_is_refused(total, overrides, parts):
    message = refused({**ZERO2, "train_batch_size": total}, *overrides)
    for part in ["train_batch_size", *parts]:
        assert part in message


def test_a_batch_that_fits_passes():
    out, _ = resolve({**ZERO2, "train_batch_size": 12}, "train.batch_size=3", "train.gradient_accumulation_steps=2")
    assert out["train_batch_size"] == 12


def test_a_token_budget_and_a_fixed_batch_exclude_each_other():
    message = refused(with_value("train_micro_batch_size_per_gpu", 2), "train.tokens_per_batch=100")
    assert "train_micro_batch_size_per_gpu is 2" in message
    assert "train.tokens_per_batch" in message
    assert resolve(with_value("train_micro_batch_size_per_gpu", "auto"), "train.tokens_per_batch=100")


@pytest.mark.parametrize(
    "ds, parts",
    [
        ({"optimiser": {}}, ["unknown key 'optimiser'", "did you mean 'optimizer'?"]),
        ({"qqq": 1}, ["unknown key 'qqq'", "delete it"]),
        (
            {"zero_optimization": {"stage": 2, "offload_optimiser": {}}},
            ["'zero_optimization.offload_optimiser'", "_optimizer'"],
        ),
        ({"optimizer": {"type": "AdamW", "parms": {}}}, ["unknown key 'optimizer.parms'", "did you mean 'params'?"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler in", "optimizer.schedule", "optimizer.warmup_steps"]),
        ({"optimizer": {"params": {"max_grad_norm": 1}}}, ["optimizer.params.max_grad_norm", "gradient_clipping"]),
        ({"amp": {"enabled": True}}, ["amp in", "removed"]),
        ({"elasticity": {}}, ["elasticity in", "removed"]),
        ({"zero_optimization": {"mics_shard_size": 2}}, ["zero_optimization.mics_shard_size in", "removed"]),
        ({"pipeline": {"stages": 2}}, ["pipeline in", "delete it"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel.autotp_size is 2", "delete"]),
        ({"data_efficiency": {"enabled": True}}, ["data_efficiency.enabled is true", "delete"]),
        ({"managed_gradient_accumulation": False}, ["managed_gradient_accumulation: false"]),
        ({**ZERO2, "bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow: false"]),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, ["zero_optimization.compute_grad_norm: f"]),
        ({"zero_optimization": True}, ["zero_optimization in", '{"stage": 2}', "true"]),
        ({"optimizer": "AdamW"}, ["optimizer in", "must be an object", '"AdamW"']),
        ({**ZERO2, "aio": {"block_size": "auto"}}, ['aio.block_size is "auto"', "write the value itself"]),
        ({**ZERO2, "compile": {"passes": ["auto"]}}, ['compile.passes.0 is "auto"']),
    ],
)
def test_what_deepspeed_would_ignore_or_choke_on_is_refused(ds, parts):
    message = refused(ds)
    for part in parts:
        assert part in message


def test_sections_that_are_off_pass():
    off = {"fp16": {"enabled": False}, "data_efficiency": {"enabled": False}, "tensor_parallel": {"autotp_size": 0}}
    own_auto = {"data_types": {"keep_in_fp32_modules": "auto"}}
    out, _ = resolve({**ZERO2, **off, **own_auto})
    assert out["data_types"] == own_auto["data_types"]


def test_auto_bucket_sizes_need_the_width():
    ds = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    assert "zero_optimization.reduce_bucket_size" in refused(ds, hidden_size=None)
    assert resolve(ZERO2, hidden_size=None)


def test_another_optimizer_keeps_its_own_parameters():
    lion: dict[str, Any] = {**ZERO2, "optimizer": {"type": "Lion", "params": {"betas": [0.9, 0.99]}}}
    out, cfg = resolve(lion)
    assert out["optimizer"]["params"] == {"betas": [0.9, 0.99], "lr": 1e-4}
    assert cfg.optimizer.betas == (0.9, 0.99)
    message = refused(lion, "optimizer.eps=1e-6")
    assert "optimizer.eps is set in the run config, but the optimizer Lion" in message
    assert '"eps": "auto"' in message


@pytest.mark.parametrize(
    "text, parts",
    [
        ('{"a": 1,\n "b": }', [":2:7 is not JSON", "comments"]),
        ("[1]", ["must be an object in braces", "list"]),
        ('{"bf16": {"enabled": true, "enabled": false}}', ["'enabled' more than once", "keep one"]),
        (b"\xff", ["cannot be read"]),
    ],
)
def test_a_bad_file_is_named(text, parts, tmp_path):
    file = tmp_path / "zero2.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        ds_config.load_ds_config(str(file))
    for part in [str(file), *parts]:
        assert part in str(error.value)


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "zero2.json").write_text("{}")
    with pytest.raises(UserError, match=r"zero-2\.json does not exist.*did you mean 'zero2\.json'\?"):
        ds_config.load_ds_config(str(tmp_path / "zero-2.json"))


# The installed DeepSpeed.


class Recorder(dict):
    """A dict that notes which keys are asked for."""

    asked: set[str]

    def note(self, key: str) -> str:
        self.asked.add(key)
        return key

    def get(self, key, default=None):
        return super().get(self.note(key), default)

    def __getitem__(self, key):
        return super().__getitem__(self.note(key))

    def __contains__(self, key) -> bool:
        return super().__contains__(self.note(key))

    def keys(self):
        return self  # so that `in d.keys()` is noted as well


def recorder(**entries: Any) -> Recorder:
    made = Recorder(entries)
    made.asked = set()
    return made


def test_known_keys_are_those_that_the_installed_deepspeed_reads():
    runtime = pytest.importorskip("deepspeed.runtime.config")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    optimizer, autocast = recorder(type="AdamW", params={}), recorder(enabled=True, dtype="bfloat16")
    root = recorder(train_batch_size=1, optimizer=optimizer, torch_autocast=autocast)
    runtime.DeepSpeedConfig(root)
    refused_top = {path for path in ds_config.REFUSED if "." not in path}
    mesh = {"sequence_parallel_size", "data_parallel_size"}  # read by deepspeed.initialize
    assert root.asked - set(runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS) - mesh == ds_config.KNOWN_KEYS[""]
    assert set(runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= refused_top
    assert {f"zero_optimization.{key}" for key in runtime._REMOVED_ZERO_CONFIG_KEYS} <= set(ds_config.REFUSED)
    assert optimizer.asked == ds_config.KNOWN_KEYS["optimizer"]
    assert autocast.asked == ds_config.KNOWN_KEYS["torch_autocast"]
    for section, model in (("bf16", DeepSpeedBF16Config), ("zero_optimization", DeepSpeedZeroConfig)):
        names = set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
        assert ds_config.KNOWN_KEYS[section] == names


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_the_installed_deepspeed_accepts_every_resolved_file(file):
    runtime = pytest.importorskip("deepspeed.runtime.config")
    out, _ = resolve(ds_config.load_ds_config(str(file)), world_size=1, hidden_size=3072)
    parsed = runtime.DeepSpeedConfig(out)
    assert parsed.zero_config.stage == out["zero_optimization"]["stage"]
    assert parsed.zero_config.reduce_bucket_size == 3072**2
    assert parsed.bfloat16_config.enabled
    assert not parsed.timers_config.enabled  # it would synchronize the device every micro-step


def test_stage_of_a_config():
    assert ds_config.zero_stage({"zero_optimization": {"stage": 3}}) == 3
    assert ds_config.zero_stage({}) == 0
