"""The trained transformer against diffusers' own: outputs and gradients."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft import LoraConfig
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from cogds.model.transformer.attention import attend
from cogds.model.transformer.forward import MAX_GRAPHS, Block, Transformer
from tests.live_bytes import LiveBytes

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CHECKPOINTING_MODES = ("none", "selective", "full", "full+offload")
# Tiny versions of CogVideoX-1.5, of 1.0 (no temporal patches), 1.0-I2V (learned positions) and 1.0-2B (no RoPE).
V15 = {
    "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 8, "out_channels": 4, "time_embed_dim": 32,
    "ofs_embed_dim": 32, "text_embed_dim": 24, "num_layers": 3, "sample_width": 30, "sample_height": 30,
    "sample_frames": 9, "patch_size": 2, "patch_size_t": 2, "max_text_seq_length": 5,
    "use_rotary_positional_embeddings": True, "patch_bias": False,
}  # fmt: skip
V10 = V15 | {"patch_size_t": None, "patch_bias": True, "ofs_embed_dim": None}


def all_linear(transformer):
    return [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]


def pair(config, targets, dtype=torch.float32, **lora):
    """diffusers' transformer and cogds', with the same random weights and the same LoRA."""
    torch.manual_seed(0)
    theirs, ours = CogVideoXTransformer3DModel(**config), Transformer(**config)
    for one in (theirs, ours):
        one.requires_grad_(False)
        names = all_linear(one) if targets == "all" else targets
        one.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names, **lora))
        one.train()
        for parameter in one.parameters():
            parameter.data = parameter.data.to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(config, batch=2, latents=(4, 4, 6), dtype=torch.float32):
    frames, height, width = latents
    tokens = frames // (config["patch_size_t"] or 1) * (height // 2) * (width // 2)
    rotary = tuple(torch.randn(tokens, 8).repeat_interleave(2, 1) for _ in range(2))
    return {
        "hidden_states": torch.randn(batch, frames, 8, height, width, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 5, 24, dtype=dtype),
        "timestep": torch.tensor([3, 500])[:batch],
        "ofs": torch.full((1,), 2.0, dtype=dtype) if config["ofs_embed_dim"] else None,
        "image_rotary_emb": rotary if config["use_rotary_positional_embeddings"] else None,
        "attention_kwargs": None,
        "return_dict": False,
    }


def outcome(transformer, batch):
    """Output, and gradients by name."""
    transformer.zero_grad()
    output = transformer(**batch)[0]
    output.float().square().mean().backward()
    return output.detach(), {name: one.grad for name, one in transformer.named_parameters() if one.requires_grad}


def distance(one, other):
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def worst(ours, theirs):
    assert set(ours) == set(theirs)
    return max(distance(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("targets", [ATTENTION, ["to_q", "ff.net.2"], "all"], ids=["attention", "two", "all"])
@pytest.mark.parametrize(
    "config", [V15, V10, V10 | {"use_rotary_positional_embeddings": False}], ids=["15", "10", "2b"]
)
def test_outputs_and_gradients_equal_diffusers(config, targets):
    theirs, ours = pair(config, targets)
    batch = inputs(config)
    expected, found = outcome(theirs, batch), outcome(ours, batch)
    assert distance(found[0], expected[0]) < 1e-6
    assert worst(found[1], expected[1]) < 5e-6


def test_bf16_is_closer_to_float32_than_diffusers():
    """Fused sums and modulation round less often, so results are not exactly those of diffusers."""
    exact, _ = pair(V15, "all")
    theirs, ours = pair(V15, "all", torch.bfloat16)
    exact.load_state_dict({name: one.float() for name, one in theirs.state_dict().items()})
    batch = inputs(V15)
    rounded = {name: one.bfloat16() if name in ("hidden_states", "encoder_hidden_states", "ofs") else one
               for name, one in batch.items()}  # fmt: skip
    batch |= {name: rounded[name].float() for name in ("hidden_states", "encoder_hidden_states", "ofs")}
    expected, found, plain = outcome(exact, batch), outcome(ours, rounded), outcome(theirs, rounded)
    assert distance(found[0], expected[0]) < 1.05 * distance(plain[0], expected[0]) < 0.03
    assert worst(found[1], expected[1]) < 1.2 * worst(plain[1], expected[1])


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_other_loras_run_the_code_of_peft(lora):
    theirs, ours = pair(V15, ATTENTION, **lora)
    batch = inputs(V15)
    torch.manual_seed(1)
    expected = outcome(theirs, batch)
    torch.manual_seed(1)
    found = outcome(ours, batch)
    assert distance(found[0], expected[0]) < 1e-6
    assert worst(found[1], expected[1]) < 5e-6


@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.5}], ids=["plain", "dropout"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING_MODES[1:])
def test_recomputation_is_exact(checkpointing, lora):
    _, ours = pair(V15, "all", **lora)
    ours.detect_dropout()
    batch = inputs(V15)
    torch.manual_seed(1)
    expected = outcome(ours, batch)
    ours.set_checkpointing(checkpointing)
    torch.manual_seed(1)
    found = outcome(ours, batch)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


class Calls(TorchDispatchMode):
    """Counts operations that really run: below the dispatch mode that returns saved results."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def calls_of_attention(checkpointing):
    _, ours = pair(V15, ATTENTION)
    ours.set_checkpointing(checkpointing)
    batch = inputs(V15)
    with Calls() as calls:
        outcome(ours, batch)
    return (
        calls.names.count("aten::_scaled_dot_product_flash_attention_for_cpu"),
        calls.names.count("aten::native_layer_norm"),
    )


