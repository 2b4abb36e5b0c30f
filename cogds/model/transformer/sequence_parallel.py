"""One clip over several ranks, as DeepSpeed's Ulysses does it: outside of attention a rank has a share of the tokens,
inside it a share of the heads.

One exchange before attention makes all tokens of some heads of some tokens of all heads, and one after it turns that
back. DeepSpeed's `DistributedAttention` does the same for shares of one size, with an exchange each for query, key and
value; here the shares differ as the tokens need it, so nothing is padded, and the three travel together.

Every rank of a group computes the whole loss, but its gradient reaches a parameter only by way of the rank's own
tokens. `gather` multiplies it by the group's size: the mean over all ranks, which is what data parallelism takes
whatever its stage, is then the sum over each group and the mean over groups. What is trained must stand before it.
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
    """The ranks that share a clip. name: torch's, of their process group. rank: this one's place among `size`."""

    name: str
    size: int
    rank: int


def check_sequence(size: int, num_ranks: int, num_heads: int) -> None:
    """Raise UserError where so many ranks cannot share a clip."""
    possible = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0 and num_heads % n == 0]
    if size not in possible:
        raise UserError(
            f"parallel.sequence_size is {size}, but a clip is shared by as many ranks as divide both the number of "
            f"ranks, "
            f"{num_ranks}, and the model's attention heads, {num_heads}: set it to {' or '.join(map(str, possible))}, "
            "or start another number of ranks"
        )


def shares(num_tokens: int, size: int) -> tuple[int, ...]:
    """Tokens of each rank, in order; they differ by one at most."""
    return tuple(num_tokens // size + (rank < num_tokens % size) for rank in range(size))


def own_share(tokens: torch.Tensor, group: SequenceGroup, dim: int) -> torch.Tensor:
    """This rank's part of what stands along `dim`."""
    return tokens.tensor_split(group.size, dim)[group.rank]


def attend_together(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: str, counts: Sequence[int], group: str
) -> torch.Tensor:
    """`attention.attend` over the tokens of a whole group: query, key, value and result [B, own tokens, H, d].

    counts: tokens of each rank. Which of them come first does not matter to attention. Collective.
    """
    size, own = len(counts), query.shape[1]
    by_rank = [one.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4) for one in (query, key, value)]
    rows = exchange(torch.stack(by_rank, 2).flatten(0, 1), (own,) * size, counts, group)  # [S, 3, B, H / size, d]
    query, key, value = (one.transpose(0, 1) for one in rows.unbind(1))
    attended = attend(query, key, value, kernel).transpose(0, 1)
    # Where it is recomputed with attention's output kept, nothing else says which exchange comes first.
    back = exchange(attended, counts, (own,) * size, group, rows)
    return back.unflatten(0, (size, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)


def gather(x: torch.Tensor, counts: Sequence[int], group: SequenceGroup) -> torch.Tensor:
    """x [B, own tokens, D] of every rank of the group, in order: [B, sum(counts), D] on each of them. Collective.

    Backward gives a rank its own tokens' gradient, times the group's size.
    """
    return _Gather.apply(x, tuple(counts), group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: tuple[int, ...], group: SequenceGroup) -> torch.Tensor:
        ctx.counts, ctx.group = counts, group
        everyone = x.transpose(0, 1).repeat(group.size, 1, 1)
        return exchange(everyone, (x.shape[1],) * group.size, counts, group.name).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.split(ctx.counts, 1)[ctx.group.rank] * ctx.group.size, None, None


# An operator of torch, so that `torch.compile` takes it as it is and knows its derivative.
@torch.library.custom_op("cogds::exchange", mutates_args=())
def exchange(
    rows: torch.Tensor,
    given: Sequence[int],
    taken: Sequence[int],
    group: str,
    after: torch.Tensor | None = None,  # noqa: ARG001
) -> torch.Tensor:
    """Give rank i of the group the next given[i] rows, take taken[i] from it: [sum(given), ...] -> [sum(taken), ...].

    group: the process group's name. after: made before; ranks compile for themselves, and must not differ in the order
    of their exchanges. Collective, and its own derivative.
    """
    out = rows.new_empty(sum(taken), *rows.shape[1:])
    process_group = _resolve_process_group(cast(Any, group))
    dist.all_to_all_single(out, rows.contiguous(), list(taken), list(given), group=process_group)
    return out


@exchange.register_fake
def _(rows: torch.Tensor, _given: Any, taken: Sequence[int], _group: str, _after: Any = None) -> torch.Tensor:
    return rows.new_empty(sum(taken), *rows.shape[1:])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    _, ctx.given, ctx.taken, ctx.group, _ = inputs


def _exchange_back(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    return exchange(gradient, ctx.taken, ctx.given, ctx.group), None, None, None, None


exchange.register_autograd(_exchange_back, setup_context=_remember)
