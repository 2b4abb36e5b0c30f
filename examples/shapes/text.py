"""The text encoder of the shapes model: a tiny T5 with random weights, which the transformer learns to read.

Random weights suffice because the captions have few words: each caption still has states of its own.
"""

import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

TEXT_TOKENS = 12
TEXT_DIM = 64
WORDS = [
    "a", "an", "the", "and", "to", "from", "side", "in", "of", "on", "over", "with", "red", "green", "blue", "yellow",
    "orange", "white", "purple", "black", "disc", "square", "triangle", "circle", "shape", "moves", "left", "right",
    "up", "down", "grows", "shrinks", "stands", "still", "bounces", "swings", "turns", "blinks", "slowly", "quickly",
]  # fmt: skip
LETTERS = "▁abcdefghijklmnopqrstuvwxyz.,-'"


def create_tokenizer() -> T5Tokenizer:
    """A tokenizer with the world's words, and letters for all others."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -4.0) for word in WORDS]
    return T5Tokenizer(vocab=[*special, *words, *((letter, -8.0) for letter in LETTERS)], extra_ids=0)


def create_text_encoder(num_words: int, seed: int) -> T5EncoderModel:
    """A T5 encoder with random weights."""
    torch.manual_seed(seed)
    config = T5Config(vocab_size=num_words, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


class CaptionEncoder:
    """Encodes captions as the pipeline does: padded, and without a mask."""

    def __init__(self, folder: str):
        self.tokenizer = T5Tokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.encoder = T5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> torch.Tensor:
        """Return states [N, TEXT_TOKENS, TEXT_DIM]."""
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        )
        return self.encoder(tokens.input_ids)[0]