def test_attention_is_recomputed_only_if_the_whole_block_is():
    (kept, none), (attention, partly), (twice, block) = map(calls_of_attention, CHECKPOINTING_MODES[:3])
    assert (kept, attention, twice) == (3, 3, 6)
    assert none < partly == block


def kept_on_the_device(checkpointing):
    """Bytes alive after the forward pass, without those that would be in host memory on a GPU machine."""
    _, ours = pair(V15, ATTENTION)
    ours.set_checkpointing(checkpointing)
    batch = inputs(V15)
    given = [one for one in batch.values() if isinstance(one, torch.Tensor)]
    with LiveBytes([*ours.parameters(), *ours.buffers(), *given, *batch["image_rotary_emb"]]) as live:
        output = ours(**batch)[0]
        offload = ours.transformer_blocks[0].offload
        waiting = offload._on_host if offload is not None else []
        bytes_kept = live.live - sum(parked.host.nbytes for parked in waiting)
    del output
    return bytes_kept


def test_each_mode_keeps_less_than_the_one_before():
    none, attention, block, offload = map(kept_on_the_device, CHECKPOINTING_MODES)
    unit, statistics = 2 * (12 + 5) * 64 * 4, 2 * (12 + 5) * 4 * 4
    assert none > 4 * attention
    assert attention - block == 3 * (unit + statistics)  # attention's outputs, of three blocks
    assert block - offload == 3 * unit  # the inputs of three blocks


def test_block_inputs_are_offloaded_and_fetched():
    _, ours = pair(V15, ATTENTION)
    ours.set_checkpointing("full+offload")
    output = ours(**inputs(V15))[0]
    offload = ours.transformer_blocks[0].offload
    assert len(offload._on_host) == 3
    output.sum().backward()
    assert not offload._on_host


def test_without_gradients_nothing_is_kept():
    _, ours = pair(V15, ATTENTION)
    batch = inputs(V15)
    ours.set_checkpointing("full+offload")
    with torch.no_grad():
        ours(**batch)
    assert not ours.transformer_blocks[0].offload._on_host


