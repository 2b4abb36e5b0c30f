"""The learning rate as a pure function of the optimizer step: nothing to save, nothing that DeepSpeed can skip."""

import math

SCHEDULES = ("constant", "cosine", "linear")


def learning_rate(
    step: int, lr: float, schedule: str, num_steps: int, warmup_steps: int, final_lr_ratio: float
) -> float:
    """Learning rate of optimizer step `step` (0 is the first).

    Rises linearly over `warmup_steps`, reaching `lr` at step `warmup_steps`; the first step is already above zero.
    Then constant, or falling (linear or half a cosine) to lr * final_lr_ratio at the last of `num_steps`.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    done = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return lr * (final_lr_ratio + (1 - final_lr_ratio) * share)
