"""What may change when a run is resumed and what may not. tests/dist checks that the numbers continue."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from cogds.config.loading import load_config
from cogds.config.schema import KEYS
from cogds.core.geometry import ClipShape
from cogds.core.plan import Plan
from cogds.errors import UserError
from cogds.train.resume import MAY_CHANGE, InitialState, check_identity, data_identity, resume_plan, run_identity

DATA = SimpleNamespace(fingerprint="f", mixture=SimpleNamespace(repeats=(1.0,)))
BUCKETS = (ClipShape(9, 64, 64),)


def make_identity(*overrides, optimizer="AdamW", weights="w", data=DATA, buckets=BUCKETS):
    cfg, _ = load_config(None, ["model.path=m", "data.path=d", *overrides])
    return json.loads(json.dumps(run_identity(cfg, optimizer, weights, buckets) | data_identity(data)))


def start(saved):
    return InitialState(Path("step-1"), {"identity": saved})


def test_an_unchanged_run_matches():
    check_identity(start(make_identity()), make_identity())


@pytest.mark.parametrize(
    "override",
    ["output_dir=other", "train.num_steps=9", "train.gradient_accumulation_steps=4", "train.batch_size=2",
     "optimizer.lr=1", "optimizer.betas=[0.5, 0.5]", "checkpoint.every=1", "checkpoint.keep_every=5", "metrics.every=5",
     "network.interface=eth0", "data.num_workers=0", "data.sync=cost", "lora.init_from=a.safetensors",
     "model.path=elsewhere", "eval.every=7", "eval.path=other", "eval.num_clips=3", "eval.num_timesteps=4"],
)  # fmt: skip
def test_these_keys_may_change(override):
    check_identity(start(make_identity()), make_identity(override))


@pytest.mark.parametrize(
    "override, change",
    [
        ("seed=1", "seed was 0, now 1"),
        ("lora.rank=8", "lora.rank was 128, now 8"),
        (
            "lora.target_modules=[to_q]",
            r"lora.target_modules was \['to_q', 'to_k', 'to_v', 'to_out.0'\], now \['to_q'\]",
        ),
        ("conditioning.image_dropout=0.5", "conditioning.image_dropout was 0.05, now 0.5"),
        ("conditioning.modes={last: 1}", "conditioning.modes was {'first': 1.0}, now {'last': 1.0}"),
        ("train.precision=fp32", "train.precision was bf16, now fp32"),
        ("eval.held_out=0.2", "eval.held_out was 0.0, now 0.2"),
    ],
)
def test_other_keys_that_changed_are_named(override, change):
    with pytest.raises(UserError, match=f"step-1: .*: {change}") as error:
        check_identity(start(make_identity()), make_identity(override))
    assert str(error.value).count(", now ") == 1


def test_a_full_run_does_not_depend_on_settings_of_loras():
    full = "train.method=full"
    check_identity(start(make_identity(full)), make_identity(full, "lora.rank=4"))
    with pytest.raises(UserError, match=r"train\.method was full, now lora"):
        check_identity(start(make_identity(full)), make_identity())


def test_model_data_and_optimizer_may_not_change():
    data = SimpleNamespace(fingerprint="g", mixture=SimpleNamespace(repeats=(2.0,)))
    now = make_identity(optimizer="Lion", weights="v", data=data, buckets=(ClipShape(17, 64, 64),))
    with pytest.raises(UserError) as error:
        check_identity(start(make_identity()), now)
    for part in ("model weights was w, now v", "data was f", "repeats was [1.0], now [2.0]",
                 "buckets was ['9x64x64']", "optimizer was adamw"):  # fmt: skip
        assert part in str(error.value)


def test_the_keys_that_may_change():
    """Listed here too, so that no key is added by accident."""
    changeable = {name for name in KEYS if name.startswith(MAY_CHANGE)}
    assert changeable == {
        "output_dir",
        "model.path", "model.revision", "model.attention", "model.compile",
        "data.path", "data.sets", "data.columns", "data.root", "data.path_template", "data.where", "data.repeats",
        "data.default_caption", "data.caption_prefix", "data.mirror",
        "data.max_unusable", "data.manifest", "data.draw_demo_clips", "data.buckets", "data.bucket_sizes",
        "data.bucket_aspect_ratios", "data.bucket_frames", "data.fps", "data.windows", "data.num_windows",
        "data.encode", "data.vae_tiling", "data.decoder", "data.decode_timeout_s", "data.decode_memory_gb",
        "data.sync", "data.cost_tolerance", "data.cache_dir", "data.local_cache_dir", "data.local_cache_gb",
        "data.shard_gb", "data.num_workers",
        "lora.init_from", "lora.init_alpha", "full.ema_decay", "full.ema_device",
        "optimizer.lr", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "optimizer.max_grad_norm",
        "optimizer.schedule", "optimizer.warmup_steps", "optimizer.final_lr_ratio",
        "train.num_steps", "train.batch_size", "train.tokens_per_batch", "train.gradient_accumulation_steps",
        "train.activation_checkpointing", "train.activation_checkpointing_by_bucket", "train.memory_check",
        "train.deterministic", "train.timeout_s", "train.step_timeout_s", "train.max_bad_steps",
        "parallel.sequence_size",
        "eval.every", "eval.path", "eval.num_clips", "eval.num_timesteps",
        "sample.every", "sample.prompts", "sample.num_clips", "sample.num_steps", "sample.guidance",
        "sample.seed",
        "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every", "checkpoint.resume",
        "metrics.every", "metrics.progress_bar", "metrics.norms_every", "metrics.show_clips",
        "metrics.show_batches",
        "network.interface", "network.env",
    }  # fmt: skip
    assert set(KEYS) - changeable <= set(make_identity())


def test_a_key_that_an_older_version_did_not_save_had_its_default():
    older = {name: value for name, value in make_identity().items() if name != "lora.dropout"}
    check_identity(start(older), make_identity())
    with pytest.raises(UserError, match=r"lora.dropout was 0.0, now 0.5"):
        check_identity(start(older), make_identity("lora.dropout=0.5"))


def make_header(plan, step):
    return json.loads(json.dumps({"step": step, "plan": dataclasses.asdict(plan)}))


def test_the_plan_continues_in_any_layout():
    plan = Plan((10, 7), (1, 1), world_size=2, accumulation=2, seed=3)
    same = resume_plan(plan, make_header(plan, 3), "c")
    assert same == plan
    wider = resume_plan(dataclasses.replace(plan, world_size=4), make_header(plan, 3), "c")
    assert (wider.world_size, wider.origin.step, wider.coverage(3)) == (4, 3, plan.coverage(3))
    again = resume_plan(wider, make_header(wider, 5), "c")
    assert again == wider


def test_an_invalid_plan_is_an_error():
    plan = Plan((10,), (1,), world_size=2, accumulation=2, seed=3)
    for change in ({"sizes": [3, 4]}, {"origin": {"step": -1}}, {"unknown": 1}):
        header = make_header(plan, 3)
        header["plan"] |= change
        with pytest.raises(UserError, match=r"^c: .*plan"):
            resume_plan(plan, header, "c")
    for missing in ("sizes", "seed", "origin"):
        header = make_header(plan, 3)
        del header["plan"][missing]
        with pytest.raises(UserError, match=f"^c: .*{missing}"):
            resume_plan(plan, header, "c")
    with pytest.raises(UserError, match=r"^c: .*plan"):
        resume_plan(plan, {"step": 3}, "c")


def test_a_bug_in_the_plan_is_not_blamed_on_the_checkpoint(monkeypatch):
    plan = Plan((10,), (1,), world_size=2, accumulation=2, seed=3)

    def fail(_):
        raise TypeError("planted")

    monkeypatch.setattr(Plan, "_check_origin", fail)
    with pytest.raises(TypeError, match="planted"):
        resume_plan(plan, make_header(plan, 3), "c")
