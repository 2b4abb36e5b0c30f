"""Muon (Jordan et al. 2024) for matrices and convolutions, Adam for everything else.

torch.optim.Muon takes matrices only and computes in bfloat16, which CPUs emulate.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon:
    """named_parameters: all parameters. is_hidden: those that Muon updates; the rest are Adam's."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        is_hidden: Callable[[str, torch.nn.Parameter], bool],
        lr: float,
        adam_lr: float,
        weight_decay: float = 0.0,
    ):
        self.lr, self.adam_lr, self.weight_decay = lr, adam_lr, weight_decay
        self.hidden: dict[tuple[int, int], list[torch.nn.Parameter]] = defaultdict(list)
        others = []
        for name, parameter in named_parameters:
            if is_hidden(name, parameter):
                self.hidden[parameter.shape[0], parameter[0].numel()].append(parameter)
            else:
                others.append(parameter)
        self.momenta = {size: torch.zeros(len(parameters), *size) for size, parameters in self.hidden.items()}
        self.adam = torch.optim.Adam(others, lr=adam_lr, betas=(0.9, 0.98), foreach=True)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update the parameters with both learning rates multiplied by `factor`, and clear the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * factor
        self.adam.step()
        self.adam.zero_grad()
        lr = self.lr * factor
        for size, parameters in self.hidden.items():
            gradients = torch.stack([parameter.grad.reshape(size) for parameter in parameters])
            self.momenta[size].lerp_(gradients, 1 - MOMENTUM)
            updates = orthogonalize(gradients.lerp_(self.momenta[size], MOMENTUM))
            scale = max(1.0, size[0] / size[1]) ** 0.5
            for parameter, update in zip(parameters, updates):
                parameter.mul_(1 - lr * self.weight_decay).add_(update.view_as(parameter), alpha=-lr * scale)
                parameter.grad = None


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Move the singular values of matrices [N, R, C] close to 1, by Newton-Schulz iterations."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
