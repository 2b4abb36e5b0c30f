"""The evaluation loss: its samples, its reproducibility, and its cost."""

import dataclasses
import functools
import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cogds.train.evaluation
from cogds.cli import call
from cogds.config.loading import replace
from cogds.distributed.world import World
from cogds.encode.encoder import encode_dataset
from cogds.evaluate import loss_table
from cogds.metrics.jsonl import first_evaluation, metrics_line
from cogds.model.evaluation_mode import evaluation_mode
from cogds.model.load import find_model, load_transformer
from cogds.model.lora.adapter import export, inject
from cogds.train.callbacks import TrainContext
from cogds.train.evaluation import (
    MAX_SHARE,
    describe_cost,
    describe_losses,
    eval_points,
    make_eval_batches,
    make_evaluation,
    make_evaluation_callback,
    mean_losses,
    midpoints,
    schedule_rounds,
    share_of_training,
)
from cogds.train.run import Run
from cogds.train.step import load_step_builder
from cogds.train.tuning import BucketExecution, Execution
from tests.drawn import draw_clips
from tests.jobs import ALONE, make_job

# -------------------------------------------------------------------------------------------------- batches and rounds


def test_timesteps_are_the_midpoints_of_equal_parts():
    assert midpoints(9, 1000) == [55, 166, 277, 388, 500, 611, 722, 833, 944]
    assert midpoints(1, 1000) == [500]


SIZES = st.lists(st.integers(1, 5), min_size=4, max_size=4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 9), SIZES, st.integers(1, 9))
def test_every_sample_is_evaluated_and_every_rank_has_a_batch_in_every_round(buckets, num_timesteps, sizes, num_ranks):
    batches = make_eval_batches(buckets, num_timesteps, sizes)
    samples = Counter(sample for batch in batches for sample in batch.samples)
    assert samples == Counter((clip, number) for clip in range(len(buckets)) for number in range(num_timesteps))
    for batch in batches:
        assert 1 <= len(batch.samples) <= sizes[batch.bucket]
        assert {buckets[clip] for clip, _ in batch.samples} == {batch.bucket}
    rounds = schedule_rounds(batches, [1.0, 9.0, 4.0, 2.0], num_ranks)
    assert all(len(batches_of_round) == num_ranks for batches_of_round in rounds)
    assert len(rounds) == -(-len(batches) // num_ranks)
    assert {id(batch) for batches_of_round in rounds for batch in batches_of_round} == {id(batch) for batch in batches}


def test_the_batches_of_a_round_cost_about_the_same():
    batches = make_eval_batches([0, 1, 0, 1], 2, [1, 1])
    rounds = schedule_rounds(batches, [1.0, 100.0], 2)
    assert [[batch.bucket for batch in batches_of_round] for batches_of_round in rounds] == [[1, 1]] * 2 + [[0, 0]] * 2


def test_means_are_over_clips_and_timesteps_and_skip_missing_losses():
    clips = [SimpleNamespace(shape=shape) for shape in ("a", "b", "a")]
    losses = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 5.0, (1, 1): 7.0}
    assert mean_losses(clips, 2, eval_points([250, 750]), losses) == {
        "eval/loss": 4.0, "eval/loss/t=250": 3.0, "eval/loss/t=750": 5.0, "eval/loss/bucket=a": 2.0,
        "eval/loss/bucket=b": 6.0,
    }  # fmt: skip
    assert mean_losses(clips, 0, eval_points([50, 750]), {(2, 0): 1.0, (2, 1): 2.0}) == {
        "eval/train_loss": 1.5, "eval/train_loss/t=050": 1.0, "eval/train_loss/t=750": 2.0,
        "eval/train_loss/bucket=a": 1.5,
    }  # fmt: skip


def test_losses_by_mode_are_beside_the_means():
    points, clips = eval_points([250, 750], ("first", "prefix")), [SimpleNamespace(shape="a")]
    assert mean_losses(clips, 1, points, {(0, 0): 1.0, (0, 1): 2.0, (0, 2): 3.0, (0, 3): 6.0}) == {
        "eval/loss": 3.0, "eval/loss/t=250": 2.0, "eval/loss/t=750": 4.0, "eval/loss/bucket=a": 3.0,
        "eval/loss/mode=first": 1.5, "eval/loss/mode=prefix": 4.5,
    }  # fmt: skip
    assert "eval/loss/mode=last" in mean_losses(clips, 1, eval_points([250], ("last",)), {(0, 0): 1.0})


