"""Batch sizes, bad samples and errors if `parallel.sequence_size` ranks share a clip."""

import pytest

from cogds.cli import call
from cogds.data.loading.dataset import BadClip
from cogds.distributed.world import World
from cogds.errors import UserError
from cogds.train import bad_samples
from tests.config.test_deepspeed import ZERO2, refused, resolve


def test_a_batch_counts_clips_and_not_ranks():
    ds_config = {**ZERO2, "train_batch_size": 6}
    out, cfg = resolve(ds_config, "train.batch_size=3", "parallel.sequence_size=2", world_size=4)
    assert cfg.parallel.sequence_size == 2
    assert "train_batch_size" not in out  # DeepSpeed computes it, counting every rank
    assert out["train_micro_batch_size_per_gpu"] == 3
    message = refused(ds_config, "train.batch_size=3", "parallel.sequence_size=4", world_size=4)
    assert 'x 1 groups of 4 ranks is 3. Set it to "auto", or gradient_accumulation_steps to 2' in message
    assert "parallel.sequence_size" in refused({**ZERO2, "sequence_parallel_size": 2})
    assert "communication_data_type" in refused({**ZERO2, "seq_parallel_communication_data_type": "fp32"})


@pytest.mark.parametrize("rank, shared", [(0, False), (1, True), (2, False), (3, True)])
def test_ranks_of_a_clip_must_read_the_same_files(tmp_path, monkeypatch, rank, shared):
    """Rank 0 reports the error, and so does every rank that has a file to name."""
    world, bad = World(rank, 4, 0, 4, sequence_size=2), [BadClip(7, "/a.mp4", "gone")] if rank == 2 else []
    samples = bad_samples.BadSamples(world, tmp_path, num_clips=100, max_share=0.1)
    monkeypatch.setattr(bad_samples, "disagreeing_data_ranks", lambda _world, _value: [1])
    with pytest.raises(UserError, match=r"^data\.path: ranks 2 to 3 ") as error:
        samples.add(bad)
    assert ("/a.mp4: gone" in str(error.value)) == bool(bad)
    assert error.value.shared == shared
    values = []
    monkeypatch.setattr(bad_samples, "disagreeing_data_ranks", lambda _world, value: values.append(value))
    for clips in ([], bad, []):
        samples.add(clips)
    assert values[0] == values[2]
    assert (values[0] != values[1]) == bool(bad)


def test_a_size_that_does_not_divide_the_ranks_is_refused_before_the_run_starts(tiny_model, tmp_path):
    settings = [
        f"model.path={tiny_model}",
        f"output_dir={tmp_path / 'out'}",
        f"data.path={tmp_path}",
        "parallel.sequence_size=2",
    ]
    with pytest.raises(UserError, match=r"^parallel\.sequence_size: 2 "):
        call("train", settings, starts_ranks=False)
    assert not (tmp_path / "out").exists()
