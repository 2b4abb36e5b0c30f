"""Compare cogds' training step with the common step of other trainers of this model, on identical work in one run.

    python benchmarks/peers.py [--sizes tiny,mid | real] [--precision fp32|bf16] [--checkpointing L,...] [--kernel K]
        [--compile] [--rounds 5]

The common step is written from its description, with diffusers' own CogVideoXTransformer3DModel. The clip is encoded in
the loop, x0 is computed from the predicted v, and the loss is the mean squared error of x0, weighted by 1 / (1 - abar).
Blocks are recomputed completely (`enable_gradient_checkpointing`), with torch's attention and peft's LoRA in the
transformer's dtype. torch's AdamW trains it after clipping to norm 1, in a plain torch loop.

"ours" is the step of cogds' training: moments from the cache, and DeepSpeed with ZeRO-2, which keeps float32 master
weights. Both noise and encode the first frame, and use the same base weights (in memory once), LoRA, batch and
attention kernel. The common step is measured with and without encoding the clip, ours in all given checkpointing modes.
The ratios use the first mode (by default none on a CPU, selective on a GPU). Mode full recomputes as much as the common
step. All variants take turns.

Memory is the peak of a step, minus the LoRA and optimizer of the other variant. On a CPU it is that of the process,
including libraries. Prints a table, then one line of JSON, where `ratio` is our seconds divided by those of the common
step, for the last size.
"""

import argparse
import contextlib
import functools
from typing import Any

import measuring  # noqa: F401 (before torch)
import torch
from diffusers import CogVideoXTransformer3DModel
from measuring import (
    CLOCKS,
    DTYPES,
    SIZES,
    TARGETS,
    Size,
    Trainer,
    alphas_cumprod,
    fastest_kernel,
    free,
    held_bytes,
    interleaved,
    join_process_group,
    machine,
    model_of,
    print_json,
    print_machine,
    random_batch,
    random_vae,
    run_config,
    seconds_text,
    share_weights,
    table,
)
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogds.config.schema import ATTENTION_KERNELS, CHECKPOINTING_MODES
from cogds.core.geometry import ClipShape, num_tokens
from cogds.core.rope import rotary_tables
from cogds.distributed.process_group import disconnect
from cogds.distributed.world import World, read_world
from cogds.model.load import build_transformer
from cogds.model.transformer.attention import activate_kernel

# A tiny clip, for the first step, in which the optimizer allocates its state.
SMALL = ClipShape(5, 64, 64)

