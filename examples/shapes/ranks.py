"""Training on several processes of one machine, with one thread each: small tensors gain nothing from more threads."""

import os
import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def start(function: Callable[..., None], num_ranks: int, *arguments) -> None:
    """Run `function(rank, *arguments)` on `num_ranks` connected processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    os.environ.setdefault("MASTER_PORT", "29617")
    multiprocessing.spawn(_run, (function, num_ranks, arguments), nprocs=num_ranks)


def _run(rank: int, function: Callable[..., None], num_ranks: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    function(rank, *arguments)
    dist.destroy_process_group()


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


class Log:
    """Prints lines with the seconds since the start, on rank 0."""

    def __init__(self, rank: int):
        self.rank, self.started = rank, time.monotonic()

    def __call__(self, text: str) -> None:
        if self.rank == 0:
            cpu = time.process_time()
            print(f"{time.monotonic() - self.started:6.0f} s ({cpu:.0f} s of this core)  {text}", flush=True)
