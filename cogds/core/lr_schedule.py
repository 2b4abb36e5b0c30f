"""The learning rate as a pure function of the optimizer step.

There is no scheduler state to save, and DeepSpeed cannot skip a scheduler step.
"""

import math

SCHEDULES = ("constant", "cosine", "linear")


def learning_rate(
    step: int, lr: float, schedule: str, num_steps: int, warmup_steps: int, final_lr_ratio: float
) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    It rises linearly from above zero at step 0 to `lr` at step `warmup_steps`. Then it stays constant, or decays
    linearly or along a half cosine to lr * final_lr_ratio at the last of `num_steps` steps.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    done = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return lr * (final_lr_ratio + (1 - final_lr_ratio) * share)
