"""Activation checkpointing: its modes, and which blocks of the transformer use one."""

from dataclasses import dataclass

# From the fastest to the one that needs the least memory.
CHECKPOINTING_MODES = ("none", "selective", "full", "full+offload")


@dataclass(frozen=True)
class BlockCheckpointing:
    """Activation checkpointing of every block of the transformer.

    The last `num_kept_blocks` of `num_blocks` keep all activations, and the others use `mode`, one of
    `CHECKPOINTING_MODES`. The backward pass frees the activations of the last blocks first, before it recomputes any.
    Without kept blocks, `num_blocks` may be 0.
    """

    mode: str
    num_kept_blocks: int = 0
    num_blocks: int = 0

    @classmethod
    def of(cls, checkpointing: "BlockCheckpointing | str") -> "BlockCheckpointing":
        """Accept a mode, which then applies to all blocks."""
        return cls(checkpointing) if isinstance(checkpointing, str) else checkpointing

    @property
    def checkpointed_share(self) -> float:
        """The share of blocks that use `mode`."""
        return 1 - self.num_kept_blocks / self.num_blocks if self.num_kept_blocks else 1.0

    def __str__(self) -> str:
        if not self.num_kept_blocks:
            return self.mode
        return f"{self.mode}, {self.num_kept_blocks} of {self.num_blocks} blocks kept"
