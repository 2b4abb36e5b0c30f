"""Quantization of the base: accuracy, memory, and compatibility of a LoRA trained on it."""

import importlib.util
from unittest.mock import Mock

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd

from cogds.core.memory import TransformerSize, base_weights_bytes, unpacked_weight_bytes
from cogds.errors import UserError
from cogds.model.load import build_transformer, find_model, load_transformer
from cogds.model.lora.adapter import check_initial_lora, export, inject, resolve_targets
from cogds.model.lora.file import read_lora
from cogds.model.transformer import quantize
from cogds.model.transformer.forward import Transformer
from cogds.model.transformer.quantize import PackedLinear, check_quantization, pack, pack_block, unpack
from tests.live_bytes import LiveBytes
from tests.model.lora.adapters import ATTENTION, trainable

missing = [name for name in ("torchao", "bitsandbytes") if importlib.util.find_spec(name) is None]
needs_libraries = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: pip install -e '.[quant]'")

CPU = torch.device("cpu")
QUANTIZATIONS = ["int8", "fp8", "nf4"]
# Quantization and fp8 matmul -> largest relative deviation from bf16: of the loss, the output and the LoRA's gradient.
DISTANCES = {
    ("int8", False): (1e-3, 0.01, 0.03),
    ("fp8", False): (2e-3, 0.02, 0.08),
    ("nf4", False): (3e-3, 0.05, 0.25),
    ("none", True): (2e-3, 0.03, 0.10),
    ("fp8", True): (2e-3, 0.03, 0.12),
}
KINDS = list(DISTANCES)
SMALL = {
    "num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 16, "out_channels": 8, "time_embed_dim": 64,
    "ofs_embed_dim": 64, "text_embed_dim": 32, "num_layers": 3, "sample_width": 30, "sample_height": 30,
    "sample_frames": 9, "patch_size": 2, "patch_size_t": 2, "max_text_seq_length": 8,
    "use_rotary_positional_embeddings": True, "patch_bias": False,
}  # fmt: skip
# The other members of the family. Learned positions fit only the sample size.
TEXT_15 = SMALL | {"in_channels": 8, "ofs_embed_dim": None}
V10 = {"patch_size_t": None, "patch_bias": True, "sample_height": 8, "sample_width": 12, "sample_frames": 13}
LEARNED = SMALL | V10 | {"ofs_embed_dim": None, "use_learned_positional_embeddings": True}
TEXT_10 = TEXT_15 | V10
SINCOS = TEXT_10 | {"use_rotary_positional_embeddings": False}
# 0.14 billion parameters.
MID = SMALL | {"num_attention_heads": 12, "num_layers": 12, "time_embed_dim": 512, "ofs_embed_dim": 512}


def transformer_of(config, quantization="none", fp8_matmul=False):
    """A transformer with the same random weights for every quantization, and a LoRA that is not zero."""
    torch.manual_seed(0)
    transformer = Transformer(**config).requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    for block in transformer.transformer_blocks:
        pack_block(block, quantization, fp8_matmul, fill=True)
    generator = torch.Generator().manual_seed(1)
    for parameter in inject(transformer, 8, 8, 0.0, ATTENTION, seed=0):
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return transformer


