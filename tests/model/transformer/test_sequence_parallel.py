"""Sequence parallelism against a single rank: outputs and gradients.

The ranks are threads that exchange tensors in a shared list. tests/dist/test_sequence.py uses processes and DeepSpeed.
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig

from cogds.errors import UserError
from cogds.model.transformer import sequence_parallel as sequence
from cogds.model.transformer.forward import Transformer
from cogds.model.transformer.sequence_parallel import SequenceGroup, check_sequence, share_sizes, ulysses_attention
from tests.model.transformer.test_forward import (
    CHECKPOINTING_MODES,
    FAMILY,
    V15,
    all_linear,
    at_size,
    gradients,
    inputs,
    largest_distance,
)

ODD = (2, 6, 10)  # 15 video tokens, and 5 of text
PORTRAIT = (4, 10, 2)


class Threads:
    """Ranks as threads, with an all_to_all_single between them. change: modifies the rows before they are sent."""

    def __init__(self, size, change=lambda rows: rows):
        self.size, self.change = size, change
        self.local, self.barrier, self.boxes = threading.local(), threading.Barrier(size, timeout=60), [()] * size

    def all_to_all_single(self, out, rows, receive_counts, send_counts, group):  # noqa: ARG002
        rank = self.local.rank
        self.boxes[rank] = self.change(rows).split(send_counts)
        self.barrier.wait()
        received = [box[rank] for box in self.boxes]
        assert [len(part) for part in received] == receive_counts
        out.copy_(torch.cat(received))
        self.barrier.wait()

    def run(self, function):
        """Call function(group) on every rank."""

        def on(rank):
            self.local.rank = rank
            try:
                return function(SequenceGroup("threads", self.size, rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(on, range(self.size)))


@pytest.fixture
def threads(monkeypatch):
    def make(size, **options):
        ranks = Threads(size, **options)
        monkeypatch.setattr(sequence.dist, "all_to_all_single", ranks.all_to_all_single)
        monkeypatch.setattr(sequence, "_resolve_process_group", lambda name: name)
        return ranks

    return make


def model(config, **lora):
    torch.manual_seed(0)
    transformer = Transformer(**config).requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=all_linear(transformer), **lora))
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return transformer.train()


def outcome(transformer, batch, target):
    loss = (transformer(**batch)[0] - target).square().mean()
    loss.backward()
    return loss.item(), gradients(transformer)


def compare(threads, transformer, batch, checkpointing="none"):
    """Loss and gradients of a single rank, and of ranks that share the clip, averaged as in data parallelism."""
    target = torch.randn_like(batch["hidden_states"][:, :, :4])
    alone = outcome(copy.deepcopy(transformer), batch, target)

    def on_rank(group):
        shared = copy.deepcopy(transformer)
        shared.share_sequence(group)
        shared.set_checkpointing(checkpointing)
        return outcome(shared, batch, target)

    together = threads.run(on_rank)
    mean = {name: torch.stack([grads[name] for _, grads in together]).mean(0) for name in together[0][1]}
    return alone, ([loss for loss, _ in together], mean)


def compiled(transformer, function):
    """The result of function with compiled blocks, and the number of compiled graphs."""
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager_decomp_partition")(graph, example)

    torch._dynamo.reset()
    transformer.compile_blocks(backend=count)
    return list(function()), len(graphs)


@pytest.mark.parametrize("latents", [ODD, PORTRAIT], ids=["odd", "portrait"])
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("size", [2, 4])
def test_a_shared_clip_equals_one_rank(threads, size, name, latents):
    config = at_size(FAMILY[name], latents)
    batch = inputs(config, latents=latents)
    (loss, grads), (losses, mean) = compare(threads(size), model(config), batch)
    assert losses == pytest.approx([loss] * size, rel=1e-6)
    assert losses == [losses[0]] * size  # exactly equal, so that the ranks of a group agree if a loss is finite
    assert largest_distance(mean, grads) < 1e-5


@pytest.mark.parametrize("checkpointing", CHECKPOINTING_MODES[1:])
def test_checkpointing_with_a_shared_clip(threads, checkpointing):
    (loss, grads), (losses, mean) = compare(threads(2), model(V15), inputs(V15, latents=ODD), checkpointing)
    assert losses == pytest.approx([loss] * 2, rel=1e-6)
    assert largest_distance(mean, grads) < 1e-5


def test_fewer_text_tokens_than_ranks(threads):
    batch = inputs(V15, latents=ODD)
    batch["encoder_hidden_states"] = batch["encoder_hidden_states"][:, :3]
    (loss, grads), (losses, mean) = compare(threads(4), model(V15 | {"max_text_seq_length": 3}), batch)
    assert losses == pytest.approx([loss] * 4, rel=1e-6)
    assert largest_distance(mean, grads) < 1e-5


def test_a_lost_token_is_detected(threads):
    def clear_first(rows):
        rows = rows.clone()
        rows[0] = 0
        return rows

    (loss, grads), (losses, mean) = compare(threads(2, change=clear_first), model(V15), inputs(V15, latents=ODD))
    assert losses[0] != pytest.approx(loss, rel=1e-6)
    assert largest_distance(mean, grads) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exchange_restores_heads_and_tokens(threads, dtype):
    whole = torch.randn(3, 2, 7, 4, 8, dtype=dtype)  # query, key and value [B, S, H, d]
    counts = share_sizes(7, 2)

    def on_rank(group):
        query, key, value = whole.split(counts, 2)[group.rank]
        return ulysses_attention(query, key, value, "torch", counts, group.name)

    together = torch.cat(threads(2).run(on_rank), dim=1)
    alone = torch.nn.functional.scaled_dot_product_attention(*whole.transpose(2, 3)).transpose(1, 2)
    torch.testing.assert_close(together, alone)


@pytest.mark.slow
def test_compiled_blocks_with_a_shared_clip(monkeypatch):
    """One rank of two, whose partner returns the rows that it receives. The exchange is part of the graph."""
    order = []

    def echo(out, rows, *_args, group):  # noqa: ARG001
        order.append(tuple(rows.shape))
        out.copy_(rows[torch.arange(len(out)) % len(rows)])

    monkeypatch.setattr(sequence.dist, "all_to_all_single", echo)
    monkeypatch.setattr(sequence, "_resolve_process_group", lambda name: name)
    ours = model(V15 | {"num_layers": 1})
    ours.share_sequence(SequenceGroup("echo", 2, 0))
    ours.set_checkpointing("selective")
    batches = [inputs(V15, 1, latents) for latents in (ODD, PORTRAIT, (4, 4, 6))]

    def outcomes():
        for batch in batches:
            ours.zero_grad()
            yield outcome(ours, batch, 0.0)

    plain = list(outcomes())
    plain_order, order[:] = list(order), []
    results, num_graphs = compiled(ours, outcomes)
    assert order == plain_order
    assert num_graphs <= 2  # the counts are integers, not tensor sizes, so a change may compile a second graph
    for (loss, grads), (expected, expected_grads) in zip(results, plain):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert largest_distance(grads, expected_grads) < 1e-5


@pytest.mark.parametrize("num_tokens, size, expected", [(5, 2, (3, 2)), (4, 4, (1,) * 4), (3, 4, (1, 1, 1, 0))])
def test_shares_differ_by_at_most_one(num_tokens, size, expected):
    assert share_sizes(num_tokens, size) == expected
    assert tuple(len(part) for part in torch.arange(num_tokens).tensor_split(size)) == expected


@pytest.mark.parametrize(
    "size, num_ranks, num_heads, possible",
    [(3, 6, 8, "1 or 2"), (4, 6, 48, "1 or 2 or 3 or 6"), (5, 10, 48, "1 or 2"), (2, 1, 48, "1")],
)
def test_sizes_that_do_not_divide_are_refused(size, num_ranks, num_heads, possible):
    with pytest.raises(UserError, match=rf"parallel\.sequence_size: {size} .*\b{possible}, "):
        check_sequence(size, num_ranks, num_heads)
    for allowed in map(int, possible.split(" or ")):
        check_sequence(allowed, num_ranks, num_heads)
