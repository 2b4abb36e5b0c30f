"""The trained transformer: diffusers' CogVideoX, with its weights and names, and an optimized forward pass.

Text and video tokens stay in one sequence from the first block to the last, while diffusers joins and splits them twice
per block. Modulations, which depend only on the timestep, are computed outside of the recomputed part. A LoRA adds to
its layer's output within the matrix product. `set_checkpointing` chooses which activations are kept. Results equal
those of diffusers up to rounding. The tests compare outputs and gradients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.activations import GELU
from torch import nn

from cogds.core.checkpointing import BlockCheckpointing
from cogds.model.transformer.attention import attend
from cogds.model.transformer.checkpointing import Offload, run_checkpointed
from cogds.model.transformer.fused import Modulation, gated_sum, lora_linears, norm_modulate, norm_rotate
from cogds.model.transformer.sequence_parallel import (
    SequenceGroup,
    gather_tokens,
    local_share,
    share_sizes,
    ulysses_attention,
)
from cogds.process.host_memory import HostBuffer

Rotary = tuple[torch.Tensor, torch.Tensor] | None


class Layout(NamedTuple):
    """The arrangement of the tokens that this rank has of a sequence.

    rotary: tables of the video tokens; num_text: number of text tokens; counts: with sequence parallelism, the number
    of tokens on each rank, otherwise ().
    """

    rotary: Rotary
    num_text: int
    counts: tuple[int, ...] = ()


# Graphs that one process may compile of the block: four checkpointing modes, single clips or batches, with or without
# gradients, with or without the LoRA, whole or shared sequences.
MAX_GRAPHS = 4 * 2 * 2 * 2 * 2


class Block(nn.Module):
    """diffusers' CogVideoXBlock on one sequence that starts with the text tokens.

    Attributes:
        kernel: a key of `attention.KERNELS`.
        checkpointing: one of `CHECKPOINTING_MODES`, set by `Transformer.set_checkpointing`.
        group: name of the process group whose ranks share the sequence, "" without sequence parallelism.
    """

    def __init__(self, block: Any):
        super().__init__()
        self.norm1, self.attn1, self.norm2, self.ff = block.norm1, block.attn1, block.norm2, block.ff
        self.kernel, self.checkpointing, self.has_dropout = "torch", "none", False
        self.offload: Offload | None = None
        self.group = ""
        self._body: Callable[..., torch.Tensor] = self.body  # replaced by `compile_body`

    def compile_body(self, backend: Any) -> None:
        """Compile the block except for its modulations."""
        self._body = functools.partial(self._run_compiled, torch.compile(self.body, backend=backend))

    @staticmethod
    def _run_compiled(
        body: Callable[..., torch.Tensor], mode: str, x: torch.Tensor, modulations: Sequence[Modulation], layout: Layout
    ) -> torch.Tensor:
        # Without these marks, the second length would trigger another compilation.
        for tensor, axis in ((x, 1), *((table, 0) for table in layout.rotary or ())):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        if len(x) > 1:
            for tensor in (x, *modulations[0], *modulations[1]):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return body(mode, x, modulations, layout)

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor, rotary: Rotary, num_text: int, counts: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """Run the block: x [B, S, D], temb [B, time_embed_dim] -> [B, S, D]. The other arguments: see `Layout`."""
        modulations = [
            Modulation(*norm.linear(norm.silu(temb))[:, None].chunk(6, dim=-1)) for norm in (self.norm1, self.norm2)
        ]
        layout = Layout(rotary, num_text, counts)
        if self.checkpointing == "full+offload" and torch.is_grad_enabled():
            assert self.offload is not None
            with self.offload.save_on_host(x):
                return self._body("full", x, modulations, layout)
        return self._body(self.checkpointing, x, modulations, layout)

    def body(
        self, checkpointing: str, x: torch.Tensor, modulations: Sequence[Modulation], layout: Layout
    ) -> torch.Tensor:
        """The part of the block that is checkpointed and compiled. modulations: of the two norms."""
        return run_checkpointed(checkpointing, self._forward, x, modulations, layout, has_dropout=self.has_dropout)

    def _forward(self, x: torch.Tensor, modulations: Sequence[Modulation], layout: Layout) -> torch.Tensor:
        attn, (first, second), (rotary, num_text, counts) = self.attn1, modulations, layout
        normed = norm_modulate(x, self.norm1.norm, first, num_text)
        query, key, value = (
            tensor.unflatten(-1, (attn.heads, -1)) for tensor in lora_linears(normed, attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = norm_rotate(query, attn.norm_q, rotary), norm_rotate(key, attn.norm_k, rotary)
        if counts:
            attended = ulysses_attention(query, key, value, self.kernel, counts, self.group)
        else:
            attended = attend(query, key, value, self.kernel)
        x = gated_sum(x, attn.to_out[1](lora_linears(attended.flatten(-2), attn.to_out[0])[0]), first, num_text)
        return gated_sum(x, self._feed_forward(norm_modulate(x, self.norm2.norm, second, num_text)), second, num_text)

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        activation, *rest = self.ff.net
        if type(activation) is not GELU:
            return self.ff(x)
        x = activation.gelu(lora_linears(x, activation.proj)[0])
        for layer in rest:
            x = layer(x) if isinstance(layer, nn.Dropout) else lora_linears(x, layer)[0]
        return x


class Transformer(CogVideoXTransformer3DModel):
    """CogVideoXTransformer3DModel made of `Block`s, with the same names, config and weights."""

    transformer_blocks: Any

    @functools.wraps(CogVideoXTransformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.transformer_blocks = nn.ModuleList(Block(block) for block in self.transformer_blocks)
        self.sequence_group: SequenceGroup | None = None
        self.input_requires_grad = False
        self.offloaded_weights: HostBuffer | None = None  # the memory of weights that ZeRO-3 offloads

    def require_input_grad(self) -> None:
        """Compute a gradient for the first block's input as well, although nothing uses it.

        The first block can then run code compiled for the others, and ZeRO-3 sees where its backward pass ends, which
        it otherwise takes for the beginning.
        """
        self.input_requires_grad = True

    def compute_positions(self) -> None:
        """Compute fixed position embeddings (CogVideoX-2b) again, if the transformer has them.

        They are in no file. A transformer that was built on the meta device lacks them, and `zero.Init` rounds every
        tensor that is made within it, so those computed there in bf16 are wrong.
        """
        embed = self.patch_embed
        if embed.use_positional_embeddings and not embed.use_learned_positional_embeddings:
            size = embed.sample_height, embed.sample_width, embed.sample_frames
            embed.pos_embedding = embed._get_positional_embeddings(*size, device=embed.pos_embedding.device)

    def set_kernel(self, kernel: str) -> None:
        """Set the attention kernel of every block, a key of `attention.KERNELS`."""
        for block in self.transformer_blocks:
            block.kernel = kernel

    def detect_dropout(self) -> None:
        """Find the blocks with dropout, whose recomputation must repeat it. Call this after adding the LoRA."""
        for block in self.transformer_blocks:
            block.has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())

    def set_checkpointing(self, checkpointing: BlockCheckpointing | str) -> None:
        """Set the activation checkpointing of every block. A mode is for all blocks."""
        blocks = BlockCheckpointing.of(checkpointing)
        num_checkpointed = len(self.transformer_blocks) - blocks.num_kept_blocks
        if blocks.mode == "full+offload" and self.transformer_blocks[0].offload is None:
            offload = Offload(next(self.parameters()).device)
            for block in self.transformer_blocks:
                block.offload = offload
        for number, block in enumerate(self.transformer_blocks):
            block.checkpointing = blocks.mode if number < num_checkpointed else "none"

    def share_sequence(self, group: SequenceGroup) -> None:
        """Split every clip over the ranks of `group`. All of them take the whole input and return the whole output."""
        self.sequence_group = group
        for block in self.transformer_blocks:
            block.group = group.name

    def compile_blocks(self, backend: Any = "inductor") -> None:
        """Compile the blocks, which share the compiled code, as do all buckets.

        Single clips and batches are compiled separately, as is each checkpointing mode that is used, with and without
        gradients.
        """
        self.require_input_grad()
        # Beyond its limit of 8, Dynamo runs a block uncompiled and reports it only in its own log.
        limits = torch._dynamo.config
        limit = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"
        setattr(limits, limit, max(getattr(limits, limit), MAX_GRAPHS))
        for block in self.transformer_blocks:
            block.compile_body(backend)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
        ofs: torch.Tensor | None = None,
        image_rotary_emb: Rotary = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict v with the arguments of diffusers' class.

        hidden_states: [B, F, C, H, W]; encoder_hidden_states: [B, text_tokens, dim]; timestep: [B]. Returns a tuple
        with the prediction [B, F, C, H, W].
        """
        if attention_kwargs or return_dict:
            raise ValueError("attention_kwargs and return_dict=True are not supported. Use diffusers' own class.")
        batch_size, num_frames, _, height, width = hidden_states.shape
        num_text = encoder_hidden_states.shape[1]
        temb = self._time_embedding(timestep, timestep_cond, ofs, hidden_states.dtype)
        x = self.embedding_dropout(self.patch_embed(encoder_hidden_states, hidden_states))
        group = self.sequence_group
        text_counts: tuple[int, ...] = ()
        video_counts: tuple[int, ...] = ()
        if group is not None:
            text_counts = share_sizes(num_text, group.size)
            video_counts = share_sizes(x.shape[1] - num_text, group.size)
            x = torch.cat([local_share(part, group, 1) for part in (x[:, :num_text], x[:, num_text:])], dim=1)
            num_text = text_counts[group.rank]
            if image_rotary_emb is not None:
                cosines, sines = image_rotary_emb
                image_rotary_emb = local_share(cosines, group, 0), local_share(sines, group, 0)
        if (offload := self.transformer_blocks[0].offload) is not None:
            offload.reset()
        if self.input_requires_grad and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        counts = tuple(map(sum, zip(text_counts, video_counts)))
        for block in self.transformer_blocks:
            x = block(x, temb, image_rotary_emb, num_text, counts)
        x = self.proj_out(self.norm_out(self.norm_final(x[:, num_text:]), temb=temb))
        if group is not None:
            x = gather_tokens(x, video_counts, group)
        return (self._unpatchify(x, batch_size, num_frames, height, width),)

    def _time_embedding(
        self, timestep: torch.Tensor, condition: torch.Tensor | None, ofs: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        temb = self.time_embedding(self.time_proj(timestep).to(dtype), condition)
        if self.ofs_embedding is not None:
            temb = temb + self.ofs_embedding(self.ofs_proj(ofs).to(dtype))
        return temb

    def _unpatchify(self, x: torch.Tensor, batch: int, frames: int, height: int, width: int) -> torch.Tensor:
        """Convert patches [B, tokens, patch values] to latents [B, F, C, H, W]."""
        p, p_t = self.config.patch_size, self.config.patch_size_t
        if p_t is None:
            x = x.reshape(batch, frames, height // p, width // p, -1, p, p)
            return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        x = x.reshape(batch, (frames + p_t - 1) // p_t, height // p, width // p, -1, p_t, p, p)
        return x.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)