def inputs(config, latents=(4, 8, 12)):
    generator, (frames, height, width) = torch.Generator().manual_seed(2), latents
    tokens = frames // (config["patch_size_t"] or 1) * (height // 2) * (width // 2)
    angles = torch.randn(tokens, config["attention_head_dim"] // 2, generator=generator).repeat_interleave(2, 1)
    states = (1, config["max_text_seq_length"], config["text_embed_dim"])
    return {
        "hidden_states": torch.randn(1, frames, config["in_channels"], height, width, generator=generator).to(
            torch.bfloat16
        ),
        "encoder_hidden_states": torch.randn(states, generator=generator).to(torch.bfloat16),
        "timestep": torch.tensor([500]),
        "ofs": torch.full((1,), 2.0, dtype=torch.bfloat16) if config["ofs_embed_dim"] else None,
        "image_rotary_emb": (angles.cos(), angles.sin()) if config["use_rotary_positional_embeddings"] else None,
        "return_dict": False,
    }


def outcome(transformer, batch):
    """Return the loss against fixed noise, the output, and the LoRA's gradients as a vector."""
    transformer.zero_grad()
    output = transformer(**batch)[0].float()
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    loss = (output - target).square().mean()
    loss.backward()
    gradients = [parameter.grad.float().flatten() for parameter in transformer.parameters() if parameter.requires_grad]
    return loss.item(), output.detach(), torch.cat(gradients)


def distance(tensor, expected):
    return ((tensor - expected).norm() / expected.norm()).item()


@needs_libraries
@pytest.mark.parametrize(
    "config, latents",
    [
        (SMALL, (4, 8, 12)), (TEXT_15, (4, 8, 12)), (LEARNED, (4, 8, 12)), (TEXT_10, (4, 8, 12)), (SINCOS, (4, 8, 12)),
        pytest.param(MID, (2, 4, 4), marks=pytest.mark.slow),
    ],
    ids=["1.5-5b-i2v", "1.5-5b", "5b-i2v", "5b", "2b", "mid"],
)  # fmt: skip
def test_the_loss_is_close_to_that_of_the_full_base(config, latents):
    batch = inputs(config, latents=latents)
    loss, output, gradient = outcome(transformer_of(config), batch)
    distances = {}
    for kind, limits in DISTANCES.items():
        result = outcome(transformer_of(config, *kind), batch)
        distances[kind] = abs(result[0] / loss - 1), distance(result[1], output), distance(result[2], gradient)
        assert all(value < limit for value, limit in zip(distances[kind], limits)), (kind, distances[kind])
    assert 0 < distances["int8", False][1] < distances["fp8", False][1] < distances["nf4", False][1]


@needs_libraries
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_packed_layer_equals_its_dequantized_weight(quantization, dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96, dtype=dtype).requires_grad_(False)
    layer = PackedLinear(linear, quantization, False)
    layer.fill(linear.weight)
    assert (
        distance(layer.weight.float(), linear.weight.float()) < {"int8": 0.008, "fp8": 0.03, "nf4": 0.1}[quantization]
    )
    x, gradient = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True), torch.randn(2, 5, 96, dtype=dtype)
    y = layer(x)
    (to_x,) = torch.autograd.grad(y, x, gradient)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight, linear.bias))
    torch.testing.assert_close(to_x, gradient @ layer.weight)
    assert (y.dtype, to_x.dtype, layer.weight.dtype) == (dtype,) * 3


