"""Sequence parallelism as in DeepSpeed Ulysses: several ranks share one clip.

Outside of attention, each rank has a share of the tokens with all heads. Inside, it has all tokens with a share of the
heads. One all-to-all before attention and one after it convert between the two. DeepSpeed's `DistributedAttention` does
the same for shares of equal size, with one all-to-all each for query, key and value. Here, shares may differ in size,
so nothing is padded, and query, key and value are sent together.

Every rank of a group computes the whole loss, but a parameter receives gradients only from the rank's own tokens.
`gather_tokens` multiplies gradients by the group's size. The mean over all ranks, which data parallelism computes in
every ZeRO stage, then equals the sum over each group, averaged over groups. Only parameters used before `gather_tokens`
can be trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from cogds.errors import UserError
from cogds.model.transformer.attention import attend


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a clip. name: of their process group in torch; rank: of this process within the group."""

    name: str
    size: int
    rank: int


def check_sequence(size: int, num_ranks: int, num_heads: int) -> None:
    """Raise UserError if `size` ranks cannot share a clip."""
    possible = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0 and num_heads % n == 0]
    if size not in possible:
        raise UserError(
            f"parallel.sequence_size: {size} does not divide both the number of ranks, {num_ranks}, and the model's "
            f"number of attention heads, {num_heads}. Set it to {' or '.join(map(str, possible))}, or change the "
            "number of ranks."
        )


def share_sizes(num_tokens: int, size: int) -> tuple[int, ...]:
    """Number of tokens on each rank. They differ by at most one."""
    return tuple(num_tokens // size + (rank < num_tokens % size) for rank in range(size))


def local_share(tokens: torch.Tensor, group: SequenceGroup, dim: int) -> torch.Tensor:
    """This rank's slice of a tensor along `dim`."""
    return tokens.tensor_split(group.size, dim)[group.rank]


def ulysses_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: str, counts: Sequence[int], group: str
) -> torch.Tensor:
    """`attention.attend` over the tokens of all ranks of a group. Collective.

    query, key, value and the result are [B, local tokens, H, d]. counts: number of tokens on each rank. The order of
    tokens does not matter to attention.
    """
    size, num_local = len(counts), query.shape[1]
    by_rank = [tensor.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4) for tensor in (query, key, value)]
    # [S, 3, B, H / size, d]
    rows = exchange(torch.stack(by_rank, 2).flatten(0, 1), (num_local,) * size, counts, group)
    query, key, value = (tensor.transpose(0, 1) for tensor in rows.unbind(1))
    attended = attend(query, key, value, kernel).transpose(0, 1)
    # `rows` orders the two exchanges. During recomputation with attention's output kept, nothing else would.
    local = exchange(attended, counts, (num_local,) * size, group, rows)
    return local.unflatten(0, (size, num_local)).permute(2, 1, 0, 3, 4).flatten(2, 3)


def gather_tokens(x: torch.Tensor, counts: Sequence[int], group: SequenceGroup) -> torch.Tensor:
    """Gather x [B, local tokens, D] from all ranks of the group, in order: [B, sum(counts), D]. Collective.

    The backward pass returns the gradient of the local tokens, multiplied by the group's size.
    """
    return _GatherTokens.apply(x, tuple(counts), group)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: tuple[int, ...], group: SequenceGroup) -> torch.Tensor:
        ctx.counts, ctx.group = counts, group
        copies = x.transpose(0, 1).repeat(group.size, 1, 1)
        return exchange(copies, (x.shape[1],) * group.size, counts, group.name).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.split(ctx.counts, 1)[ctx.group.rank] * ctx.group.size, None, None


# A custom operator, so that `torch.compile` does not trace into it and knows its derivative.
@torch.library.custom_op("cogds::exchange", mutates_args=())
def exchange(
    rows: torch.Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    group: str,
    after: torch.Tensor | None = None,  # noqa: ARG001
) -> torch.Tensor:
    """Exchange rows within a group: [sum(send_counts), ...] -> [sum(receive_counts), ...]. Collective.

    The backward pass is the opposite exchange.

    Args:
        rows: send_counts[0] rows for rank 0 of the group, then send_counts[1] for rank 1, and so on.
        group: name of the process group.
        after: a tensor that must be computed first. Every rank compiles separately, and all must exchange in the same
            order.
    """
    out = rows.new_empty(sum(receive_counts), *rows.shape[1:])
    process_group = _resolve_process_group(cast(Any, group))
    dist.all_to_all_single(out, rows.contiguous(), list(receive_counts), list(send_counts), group=process_group)
    return out


@exchange.register_fake
def _(rows: torch.Tensor, _send: Any, receive_counts: Sequence[int], _group: str, _after: Any = None) -> torch.Tensor:
    return rows.new_empty(sum(receive_counts), *rows.shape[1:])


def _save_counts(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    _, ctx.send_counts, ctx.receive_counts, ctx.group, _ = inputs


def _exchange_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    return exchange(gradient, ctx.receive_counts, ctx.send_counts, ctx.group), None, None, None, None


exchange.register_autograd(_exchange_backward, setup_context=_save_counts)
