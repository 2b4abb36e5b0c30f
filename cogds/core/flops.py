"""Floating-point operations of a training step, calculated from shapes, and peak rates of GPUs."""

from dataclasses import dataclass

from cogds.core.checkpointing import BlockCheckpointing
from cogds.core.memory import TrainedSize, TransformerSize

# Attention's backward pass relative to its forward pass: the gradients of its two products take twice the operations.
# A kernel that does not store the attention matrix computes the first product again.
BACKWARD_FACTOR, FLASH_BACKWARD_FACTOR = 2.0, 2.5


# Dense bf16 TFLOP/s from the data sheets, without sparsity. Keys are full device names, because variants of a GPU have
# different peaks, and MIG slices have no published peak.
PEAK_TFLOPS = {
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A800-SXM4-80GB": 312.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
}
# Share of the peak that estimates assume for all operations that a GPU executes. Not measured with cogds.
ASSUMED_EFFICIENCY = 0.4


@dataclass(frozen=True)
class Gpu:
    """A GPU to estimate for. device: its full name, a key of PEAK_TFLOPS; memory_bytes: its size by the data sheet."""

    device: str
    memory_bytes: float


# Short names for the command line.
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80e9),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 80e9),
    "h200": Gpu("NVIDIA H200", 141e9),
    "b200": Gpu("NVIDIA B200", 180e9),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80e9),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 40e9),
    "l40s": Gpu("NVIDIA L40S", 48e9),
    "a6000": Gpu("NVIDIA RTX A6000", 48e9),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 32e9),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 24e9),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 24e9),
}


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of training one clip, without the optimizer step, which is negligible.

    linears, attention: forward pass of the transformer; lora: forward pass of the LoRA; trained_linears: of the linear
    layers whose own weights are trained.
    """

    linears: float
    attention: float
    lora: float
    trained_linears: float = 0.0

    @property
    def forward(self) -> float:
        """Forward pass of the base."""
        return self.linears + self.attention

    @property
    def backward(self) -> float:
        """Backward pass of the base. A frozen linear layer computes no weight gradients."""
        return self.linears + self.trained_linears + BACKWARD_FACTOR * self.attention

    @property
    def model_flops(self) -> float:
        """Operations counted for model FLOP/s and MFU: forward and backward pass of the base, without recomputation.

        CogVideoX-1.5 at 81x768x1360: 1,479 + 429 + 2 x 1,050 = 4,008 TFLOP. (A LoRA of rank 128 adds 36.)
        """
        return self.forward + self.backward

    def hardware_flops(self, checkpointing: BlockCheckpointing | str) -> float:
        """Operations that a GPU executes, including the LoRA, whose backward pass is twice its forward pass.

        checkpointing: determines what is recomputed. A mode is for all blocks.
        """
        blocks = BlockCheckpointing.of(checkpointing)
        recomputed = {
            "none": 0.0,
            "selective": self.linears + self.lora,
            "full": self.forward + self.lora,
            "full+offload": self.forward + self.lora,
        }[blocks.mode]
        backward = self.linears + self.trained_linears + FLASH_BACKWARD_FACTOR * self.attention
        return self.forward + backward + 3 * self.lora + blocks.checkpointed_share * recomputed


def step_flops(
    tokens: int, num_layers: int, hidden_size: int, num_lora_parameters: int = 0, trained_share: float = 0.0
) -> StepFlops:
    """Count the operations of the matrix products for one clip of `tokens` (T) tokens.

    Per layer and token, for hidden size d: 4 d^2 multiply-adds for queries, keys, values and output, and 8 d^2 for the
    feed-forward layers; 4 T d operations for attention's two products. Each LoRA parameter takes one multiply-add per
    token. Embeddings and modulation, together less than 0.1%, are left out. trained_share: of the linear layers.
    """
    linears = float(num_layers * 24 * tokens * hidden_size**2)
    return StepFlops(
        linears=linears,
        attention=float(num_layers * 4 * tokens**2 * hidden_size),
        lora=float(2 * tokens * num_lora_parameters),
        trained_linears=trained_share * linears,
    )


def training_flops(tokens: int, transformer: TransformerSize, trained: TrainedSize) -> StepFlops:
    """Count the operations of `step_flops` for a LoRA, or for trained weights of the transformer."""
    num_lora = trained.num_parameters if trained.is_lora else 0
    share = trained.num_in_transformer / transformer.num_parameters
    return step_flops(tokens, transformer.num_layers, transformer.width, num_lora, share)


def estimate_seconds(flops: float, device: str) -> float:
    """Seconds that a GPU needs for this many operations at ASSUMED_EFFICIENCY. device: a key of PEAK_TFLOPS."""
    return flops / (PEAK_TFLOPS[device] * 1e12 * ASSUMED_EFFICIENCY)


def forward_flops(tokens: int, num_layers: int, hidden_size: int) -> float:
    """Floating-point operations of one forward pass of the base over a clip.

    CogVideoX-1.5 at 81x768x1360 (45,106 tokens): 1,479 TFLOP, 71% of it attention.
    """
    return step_flops(tokens, num_layers, hidden_size).forward