@needs_libraries
@pytest.mark.parametrize("quantization, fp8_matmul", KINDS)
def test_zeros_stay_zeros(quantization, fp8_matmul):
    """Text tokens have no gradient in the last block. A scale of 0 would turn it into NaN."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight[3] = 0
    layer = PackedLinear(linear, quantization, fp8_matmul)
    layer.fill(linear.weight)
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    x[1] = 0
    x.requires_grad_()
    y = layer(x)
    gradient = 1e-10 * torch.randn_like(y)  # as small as those of a mean over a clip
    gradient[2] = 0
    (to_x,) = torch.autograd.grad(y, x, gradient)
    assert torch.equal(y[1], torch.zeros(96, dtype=torch.bfloat16))
    assert torch.equal(y[:, 3], torch.zeros(7, dtype=torch.bfloat16))
    assert torch.equal(to_x[2], torch.zeros(64, dtype=torch.bfloat16))
    assert distance(to_x.float(), (gradient @ linear.weight).float()) < 0.15


@needs_libraries
@pytest.mark.parametrize("shape", [(7, 5), (96, 80)])
def test_weights_of_any_shape_can_be_packed(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    for quantization in QUANTIZATIONS:
        assert distance(unpack(pack(weight, quantization)), weight) < 0.15


@needs_libraries
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_loading_packs_weights_one_by_one(tiny_model, quantization, monkeypatch):
    model, spy = find_model(str(tiny_model)), Mock(wraps=pack)
    monkeypatch.setattr(quantize, "pack", spy)
    loaded, full = load_transformer(model, torch.float32, "cpu", quantization), load_transformer(model, torch.float32)
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, PackedLinear)}
    names = {name for name, module in full.transformer_blocks.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.removeprefix("transformer_blocks.") for name in layers} == names
    for name, layer in layers.items():
        expected = full.get_submodule(name)
        assert torch.equal(layer.weight, unpack(pack(expected.weight, quantization)))
        assert torch.equal(layer.bias, expected.bias)
    assert spy.call_count == len(layers)  # each weight was packed once, when it was loaded
    parameters, full_parameters = dict(loaded.named_parameters()), dict(full.named_parameters())
    assert set(full_parameters) - set(parameters) == {f"{name}.weight" for name in layers}
    assert all(torch.equal(parameter, full_parameters[name]) for name, parameter in parameters.items())
    assert loaded.config == full.config
    parts = [part for layer in layers.values() for part in layer.packed.parts]
    num_parameters = sum(parameter.numel() for parameter in full.parameters())
    assert sum(tensor.nbytes for tensor in [*parts, *parameters.values()]) == base_weights_bytes(
        TransformerSize.from_config(model.transformer_config, num_parameters), quantization, 4
    )


@needs_libraries
def test_random_weights_are_packed_too(tiny_model):
    transformer = build_transformer(find_model(str(tiny_model)), torch.bfloat16, "cpu", "int8")
    assert transformer.transformer_blocks[1].ff.net[2].weight.float().std() > 0.01


@needs_libraries
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_is_exact(kind):
    transformer, batch = transformer_of(SMALL, *kind), inputs(SMALL)
    expected = outcome(transformer, batch)
    for checkpointing in ("selective", "full", "full+offload"):
        transformer.set_checkpointing(checkpointing)
        result = outcome(transformer, batch)
        assert torch.equal(result[1], expected[1])
        assert torch.equal(result[2], expected[2])


def packed_shapes(transformer):
    """Shapes of the weights, [out, in] and [in, out]."""
    shapes = {layer.shape for layer in transformer.modules() if isinstance(layer, PackedLinear)}
    return shapes | {shape[::-1] for shape in shapes}


def saved_shapes(run):
    """Shapes of the floating-point tensors that autograd saves."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        run()
    return {tuple(tensor.shape) for tensor in saved if tensor.dtype in (torch.bfloat16, torch.float32)}


@needs_libraries
@pytest.mark.parametrize("kind", KINDS)
def test_no_unpacked_weight_is_kept_for_the_backward_pass(kind):
    transformer, batch = transformer_of(SMALL, *kind), inputs(SMALL)
    kept = saved_shapes(lambda: transformer(**batch))
    assert kept
    assert not kept & packed_shapes(transformer)


@needs_libraries
@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_a_compiled_layer_is_equivalent_and_keeps_no_unpacked_weight(kind):
    """With torch.compile's default partitioner, which would save results that both passes compute."""
    kept = []

    def forward_graph(graph, _example):
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        kept.extend(node.meta["val"] for node in output.args[0] if isinstance(node, torch.fx.Node))
        return make_boxed_func(graph.forward)

    config = SMALL | {"num_layers": 1}
    transformer, batch = transformer_of(config, *kind), inputs(config)
    expected = outcome(transformer, batch)
    torch._dynamo.reset()
    transformer.compile_blocks(
        backend=aot_autograd(
            fw_compiler=forward_graph,
            bw_compiler=lambda graph, _example: make_boxed_func(graph.forward),
            partition_fn=min_cut_rematerialization_partition,
        )
    )
    result = outcome(transformer, batch)
    assert distance(result[1], expected[1]) < 1e-2
    assert distance(result[2], expected[2]) < 2e-2
    shapes = [value.shape for value in kept if isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16]
    assert shapes
    # Sizes that depend on the clip are symbolic.
    fixed = {tuple(shape) for shape in shapes if all(type(size) is int for size in shape)}
    assert not fixed & packed_shapes(transformer)