# ------------------------------------------------------------------------------------------------------ on a tiny model


@pytest.fixture(scope="module")
def overrides(tiny_model, tmp_path_factory):
    """Overrides of all runs in this file."""
    folder = tmp_path_factory.mktemp("evaluated")
    draw_clips(folder / "clips")
    return [
        f"model.path={tiny_model}", f"data.path={folder / 'clips'}", f"data.cache_dir={folder / 'cache'}",
        "data.buckets=[9x32x48, 9x48x32, 1x32x32]", "data.num_workers=0", "train.precision=fp32", "eval.held_out=0.3",
        "eval.num_timesteps=3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def prepare(overrides):
    """`prepare(*words, world)`: a job, its data, step builder and evaluation, shared by all tests."""

    @functools.cache
    def prepare(*words, world=ALONE):
        job = make_job(*overrides, *words)
        data = encode_dataset(job)
        job = dataclasses.replace(job, world=world, num_ranks=world.size)
        builder = load_step_builder(
            job.model, job.cfg.conditioning, data.empty_caption_states, torch.float32, ALONE.device,
            job.condition_settings,
        )  # fmt: skip
        evaluation = make_evaluation(job, data, builder, job.batch_sizes)
        return SimpleNamespace(job=job, data=data, builder=builder, evaluation=evaluation)

    return prepare


@pytest.fixture(scope="module")
def forward(tiny_model):
    transformer = load_transformer(find_model(str(tiny_model)), torch.float32)
    return lambda inputs: transformer(**inputs)[0]


def test_two_evaluations_of_the_same_weights_are_identical(prepare, forward):
    prepared = prepare()
    scalars = prepared.evaluation.scalars(forward)
    assert {"eval/loss", "eval/train_loss", "eval/loss/t=166", "eval/train_loss/bucket=9x32x48"} <= set(scalars)
    torch.manual_seed(5)
    assert prepared.evaluation.scalars(forward) == scalars
    again = make_evaluation(prepared.job, prepared.data, prepared.builder, prepared.job.batch_sizes)
    assert again.scalars(forward) == scalars
    other = prepare("seed=1").evaluation.scalars(forward)
    assert other["eval/loss"] != scalars["eval/loss"]
    assert other["eval/loss"] == pytest.approx(scalars["eval/loss"], rel=0.05)


@pytest.mark.slow
def test_the_loss_is_the_same_on_any_number_of_ranks(prepare, forward, monkeypatch):
    """The ranks are evaluated one after another. The last one receives what all have gathered."""
    alone = prepare().evaluation.scalars(forward)
    for size, sequence_size in ((2, 1), (5, 1), (2, 2)):
        gathered = []
        monkeypatch.setattr(
            cogds.train.evaluation, "all_gather", lambda _, value, values=gathered: values.append(value) or values
        )
        num_passes = set()
        for rank in range(size):
            evaluation = prepare(world=World(rank, size, 0, 1, sequence_size)).evaluation
            num_passes.add(len(evaluation.rounds))
            scalars = evaluation.scalars(forward)
        assert scalars == alone
        assert len(num_passes) == 1


def test_a_loss_does_not_depend_on_the_other_clips_or_on_the_batch(prepare, forward):
    evaluation = prepare().evaluation
    losses = evaluation.losses(forward)
    for index in (0, len(evaluation.clips) - 1):
        clip = evaluation.clips[index]
        rounds = schedule_rounds(make_eval_batches([clip.bucket], 3, (1,) * 3), (1.0,) * 3, 1)
        alone = dataclasses.replace(evaluation, clips=(clip,), rounds=rounds).losses(forward)
        assert alone == {(0, number): losses[index, number] for number in range(3)}
    batched = prepare("train.batch_size=4").evaluation
    assert len(batched.rounds) < len(evaluation.rounds)
    assert batched.losses(forward) == pytest.approx(losses, rel=1e-5)


def test_nothing_is_dropped_and_no_noise_is_added_to_the_image(prepare, forward):
    changes = {"image_dropout": 1, "caption_dropout": 1, "image_noise_log_mean": 3}
    prepared = prepare(*(f"conditioning.{name}={value}" for name, value in changes.items()))
    assert prepared.evaluation.scalars(forward) == prepare().evaluation.scalars(forward)
    assert prepared.builder.conditioning.image_noise  # still on in training


def test_every_clip_is_evaluated_in_every_mode(prepare, forward):
    """All modes share the noise, so `first` has the same losses beside `last` as beside `first_last`."""
    buckets = "data.buckets=[9x32x48, 9x48x32]"
    words = ("conditioning.modes={first: 0.9, last: 0.1, none: 0}", buckets)
    alone, mixed = prepare(buckets).evaluation, prepare(*words).evaluation
    other = prepare("conditioning.modes={first: 0.5, first_last: 0.5}", buckets).evaluation
    losses, other_losses = mixed.losses(forward), other.losses(forward)
    first = [(clip, number) for clip, number in losses if number < 3]
    assert len(losses) == 2 * len(first) == 2 * len(alone.losses(forward))
    assert {key: losses[key] for key in first} == pytest.approx({key: other_losses[key] for key in first}, rel=1e-5)
    assert all(losses[clip, number + 3] != losses[clip, number] for clip, number in first)
    assert all(losses[clip, number + 3] != other_losses[clip, number + 3] for clip, number in first)
    assert "2 condition modes" in str(mixed)
    assert "mode" not in str(alone)
    run = make_run(prepare(*words), "full")
    assert share_of_training(run, mixed, 4) == pytest.approx(2 * share_of_training(run, alone, 4), rel=0.01)


def test_a_clip_that_cannot_be_read_is_left_out_with_a_warning(prepare, forward, caplog):
    evaluation = prepare().evaluation
    complete = evaluation.scalars(forward)
    unreadable = [dataclasses.replace(clip, clip_key="0" * 32) for clip in evaluation.clips]
    scalars = dataclasses.replace(evaluation, clips=(unreadable[0], *evaluation.clips[1:])).scalars(forward)
    (warning,) = caplog.records
    assert unreadable[0].path in warning.getMessage()
    assert scalars["eval/loss"] != complete["eval/loss"]
    assert scalars["eval/train_loss"] == complete["eval/train_loss"]
    assert dataclasses.replace(evaluation, clips=tuple(unreadable)).scalars(forward) == {}


@pytest.mark.parametrize("name", ["read_encoded", "collate"])
@pytest.mark.parametrize("error", [TypeError("planted"), KeyError("planted"), RuntimeError("planted")])
def test_a_bug_is_not_blamed_on_a_clip(prepare, forward, monkeypatch, error, name):
    def fail(*_):
        raise error

    evaluation = prepare().evaluation
    monkeypatch.setattr(f"cogds.train.evaluation.{name}", fail)
    with pytest.raises(type(error), match="planted"):
        evaluation.scalars(forward)


@pytest.mark.parametrize("fails_always", [False, True])
def test_clips_whose_inputs_fail_are_left_out_without_changing_the_forward_passes(
    prepare, forward, caplog, monkeypatch, fails_always
):
    """If the VAE runs out of memory on one rank, the other ranks still need its forward passes, in the same shapes."""
    evaluation, shapes = prepare("train.batch_size=2").evaluation, []
    build = evaluation.builder.build

    def fail(batch, shape, draws):
        if fails_always or shape.frames == 1:
            raise torch.OutOfMemoryError  # without a message
        return build(batch, shape, draws)

    def record(inputs):
        shapes.append([inputs[name].shape for name in ("hidden_states", "encoder_hidden_states", "timestep")])
        return forward(inputs)

    complete = evaluation.scalars(record)
    monkeypatch.setattr(evaluation.builder, "build", fail)
    scalars = evaluation.scalars(record)
    assert shapes[: len(shapes) // 2] == shapes[len(shapes) // 2 :]
    assert "OutOfMemoryError" in caplog.text
    if fails_always:
        assert scalars == {}
    else:
        left = {name for name in complete if name.endswith(("32x48", "48x32"))}
        assert {name: scalars[name] for name in left} == {name: complete[name] for name in left}
        assert not any("1x32x32" in name for name in scalars)


# ------------------------------------------------------------------------------------------------------ during training


class Recorder:
    """A monitor that keeps the scalars of each step."""

    def __init__(self):
        self.scalars = {}

    def add_scalars(self, step, scalars):
        self.scalars[step] = scalars


def make_run(prepared, mode="none", **changes):
    parts = tuple(BucketExecution(mode, None) for _ in prepared.job.buckets)
    job = dataclasses.replace(prepared.job, **changes)
    return Run(job, prepared.data, job.plan(prepared.data.mixture), Execution("torch", False, parts), first_step=0)


def make_engine(module):
    return SimpleNamespace(module=module, torch_autocast_enabled=lambda: False, torch_autocast_dtype=lambda: None)


def test_the_trained_transformer_is_not_changed(prepare, forward):
    prepared, monitor, watched = prepare(), Recorder(), []
    transformer = load_transformer(prepared.job.model, torch.float32)
    inject(transformer, 4, 8, 0.5, ("to_q",), seed=0)  # if dropout stayed on, it would change the loss
    transformer.train()
    transformer.detect_dropout()
    transformer.set_checkpointing("full")
    callback = make_evaluation_callback(
        TrainContext(
            make_run(prepared),
            make_engine(transformer),
            prepared.builder,
            monitor,
            lambda describe: watched.append(describe()),
        )
    )
    assert callback.every == 500
    assert (callback.at_start, callback.on_stop) == (True, False)
    before, modes = torch.get_rng_state(), [module.training for module in transformer.modules()]
    callback.run(7)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in transformer.modules()] == modes
    assert {block.checkpointing for block in transformer.transformer_blocks} == {"full"}
    assert all(parameter.grad is None for parameter in transformer.parameters())
    assert monitor.scalars[7].pop("eval/seconds") > 0
    assert monitor.scalars[7] == prepared.evaluation.scalars(forward)  # B is zero, so this is the base model
    assert f"1 of {len(prepared.evaluation.rounds)}" in watched[0]


def test_a_run_that_is_asked_to_stop_records_no_loss(prepare):
    prepared, monitor = prepare(), Recorder()
    stops = iter([False, False, True])
    engine = make_engine(load_transformer(prepared.job.model, torch.float32))
    context = TrainContext(make_run(prepared), engine, prepared.builder, monitor, is_stopping=lambda: next(stops))
    make_evaluation_callback(context).run(3)
    assert monitor.scalars == {}
    assert list(stops) == []


def test_without_eval_every_there_is_no_callback(prepare):
    context = TrainContext(make_run(prepare("eval.every=null")), None, None, None)
    assert make_evaluation_callback(context) is None


@pytest.mark.slow
def test_evaluating_compiled_blocks_compiles_once_for_all_buckets(prepare, forward):
    prepared, graphs = prepare("train.batch_size=2"), []
    torch._dynamo.reset()
    transformer = load_transformer(prepared.job.model, torch.float32)
    transformer.compile_blocks(lambda graph, _: graphs.append(graph) or graph.forward)
    with evaluation_mode(transformer, ALONE.device):
        scalars = prepared.evaluation.scalars(lambda inputs: transformer(**inputs)[0])
    torch._dynamo.reset()
    assert len(prepared.evaluation.rounds) > 6
    assert 1 <= len(graphs) <= 2  # for single clips and for batches
    assert scalars == pytest.approx(prepared.evaluation.scalars(forward), rel=1e-4)


def test_the_cost_is_estimated_and_the_warning_names_a_setting_that_suffices(prepare):
    prepared = prepare("eval.num_clips=1")
    evaluation = prepared.evaluation
    long = replace(prepared.job.cfg, {"eval.every": 100_000, "train.num_steps": 1_000_000})
    run = make_run(prepared, "full", cfg=long)
    line, warning = describe_cost(run, evaluation, 100_000)
    assert warning == ""
    assert all(part in line for part in ("1 held-out and 1 trained clips", "3 timesteps", "100,000 steps", "<1%"))
    # 6 forward passes against 4 steps, each of a forward pass, its recomputation and a backward pass.
    share = share_of_training(run, evaluation, 4)
    assert 6 / (4 * 3.5) * 0.7 < share < 6 / (4 * 3) * 1.4
    line, warning = describe_cost(run, evaluation, 4)
    assert re.search(r"\b\d+% of the training time", line)
    needed = int(warning.partition("eval.every=")[2].partition(" ")[0])
    assert share_of_training(run, evaluation, needed) <= MAX_SHARE


def test_an_evaluation_that_takes_longer_than_training_says_what_to_change(prepare):
    prepared = prepare("eval.num_clips=1")
    trial = replace(prepared.job.cfg, {"train.num_steps": 12})
    line, warning = describe_cost(make_run(prepared, "full", cfg=trial), prepared.evaluation, 1)
    assert warning == ""
    assert "%" not in line
    assert all(key in line for key in ("eval.every", "eval.num_clips", "eval.num_timesteps"))


def test_the_cost_is_relative_to_the_mean_step_of_all_ranks(prepare):
    one_rank, two_ranks = (
        share_of_training(make_run(prepared), prepared.evaluation, 10)
        for prepared in (prepare(), prepare(world=World(0, 2, 0, 2)))
    )
    assert two_ranks == pytest.approx(one_rank / 2, rel=0.2)


def test_each_evaluation_is_compared_with_the_first_of_the_run(tmp_path):
    base = {"eval/loss": 1.51291, "eval/train_loss": 1.4}
    now = {"eval/loss": 1.50899, "eval/train_loss": 1.3}
    assert describe_losses(base, base, "before step 1") == "eval 1.5129 before step 1"
    assert describe_losses(base, now, "after step 5") == "eval 1.5129 -> 1.5090 after step 5"
    assert describe_losses(base, {"eval/train_loss": 1.3}, "after step 5").startswith("eval 1.4000 -> 1.3000 after")
    file = tmp_path / "metrics.jsonl"
    assert first_evaluation(file) == {}
    notes = [{"sample/seconds": 3.0}, base, {"train/loss": 1.0}, now]
    file.write_bytes(b"".join(metrics_line(step, scalars) for step, scalars in enumerate(notes)))
    assert first_evaluation(file) == base


def test_the_losses_of_the_base_model_and_the_lora_are_printed_side_by_side():
    base = {"eval/loss": 1.5129, "eval/loss/t=166": 2.0, "eval/train_loss": 1.0, "eval/train_loss/bucket=9x64x64": 12.0}
    lora = {tag: loss * 0.99 for tag, loss in base.items()}
    assert loss_table({"base": base, "LoRA": lora}) == [
        "loss                 base     LoRA  change",
        "held-out clips     1.5129   1.4978   -1.0%",
        "  timestep 166     2.0000   1.9800   -1.0%",
        "trained clips      1.0000   0.9900   -1.0%",
        "  bucket 9x64x64  12.0000  11.8800   -1.0%",
    ]
    assert [line.split() for line in loss_table({"base": base})][1] == ["held-out", "clips", "1.5129"]


@pytest.fixture
def command(overrides, tmp_path, capsys):
    """`command(*words)`: the losses that the evaluate verb prints."""
    (tmp_path / "run.yaml").write_text("output_dir: unused\n")

    def run(*words):
        call("evaluate", [*overrides, "--config", str(tmp_path / "run.yaml"), "--json", *words])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        return json.loads(line)["LoRA" if "--lora" in words else "base"]

    return run


@pytest.mark.slow
def test_the_evaluate_verb_prints_the_same_losses(prepare, forward, command):
    assert command() == pytest.approx(prepare().evaluation.scalars(forward), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recorded, configured, used", [
    ("scaled", "pipeline", "scaled"), ("pipeline", "scaled", "pipeline"), (None, "scaled", "scaled"),
])  # fmt: skip
def test_the_evaluate_verb_scales_the_first_frame_as_the_lora_was_trained(
    prepare, forward, command, tiny_model, tmp_path, recorded, configured, used
):
    """The config's value counts only if the LoRA does not record one."""
    few, key = "eval.num_clips=1", "conditioning.image_latents"
    expected = {
        convention: prepare(few, f"{key}={convention}").evaluation.scalars(forward)
        for convention in ("pipeline", "scaled")
    }
    assert expected["scaled"]["eval/loss"] != pytest.approx(expected["pipeline"]["eval/loss"], rel=1e-4)
    transformer = load_transformer(find_model(str(tiny_model)), torch.float32)
    inject(transformer, 4, 8, 0.0, ("to_q",), seed=0)  # B is zero, so this is the base model
    weights = {name: weight.detach() for name, weight in transformer.named_parameters() if weight.requires_grad}
    export(tmp_path, transformer, weights, {"image_latents": recorded} if recorded else {})
    assert command(few, f"{key}={configured}", "--lora", str(tmp_path)) == pytest.approx(expected[used], rel=1e-5)


@pytest.mark.slow
def test_the_evaluate_verb_evaluates_all_clips_with_all(prepare, forward, command):
    all_clips, one_clip = (prepare(f"eval.num_clips={num}").evaluation.scalars(forward) for num in (100, 1))
    assert one_clip["eval/loss"] != pytest.approx(all_clips["eval/loss"], rel=1e-4)
    assert command("eval.num_clips=1") == pytest.approx(one_clip, rel=1e-5)
    assert command("eval.num_clips=1", "--all") == pytest.approx(all_clips, rel=1e-5)
