"""The transformer as it is trained: diffusers' CogVideoX with its weights and names, and a forward pass of our own.

Text and video tokens stay one sequence from the first block to the last (diffusers joins and splits it twice a block),
what depends on the timestep alone is computed outside of what is recomputed, a LoRA adds to its layer within the matrix
product, and each block keeps as much of its activations as `set_checkpointing` says. Same numbers as diffusers' up to
the last bits; the tests compare outputs and gradients.
"""

import functools
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.activations import GELU
from torch import nn

from cogds.model.transformer.attention import attend
from cogds.model.transformer.checkpointing import Offload, run
from cogds.model.transformer.fused import Modulation, gated_sum, linears, norm_modulate, norm_rotate
from cogds.model.transformer.sequence_parallel import SequenceGroup, attend_together, gather, own_share, shares

Rotary = tuple[torch.Tensor, torch.Tensor] | None

# Of the compiled block, in one process: four checkpointing modes; single clips or batches; with gradients or without;
# the LoRA on or off; a whole clip or a share of it.
MAX_GRAPHS = 4 * 2 * 2 * 2 * 2


class Block(nn.Module):
    """diffusers' CogVideoXBlock on one sequence, text tokens first.

    kernel: of `attention.KERNELS`. checkpointing: of `CHECKPOINTING_MODES`, set by `Transformer.set_checkpointing`.
    """

    def __init__(self, block: Any):
        super().__init__()
        self.norm1, self.attn1, self.norm2, self.ff = block.norm1, block.attn1, block.norm2, block.ff
        self.kernel, self.checkpointing, self.has_dropout = "torch", "none", False
        self.offload: Offload | None = None
        self.group = ""  # name of the process group whose ranks share the sequence
        self._body: Any = self.body  # compiled, where that was asked for

    def compile_body(self, backend: Any) -> None:
        body = torch.compile(self.body, backend=backend)

        def run_compiled(
            checkpointing: str,
            x: torch.Tensor,
            first: Any,
            second: Any,
            rotary: Rotary,
            num_text: int,
            counts: tuple[int, ...],
        ) -> Any:
            # Said beforehand, or the second length would compile anew.
            for tensor, axis in ((x, 1), *((table, 0) for table in rotary or ())):
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
            if len(x) > 1:
                for tensor in (x, *first, *second):
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
            return body(checkpointing, x, first, second, rotary, num_text, counts)

        self._body = run_compiled

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor, rotary: Rotary, num_text: int, counts: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """x [B, S, D], temb [B, time embedding], rotary tables of the video tokens -> [B, S, D].

        counts: where ranks share the sequence, how many tokens each has; x, num_text and rotary are this rank's.
        """
        modulations = [
            Modulation(*norm.linear(norm.silu(temb))[:, None].chunk(6, dim=-1)) for norm in (self.norm1, self.norm2)
        ]
        if self.checkpointing == "full+offload" and torch.is_grad_enabled():
            assert self.offload is not None
            with self.offload.keep(x):
                return self._body("full", x, *modulations, rotary, num_text, counts)
        return self._body(self.checkpointing, x, *modulations, rotary, num_text, counts)

    def body(
        self, checkpointing: str, x: torch.Tensor, first: Modulation, second: Modulation, rotary: Rotary, num_text: int,
        counts: tuple[int, ...] = (),
    ) -> torch.Tensor:  # fmt: skip
        """What is recomputed as `checkpointing` says, and compiled."""
        inputs = (x, first, second, rotary, num_text, counts)
        return run(checkpointing, self._attend_and_feed, *inputs, has_dropout=self.has_dropout)

    def _attend_and_feed(
        self, x: torch.Tensor, first: Modulation, second: Modulation, rotary: Rotary, num_text: int,
        counts: tuple[int, ...],
    ) -> torch.Tensor:  # fmt: skip
        attn = self.attn1
        normed = norm_modulate(x, self.norm1.norm, first, num_text)
        query, key, value = (
            one.unflatten(-1, (attn.heads, -1)) for one in linears(normed, attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = norm_rotate(query, attn.norm_q, rotary), norm_rotate(key, attn.norm_k, rotary)
        if counts:
            attended = attend_together(query, key, value, self.kernel, counts, self.group)
        else:
            attended = attend(query, key, value, self.kernel)
        x = gated_sum(x, attn.to_out[1](linears(attended.flatten(-2), attn.to_out[0])[0]), first, num_text)
        return gated_sum(x, self._feed(norm_modulate(x, self.norm2.norm, second, num_text)), second, num_text)

    def _feed(self, x: torch.Tensor) -> torch.Tensor:
        entry, *rest = self.ff.net
        if type(entry) is not GELU:
            return self.ff(x)
        x = entry.gelu(linears(x, entry.proj)[0])
        for layer in rest:
            x = layer(x) if isinstance(layer, nn.Dropout) else linears(x, layer)[0]
        return x


class Transformer(CogVideoXTransformer3DModel):
    """CogVideoXTransformer3DModel with `Block`s. Names, config and weights are diffusers'."""

    transformer_blocks: Any

    @functools.wraps(CogVideoXTransformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.transformer_blocks = nn.ModuleList(Block(block) for block in self.transformer_blocks)
        self.sequence_group: SequenceGroup | None = None
        self.blocks_are_alike = False

    def make_blocks_alike(self) -> None:
        """Take a gradient for the first block's input too, which nobody needs: code compiled for the others then serves
        it, and ZeRO-3 sees where a block's backward pass ends, which it takes for its beginning otherwise."""
        self.blocks_are_alike = True

    def set_kernel(self, kernel: str) -> None:
        """The attention kernel of every block (`attention.KERNELS`)."""
        for block in self.transformer_blocks:
            block.kernel = kernel

    def note_dropout(self) -> None:
        """Look, once the LoRA is there, which blocks draw random numbers: recomputing must draw the same again."""
        for block in self.transformer_blocks:
            block.has_dropout = any(isinstance(one, nn.Dropout) and one.p > 0 for one in block.modules())

    def set_checkpointing(self, checkpointing: str) -> None:
        """What every block keeps for the backward pass from now on (`checkpointing`)."""
        if checkpointing == "full+offload" and self.transformer_blocks[0].offload is None:
            offload = Offload(next(self.parameters()).device)
            for block in self.transformer_blocks:
                block.offload = offload
        for block in self.transformer_blocks:
            block.checkpointing = checkpointing

    def share_sequence(self, group: SequenceGroup) -> None:
        """From now on every clip is shared by the ranks of `group`: all of them take it, and get the whole output."""
        self.sequence_group = group
        for block in self.transformer_blocks:
            block.group = group.name

    def compile_blocks(self, backend: Any = "inductor") -> None:
        """Compile the block, once for all of them. Every bucket runs the same code: at most one compilation for single
        clips and one for batches, for each checkpointing mode that is used, with gradients and without."""
        self.make_blocks_alike()
        # Past its limit, which is 8, Dynamo runs a block as it is, and says so in its own log only.
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
        """As diffusers': hidden_states [B, F, C, H, W], encoder_hidden_states [B, text tokens, dim], timestep [B]."""
        if attention_kwargs or return_dict:
            raise ValueError("attention_kwargs and return_dict=True are for diffusers' own class")
        batch_size, num_frames, _, height, width = hidden_states.shape
        num_text = encoder_hidden_states.shape[1]
        temb = self._time_embedding(timestep, timestep_cond, ofs, hidden_states.dtype)
        x = self.embedding_dropout(self.patch_embed(encoder_hidden_states, hidden_states))
        group = self.sequence_group
        text: tuple[int, ...] = ()
        video: tuple[int, ...] = ()
        if group is not None:
            text, video = shares(num_text, group.size), shares(x.shape[1] - num_text, group.size)
            x = torch.cat([own_share(part, group, 1) for part in (x[:, :num_text], x[:, num_text:])], dim=1)
            num_text = text[group.rank]
            if image_rotary_emb is not None:
                cosines, sines = image_rotary_emb
                image_rotary_emb = own_share(cosines, group, 0), own_share(sines, group, 0)
        if (offload := self.transformer_blocks[0].offload) is not None:
            offload.begin()
        if self.blocks_are_alike and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        for block in self.transformer_blocks:
            x = block(x, temb, image_rotary_emb, num_text, tuple(map(sum, zip(text, video))))
        x = self.proj_out(self.norm_out(self.norm_final(x[:, num_text:]), temb=temb))
        if group is not None:
            x = gather(x, video, group)
        return (self._unpatchify(x, batch_size, num_frames, height, width),)

    def _time_embedding(
        self, timestep: torch.Tensor, condition: torch.Tensor | None, ofs: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        temb = self.time_embedding(self.time_proj(timestep).to(dtype), condition)
        if self.ofs_embedding is not None:
            temb = temb + self.ofs_embedding(self.ofs_proj(ofs).to(dtype))
        return temb

    def _unpatchify(self, x: torch.Tensor, batch: int, frames: int, height: int, width: int) -> torch.Tensor:
        """[B, tokens, patch values] -> [B, F, C, H, W]."""
        p, p_t = self.config.patch_size, self.config.patch_size_t
        if p_t is None:
            x = x.reshape(batch, frames, height // p, width // p, -1, p, p)
            return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        x = x.reshape(batch, (frames + p_t - 1) // p_t, height // p, width // p, -1, p_t, p, p)
        return x.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)
