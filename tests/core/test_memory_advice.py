from cogds.core.geometry import ClipShape
from cogds.core.memory import OnTheFlyEncoding
from cogds.core.memory_advice import explain_shortfall, find_remedies
from tests.core.test_memory import ZERO2, ZERO2_OFFLOAD
from tests.published_model import FULL, published_memory


def arguments(model, shape, batch_size, gpu_bytes):
    return [remedy.arguments for remedy in find_remedies(model, shape, batch_size, gpu_bytes)]


def test_another_checkpointing_mode_comes_first():
    model = published_memory(zero=ZERO2, num_ranks=8)
    (remedy,) = find_remedies(model, FULL, 1, 80e9)
    assert (remedy.arguments, remedy.checkpointing) == ((), "selective")
    assert remedy.total_bytes == model.estimate(FULL, 1, "selective").total_bytes


def test_single_changes_then_pairs():
    single = arguments(published_memory(zero=ZERO2, num_ranks=8), FULL, 1, 16e9)
    assert all(len(remedy) == 1 for remedy in single)
    assert {
        "model.quantization=int8", "model.quantization=nf4", "--deepspeed zero3",
        "--deepspeed zero3_offload",
    } <= {remedy[0] for remedy in single}  # fmt: skip
    pairs = arguments(published_memory(zero=ZERO2), FULL, 4, 12e9)
    assert all(len(remedy) == 2 for remedy in pairs)
    assert ("train.batch_size=1 train.tokens_per_batch=null", "--deepspeed zero3_offload") in pairs
    long = arguments(published_memory(zero=ZERO2_OFFLOAD, num_ranks=2), ClipShape(161, 768, 1360), 1, 26e9)
    assert ("parallel.sequence_size=2",) in long


def test_every_remedy_fits():
    for gpu_bytes in (10e9, 12e9, 16e9, 24e9):
        for remedy in find_remedies(published_memory(zero=ZERO2, num_ranks=8), FULL, 2, gpu_bytes):
            assert remedy.total_bytes <= 0.92 * gpu_bytes


def test_quantized_weights_are_not_sharded():
    model = published_memory(zero=ZERO2, quantization="nf4", num_ranks=8)
    assert not any("zero3" in text for remedy in arguments(model, FULL, 1, 10e9) for text in remedy)
    # A pair of changes does not combine them either.
    pairs = arguments(published_memory(zero=ZERO2, num_ranks=8), FULL, 4, 13e9)
    assert len(pairs[0]) == 2
    assert not any("zero3" in str(pair) and "model.quantization" in str(pair) for pair in pairs)


def test_encoding_before_training_or_in_tiles_is_a_remedy():
    def remedies(tiled, gpu_bytes):
        on_the_fly = OnTheFlyEncoding(4_762_310_656, frozenset(tiled), 3)
        model = published_memory(zero=ZERO2_OFFLOAD, on_the_fly=on_the_fly)
        return [argument for (argument,) in arguments(model, FULL, 1, gpu_bytes)]

    assert "data.encode=cached" in remedies([FULL], 24e9)
    assert "data.vae_tiling=on" not in remedies([FULL], 24e9)
    assert {"data.encode=cached", "data.vae_tiling=on"} <= set(remedies([], 40e9))


def test_the_explanation_names_the_bucket_and_the_settings():
    model = published_memory(zero=ZERO2)
    assert explain_shortfall(model, FULL, 1, "full+offload", 24e9) == ""
    assert explain_shortfall(model, FULL, 1, "none", None) == ""
    text = explain_shortfall(model, FULL, 1, "none", 80e9)
    assert all(
        part in text for part in ("81x768x1360", "172.5 GB", "80.0 GB", "train.activation_checkpointing=selective")
    )
    assert find_remedies(model, FULL, 1, 4e9) == []
    assert explain_shortfall(model, FULL, 1, "full", 4e9)