# Kernels of cogds -> backends of `sdpa_kernel`, to make diffusers use the same kernel.
BACKENDS: dict[str, SDPBackend | None] = {
    "torch": None,
    **dict.fromkeys(("flash", "flash3", "flash4"), SDPBackend.FLASH_ATTENTION),
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class CommonStep:
    """The common step, on base weights shared with another transformer of the same config."""

    def __init__(
        self, size: Size, precision: str, weights: dict[str, torch.Tensor], vae: Any, kernel: str, device: torch.device
    ):
        """weights: of the base in this precision, by diffusers' names."""
        self.model, self.shape, self.device, self.vae = model_of(size), ClipShape.parse(size.bucket), device, vae
        self.dtype, self.backend, rank = DTYPES[precision], BACKENDS[kernel], size.lora_rank
        self.transformer = share_weights(CogVideoXTransformer3DModel, size.transformer, weights)
        self.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
        self.transformer.enable_gradient_checkpointing()
        self.transformer.train()
        self.parameters = [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-3)
        self.abar = alphas_cumprod().to(device, torch.float32)
        self.scale = vae.config.scaling_factor
        batch = random_batch(self.shape, 1, self.model.geometry, size.transformer["text_embed_dim"], precision)
        self.text = batch["text_states"].to(device)
        self.frame = batch["first_frame"].to(device, self.dtype) / 127.5 - 1
        pixels = 3, self.shape.frames, self.shape.height, self.shape.width
        self.clip = torch.rand(1, *pixels, device=device, dtype=self.dtype) * 2 - 1
        self.latents = batch["moments"].chunk(2, 1)[0].to(device) * self.scale
        self.rotary = rotary_tables(self.shape, self.model.geometry, device)

    def allocate(self) -> None:
        """Allocate the optimizer's state."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def copy_lora(self, transformer: torch.nn.Module) -> None:
        """Take over the LoRA of another transformer."""
        theirs = dict(transformer.named_parameters())
        for name, parameter in self.transformer.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(theirs[name])

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels [B, 3, F, H, W] to scaled latents [B, C, F, h, w]."""
        return self.vae.encode(pixels).latent_dist.sample() * self.scale

    def predict(self, noisy: torch.Tensor, image: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Predict v for noisy latents [B, F, C, h, w], conditioned on the image latents."""
        zeros = torch.zeros_like(noisy[:, 1:])
        ofs = torch.full((1,), 2.0, dtype=self.dtype, device=self.device)
        return self.transformer(
            hidden_states=torch.cat([noisy, torch.cat([image, zeros], 1)], 2),
            encoder_hidden_states=self.text,
            timestep=timesteps,
            ofs=ofs,
            image_rotary_emb=self.rotary,
            return_dict=False,
        )[0]

    def loss(
        self, latents: torch.Tensor, noise: torch.Tensor, image: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The weighted mean squared error of x0, computed in the transformer's dtype."""
        abar = self.abar[timesteps].view(-1, 1, 1, 1, 1)
        alpha, sigma = abar.sqrt().to(self.dtype), (1 - abar).sqrt().to(self.dtype)
        noisy = alpha * latents + sigma * noise
        x0 = alpha * noisy - sigma * self.predict(noisy, image, timesteps)
        weights = (1 / (1 - abar)).to(self.dtype)
        return (weights * (x0 - latents) ** 2).reshape(len(latents), -1).mean(1).mean()

    def step(self, with_vae: bool) -> None:
        """Run encoding, noise, forward, backward and optimizer. with_vae: encode the clip too."""
        with sdpa_kernel(self.backend) if self.backend is not None else contextlib.nullcontext():
            sigma = torch.exp(-3.0 + 0.5 * torch.randn(1, device=self.device)).to(self.dtype)
            noised = self.frame + sigma * torch.randn_like(self.frame)
            image = self.encode(noised[:, :, None]).transpose(1, 2)
            latents = (self.encode(self.clip) if with_vae else self.latents).transpose(1, 2)
            padding = -latents.shape[1] % self.model.geometry.patch_size_t
            latents = torch.cat([latents[:, :1].repeat(1, padding, 1, 1, 1), latents], 1)
            timesteps = torch.randint(0, len(self.abar), (1,), device=self.device)
            self.loss(latents, torch.randn_like(latents), image, timesteps).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


@torch.no_grad()
def difference(common: CommonStep, ours: Trainer, shape: ClipShape) -> dict[str, float]:
    """Compare the losses and predictions of both on the same inputs, with the same LoRA."""
    common.copy_lora(ours.transformer)
    inputs, target = ours.inputs(shape)
    prediction = ours.transformer(**inputs)[0]
    theirs = common.transformer(**{**inputs, "attention_kwargs": None})[0]
    channels = target.shape[2]
    noisy, abar = inputs["hidden_states"][:, :, :channels].float(), common.abar[inputs["timestep"]].view(-1, 1, 1, 1, 1)
    x0, latents = (abar.sqrt() * noisy - (1 - abar).sqrt() * v for v in (theirs.float(), target))
    return {
        "v_loss_ours": float((prediction.float() - target).square().mean()),
        "weighted_x0_loss_common": float(((x0 - latents).square() / (1 - abar)).mean()),
        "largest_difference": float((prediction - theirs).abs().max() / theirs.abs().max()),
    }


def compare(size: Size, world: World, args: argparse.Namespace) -> dict[str, Any]:
    """Measure both on one model. Returns rows by name, ratios, and the differences of their results."""
    precision, modes, kernel = args.precision, args.checkpointing, args.kernel
    device, dtype = world.device, DTYPES[precision]
    if kernel == "auto":
        kernel = fastest_kernel(size, [size.bucket], precision, device)[0]
    activate_kernel(kernel, device)
    torch.manual_seed(0)
    base, vae = build_transformer(model_of(size), dtype, device), random_vae(size, dtype, device)
    weights = base.state_dict()
    held = [held_bytes(device)]
    common = CommonStep(size, precision, weights, vae, kernel, device)
    common.allocate()
    free(device)
    held.append(held_bytes(device))
    ours = Trainer(size, run_config(precision, size.lora_rank), "zero2", world, base, vae)
    ours.transformer.set_kernel(kernel)
    differences = difference(common, ours, common.shape)
    ours.step(SMALL)  # allocates the optimizer's state
    ours.set_compiled(args.compile)
    free(device)
    held.append(held_bytes(device))

    def our_step(checkpointing: str) -> None:
        ours.transformer.set_checkpointing(checkpointing)
        ours.step(common.shape)

    calls = {
        "common, VAE in the loop": lambda: common.step(True),
        "common, latents given": lambda: common.step(False),
        **{f"ours, {mode}": functools.partial(our_step, mode) for mode in modes},
    }
    timings = interleaved(calls, args.rounds, device, clock=args.clock)
    rows = {}
    for name, timing in timings.items():
        if timing.peak and None not in held:
            own = held[2] - held[1] if name.startswith("ours") else held[1] - held[0]  # type: ignore[operator]
            timing.peak -= held[2] - held[0] - own  # type: ignore[operator]
        rows[name] = timing.numbers()
    ours.close()
    result = {"size": size.name, "bucket": size.bucket, "tokens": num_tokens(common.shape, common.model.geometry)}
    result |= {"kernel": kernel, "rows": rows}
    result["same_work"] = {name: float(f"{value:.6g}") for name, value in differences.items()}
    for name, theirs in (("ratio", "common, VAE in the loop"), ("ratio_without_vae", "common, latents given")):
        for checkpointing in modes:
            key = name if checkpointing == modes[0] else f"{name}_{checkpointing}"
            a, b = timings[f"ours, {checkpointing}"].median_s, timings[theirs].median_s
            result[key] = round(a / b, 4) if a and b else None
    return result


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    world = read_world()
    gpu = world.device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ["real"] if gpu else ["tiny", "mid"]
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=sizes, help=", ".join(SIZES))
    parser.add_argument("--precision", default="bf16" if gpu else "fp32", choices=DTYPES)
    modes = ["selective" if gpu else "none", "full"]
    parser.add_argument(
        "--checkpointing", type=lambda text: text.split(","), default=modes, help=", ".join(CHECKPOINTING_MODES)
    )
    kernels = ("auto", *ATTENTION_KERNELS)
    parser.add_argument("--kernel", default="torch", choices=kernels, help="kernel of both; auto: the fastest")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of ours")
    parser.add_argument("--rounds", type=int, default=2 if gpu else 5)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: for shared machines")
    args = parser.parse_args(argv)
    info = machine(world.device)
    join_process_group(world)
    print_machine(info)
    results = [compare(SIZES[name], world, args) for name in args.sizes]
    cells = []
    for result in results:
        for name, row in result["rows"].items():
            theirs = result["rows"]["common, VAE in the loop"], result["rows"]["common, latents given"]
            ratios = [
                f"{row['median_s'] / other['median_s']:.3f}" if "median_s" in row and "median_s" in other else None
                for other in theirs
            ]
            shape = result["size"], result["bucket"], result["tokens"]
            cells.append([*shape, name, seconds_text(row), *ratios, row.get("peak_gb")])
    head = ("size", "bucket", "tokens", "step", "s/step (min-max)", "/ common", "/ common, no VAE", "peak GB")
    print(table(head, cells))
    for result in results:
        print(f"{result['size']}: attention kernel of both: {result['kernel']}; same work: {result['same_work']}")
    last = results[-1]
    settings = {name: getattr(args, name) for name in ("precision", "checkpointing", "clock")}
    settings |= {"kernel": last["kernel"], "compiled": args.compile}
    ratios = {name: value for name, value in last.items() if name.startswith("ratio")}
    print_json("peers", info, **settings, results=results, size=last["size"], **ratios)


if __name__ == "__main__":
    main()
    disconnect()
