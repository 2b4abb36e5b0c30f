"""What a clip costs to train, in arithmetic: which buckets may share a micro-step, and what speed could be."""


def clip_flops(tokens: int, num_layers: int, hidden_size: int) -> float:
    """Floating-point operations of one forward pass of the transformer over a clip: its matrix products.

    Per layer and token, d being the hidden size: queries, keys, values and output 4 d^2, the feed-forward 8 d^2, each
    a multiplication and an addition; attention's two products 4 T d. CogVideoX-1.5 at 81x768x1360 (T = 45,104): 1,479
    TFLOP, of which attention is 71%.
    """
    return float(num_layers * (24 * tokens * hidden_size**2 + 4 * tokens**2 * hidden_size))
