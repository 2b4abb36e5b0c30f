"""What a clip costs to train, in arithmetic: which buckets may share a micro-step, and what speed could be."""

from dataclasses import dataclass

# Of attention's forward work: the gradients of its two products take twice as much. A kernel that does not keep the
# S x S matrix computes the first product once more.
ATTENTION_BACKWARD, ATTENTION_BACKWARD_DONE = 2.0, 2.5


# Dense bf16 TFLOP/s by the data sheets, without sparsity. By whole names: an H100 of another make has another peak, and
# a slice of one has none.
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
}


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one training step of one clip, its optimizer step not counted (it is small).

    linears, attention: of the forward pass of the frozen base; lora: of the adapter's forward pass.
    """

    linears: float
    attention: float
    lora: float

    @property
    def forward(self) -> float:
        """The base's forward pass."""
        return self.linears + self.attention

    @property
    def backward(self) -> float:
        """The base's backward pass: a frozen linear layer has no gradient of its weights to compute."""
        return self.linears + ATTENTION_BACKWARD * self.attention

    @property
    def counted(self) -> float:
        """What model FLOP/s and MFU count: the base forward and backward; no adapter, nothing recomputed.

        CogVideoX-1.5 at 81x768x1360: 1,479 + 429 + 2 x 1,050 = 4,008 TFLOP. (Its LoRA of rank 128 adds 36.)
        """
        return self.forward + self.backward

    def done(self, checkpointing: str) -> float:
        """What a GPU computes: with the adapter (its gradients are twice its forward pass) and all that is recomputed.

        checkpointing: of `train.activation_checkpointing`.
        """
        again = {
            "none": 0.0,
            "selective": self.linears + self.lora,
            "full": self.forward + self.lora,
            "full+offload": self.forward + self.lora,
        }[checkpointing]
        backward = self.linears + ATTENTION_BACKWARD_DONE * self.attention
        return self.forward + backward + 3 * self.lora + again


def step_flops(tokens: int, num_layers: int, hidden_size: int, num_lora_parameters: int = 0) -> StepFlops:
    """The matrix products of one clip of so many tokens.

    Per layer and token, d being the hidden size: queries, keys, values and output 4 d^2, the feed-forward 8 d^2, each
    a multiplication and an addition; attention's two products 4 T d. An adapter's number is used once for every token.
    Embeddings and modulation are left out: together less than 0.1%.
    """
    return StepFlops(
        linears=float(num_layers * 24 * tokens * hidden_size**2),
        attention=float(num_layers * 4 * tokens**2 * hidden_size),
        lora=float(2 * tokens * num_lora_parameters),
    )


def clip_flops(tokens: int, num_layers: int, hidden_size: int) -> float:
    """Floating-point operations of one forward pass over a clip.

    CogVideoX-1.5 at 81x768x1360 (45,106 tokens): 1,479 TFLOP, of which attention is 71%.
    """
    return step_flops(tokens, num_layers, hidden_size).forward