@needs_libraries
@pytest.mark.parametrize("quantization, fp8_matmul", KINDS)
def test_a_lora_trained_on_a_packed_base_loads_in_diffusers(tiny_model, tmp_path, quantization, fp8_matmul):
    model = find_model(str(tiny_model))
    packed, full = (
        load_transformer(model, torch.bfloat16, "cpu", *kind) for kind in ((quantization, fp8_matmul), ("none", False))
    )
    assert resolve_targets(packed, ["all-linear"]) == resolve_targets(full, ["all-linear"])
    files = {}
    for name, transformer in (("packed", packed), ("full", full)):
        parameters = inject(transformer, 4, 8, 0.0, (*ATTENTION, "ff.net.2"), seed=0)
        if name == "packed":
            batch = inputs(SMALL | {"max_text_seq_length": 32, "attention_head_dim": 16}, latents=(2, 4, 6))
            optimizer = torch.optim.AdamW(parameters, lr=0.03)
            losses = []
            for _ in range(4):
                losses.append(outcome(transformer, batch)[0])
                optimizer.step()
            assert losses[-1] < losses[0]
        files[name] = export(tmp_path / name, transformer, trainable(transformer), {})
    with safe_open(files["packed"], "pt") as packed_file, safe_open(files["full"], "pt") as full_file:
        assert set(packed_file.keys()) == set(full_file.keys())
        assert packed_file.metadata() == full_file.metadata()
    check_initial_lora(full, read_lora(files["packed"]))
    plain = CogVideoXTransformer3DModel.from_pretrained(model.path / "transformer").to(torch.bfloat16)
    before = plain(**batch)[0].float()
    plain.load_lora_adapter(str(files["packed"]), use_safetensors=True)
    trained = load_file(files["packed"])
    loaded = get_peft_model_state_dict(plain, adapter_name=next(iter(plain.peft_config)))
    assert len(trained) == 2 * 2 * 5
    assert all(torch.equal(loaded[name.removeprefix("transformer.")], tensor) for name, tensor in trained.items())
    after, ours = plain(**batch)[0].float(), packed(**batch)[0].float()
    assert distance(before, after) > 3 * distance(ours, after)
    assert distance(ours, after) < 0.05


@pytest.mark.parametrize(
    "quantization, fp8_matmul, precision, stage, message",
    [
        ("int8", False, "bf16", 3, r"model\.quantization=int8: .*ZeRO stage 3"),
        ("none", True, "bf16", 3, r"model\.fp8_matmul=true: .*ZeRO stage 3"),
        ("nf4", True, "bf16", 2, r"model\.quantization=nf4 and model\.fp8_matmul=true: .*fp8 or none"),
        ("none", True, "fp32", 2, r"model\.fp8_matmul=true: .*train\.precision is fp32"),
    ],
)
def test_unsupported_settings_are_refused(monkeypatch, quantization, fp8_matmul, precision, stage, message):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=message):
        check_quantization(quantization, fp8_matmul, precision, stage, CPU)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda _name: None)
    for quantization, fp8_matmul, library in (
        ("int8", False, "torchao"),
        ("nf4", False, "bitsandbytes"),
        ("none", True, "torchao"),
    ):
        with pytest.raises(UserError, match=rf"{library}.*pip install -e '\.\[quant\]'"):
            check_quantization(quantization, fp8_matmul, "bf16", 2, CPU)
    check_quantization("none", False, "fp32", 3, CPU)


def test_fp8_needs_a_recent_gpu(monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    with pytest.raises(UserError, match=r"8\.9 .*8\.0.*model\.quantization=int8"):
        check_quantization("fp8", False, "bf16", 2, torch.device("cuda"))
    check_quantization("int8", False, "bf16", 2, torch.device("cuda"))


@needs_libraries
@pytest.mark.parametrize("quantization, fp8_matmul", [kind for kind in KINDS if kind[0] != "none"])
def test_unpacking_takes_the_memory_in_the_memory_model(quantization, fp8_matmul):
    packed = pack(torch.randn(2048, 512).to(torch.bfloat16), quantization, fp8_matmul)
    rows, kind, parts = torch.randn(4, 2048).to(torch.bfloat16), packed.kind, list(packed.parts)
    with LiveBytes([rows, *parts]) as live:
        quantize._matmul_backward._init_fn(rows, kind, list(packed.shape), parts)
    assert live.peak == pytest.approx(unpacked_weight_bytes(quantization, fp8_matmul, 2) * 2048 * 512, rel=0.03)