def compiled(ours, shapes):
    """Outcomes of the compiled blocks, and the number of graphs. Without a code generator, which takes minutes."""
    graphs = []

    def count(graph, _example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    ours.compile_blocks(backend=count)
    return [outcome(ours, shape) for shape in shapes], len(graphs)


@pytest.mark.parametrize(
    "checkpointing",
    [pytest.param(mode, marks=pytest.mark.slow) for mode in CHECKPOINTING_MODES if mode != "selective"] + ["selective"],
)
def test_one_compilation_for_all_buckets(checkpointing):
    """One graph for single clips and one for batches of any size and shape."""
    _, ours = pair(V15, ATTENTION)
    ours.set_checkpointing(checkpointing)
    sizes = [(4, 4, 6), (6, 6, 4), (2, 4, 4), (4, 8, 8), (8, 4, 10)]
    batches = [inputs(V15, batch, latents) for batch in (1, 2) for latents in sizes]
    plain = [outcome(ours, one) for one in batches]
    found, num_graphs = compiled(ours, batches)
    assert num_graphs <= 2
    for one, expected in zip(found, plain):
        assert distance(one[0], expected[0]) < 1e-6
        assert worst(one[1], expected[1]) < 5e-6


@pytest.mark.slow
def test_all_combinations_of_modes_are_compiled():
    """Four checkpointing modes, 1 or 2 clips, with and without gradients: beyond Dynamo's default limit of 8 graphs."""
    _, ours = pair(V15, ATTENTION)
    graphs, batches = [], [inputs(V15, batch, (2, 2, 2)) for batch in (1, 2)]

    def count(graph, _example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        ours.compile_blocks(backend=count)
        for checkpointing in CHECKPOINTING_MODES[:3]:
            ours.set_checkpointing(checkpointing)
            for batch in batches:
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        ours(**batch)
        assert 8 < len(graphs) <= MAX_GRAPHS
        before = len(graphs)
        ours.set_kernel("math")  # only a new combination compiles a new graph
        ours(**batches[0])
        ours.set_kernel("torch")
        ours(**batches[0])
        assert len(graphs) == before + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_generated_code_is_equivalent():
    """With the code generator used in training, which takes minutes on a CPU: one block, mode and length."""
    _, ours = pair(V15 | {"num_layers": 1}, ATTENTION)
    ours.set_checkpointing("selective")
    batch = inputs(V15, 1, (2, 4, 4))
    expected = outcome(ours, batch)
    torch._dynamo.reset()
    ours.compile_blocks()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = outcome(ours, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "nothing was compiled"
    assert distance(found[0], expected[0]) < 1e-6
    assert worst(found[1], expected[1]) < 5e-6


def partitioned(checkpointing):
    """For the compiled block: attention calls in the backward graph, and bytes that the forward graph saves."""
    _, ours = pair(V15, ATTENTION)
    ours.set_checkpointing(checkpointing)
    graphs = {}

    def look(name):
        def compiler(graph, _example):
            graphs[name] = graph
            return make_boxed_func(graph.forward)

        return compiler

    torch._dynamo.reset()
    cut = min_cut_rematerialization_partition
    ours.compile_blocks(aot_autograd(fw_compiler=look("forward"), bw_compiler=look("backward"), partition_fn=cut))
    outcome(ours, inputs(V15))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    kept = next(node for node in graphs["forward"].graph.nodes if node.op == "output").args[0][1:]
    values = [node.meta["val"] for node in kept if node is not None and node.op != "placeholder"]
    sizes = [int(value.numel()) * value.element_size() for value in values if isinstance(value, torch.Tensor)]
    # Recomputed operations may be inside an operator that restores the random state.
    nodes = graphs["backward"].graph.nodes
    return sum(attention in (node.target, *node.args) for node in nodes), sum(sizes)


@pytest.mark.slow
def test_the_compiler_follows_the_checkpointing_mode():
    (kept, none), (attention, partly), (twice, block) = map(partitioned, CHECKPOINTING_MODES[:3])
    assert (kept, attention, twice) == (0, 0, 1)
    assert none > partly > block


@pytest.mark.parametrize("config", [V15, V10])
def test_names_config_and_weights_equal_diffusers(config, tmp_path):
    theirs, ours = CogVideoXTransformer3DModel(**config), Transformer(**config)
    assert [name for name, _ in theirs.named_parameters()] == [name for name, _ in ours.named_parameters()]
    assert {k: v for k, v in theirs.config.items() if not k.startswith("_")} == {
        k: v for k, v in ours.config.items() if not k.startswith("_")
    }
    ours.save_pretrained(tmp_path)
    again = CogVideoXTransformer3DModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters()))


def test_unsupported_arguments_are_refused():
    _, ours = pair(V15, ATTENTION)
    with pytest.raises(ValueError, match="attention_kwargs"):
        ours(**inputs(V15) | {"attention_kwargs": {"scale": 0.5}})


def test_the_kernel_reaches_every_block():
    _, ours = pair(V15, ATTENTION)
    ours.set_kernel("math")
    assert {block.kernel for block in ours.transformer_blocks} == {"math"}
    assert all(isinstance(block, Block) for block in ours.transformer_blocks)
    query, key, value = torch.randn(3, 2, 5, 4, 16)
    assert distance(attend(query, key, value, "math"), attend(query, key, value, "flash")) < 1e-6
