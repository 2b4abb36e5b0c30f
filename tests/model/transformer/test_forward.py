"""The trained transformer against diffusers' own: outputs and gradients."""

from functools import partial

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft import LoraConfig
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from cogds.core.checkpointing import CHECKPOINTING_MODES, BlockCheckpointing
from cogds.model.transformer.attention import attend
from cogds.model.transformer.forward import MAX_GRAPHS, Block, Transformer
from tests.live_bytes import LiveBytes

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# Tiny versions of CogVideoX1.5-5B-I2V and, without temporal patches, of the 1.0 models.
V15 = {
    "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 8, "out_channels": 4, "time_embed_dim": 32,
    "ofs_embed_dim": 32, "text_embed_dim": 24, "num_layers": 3, "sample_width": 30, "sample_height": 30,
    "sample_frames": 9, "patch_size": 2, "patch_size_t": 2, "max_text_seq_length": 5,
    "use_rotary_positional_embeddings": True, "patch_bias": False,
}  # fmt: skip
V10 = V15 | {"patch_size_t": None, "patch_bias": True, "ofs_embed_dim": None}
TEXT, SINCOS = {"in_channels": 4, "ofs_embed_dim": None}, {"use_rotary_positional_embeddings": False}
LATENTS = (4, 4, 6)  # of most clips
FAMILY = {
    "1.5-5b-i2v": V15,
    "1.5-5b": V15 | TEXT,
    "5b-i2v": V10 | {"use_learned_positional_embeddings": True},
    "5b": V10 | TEXT,
    "2b": V10 | TEXT | SINCOS,
}


def at_size(config, latents=LATENTS):
    """The config with these latents as its sample size, which is the only one with learned positions."""
    frames, height, width = latents
    return config | {"sample_frames": 4 * frames - 3, "sample_height": height, "sample_width": width}


# Fixed embeddings are calculated for other sizes than the sample size, and kept for that one.
CONFIGS = {name: at_size(config) for name, config in FAMILY.items()} | {"2b of another size": FAMILY["2b"]}
members = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def all_linear(transformer):
    return [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]


def pair(config, targets, dtype=torch.float32, **lora):
    """diffusers' transformer and cogds', with the same random weights and the same LoRA."""
    torch.manual_seed(0)
    theirs, ours = CogVideoXTransformer3DModel(**config), Transformer(**config)
    for transformer in (theirs, ours):
        transformer.requires_grad_(False)
        names = all_linear(transformer) if targets == "all" else targets
        transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names, **lora))
        transformer.train()
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    if config.get("use_learned_positional_embeddings"):
        theirs.patch_embed.pos_embedding.normal_(std=0.1)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def whole_pair(config):
    """The same without a LoRA, with all weights trained."""
    torch.manual_seed(0)
    theirs, ours = CogVideoXTransformer3DModel(**config), Transformer(**config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(), ours.train()


def inputs(config, batch=2, latents=LATENTS, dtype=torch.float32):
    frames, height, width = latents
    tokens = frames // (config["patch_size_t"] or 1) * (height // 2) * (width // 2)
    rotary = tuple(torch.randn(tokens, 8).repeat_interleave(2, 1) for _ in range(2))
    return {
        "hidden_states": torch.randn(batch, frames, config["in_channels"], height, width, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 5, 24, dtype=dtype),
        "timestep": torch.tensor([3, 500])[:batch],
        "ofs": torch.full((1,), 2.0, dtype=dtype) if config["ofs_embed_dim"] else None,
        "image_rotary_emb": rotary if config["use_rotary_positional_embeddings"] else None,
        "attention_kwargs": None,
        "return_dict": False,
    }


def gradients(transformer):
    return {name: parameter.grad for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def outcome(transformer, batch):
    """Return the output, and gradients by name."""
    transformer.zero_grad()
    output = transformer(**batch)[0]
    output.float().square().mean().backward()
    return output.detach(), gradients(transformer)


def distance(tensor, expected):
    return ((tensor.float() - expected.float()).norm() / expected.float().norm()).item()


def largest_distance(tensors, expected):
    assert set(tensors) == set(expected)
    return max(distance(tensors[name], expected[name]) for name in tensors)


@pytest.mark.parametrize("targets", [ATTENTION, ["to_q", "ff.net.2"], "all"], ids=["attention", "two", "all"])
@members
def test_outputs_and_gradients_equal_diffusers(config, targets):
    theirs, ours = pair(config, targets)
    batch = inputs(config)
    expected, result = outcome(theirs, batch), outcome(ours, batch)
    assert distance(result[0], expected[0]) < 1e-6
    assert largest_distance(result[1], expected[1]) < 5e-6


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "config", [V15, V10, V10 | {"use_rotary_positional_embeddings": False}], ids=["15", "10", "2b"]
)
def test_gradients_of_all_weights_equal_diffusers(config, mode):
    """Also of the norms, of the embeddings and of the output layer."""
    theirs, ours = whole_pair(config)
    ours.set_checkpointing(mode)
    expected, gradients_expected = outcome(theirs, batch := inputs(config))
    found, gradients_found = outcome(ours, batch)
    assert distance(found, expected) < 1e-6
    assert len(gradients_found) == len(list(theirs.parameters()))
    if not config["use_rotary_positional_embeddings"]:
        # Adding the same vector to all keys does not change attention: these gradients are 0, up to rounding.
        for name in [name for name in gradients_found if name.endswith("norm_k.bias")]:
            assert max(gradients_found.pop(name).norm(), gradients_expected.pop(name).norm()) < 1e-6
    assert largest_distance(gradients_found, gradients_expected) < 1e-4


def test_bf16_is_closer_to_float32_than_diffusers():
    """Fused sums and modulation round less often, so results are not exactly those of diffusers."""
    exact, _ = pair(V15, "all")
    theirs, ours = pair(V15, "all", torch.bfloat16)
    exact.load_state_dict({name: tensor.float() for name, tensor in theirs.state_dict().items()})
    batch, names = inputs(V15), ("hidden_states", "encoder_hidden_states", "ofs")
    rounded = batch | {name: batch[name].bfloat16() for name in names}
    batch |= {name: rounded[name].float() for name in names}
    expected, result, plain = outcome(exact, batch), outcome(ours, rounded), outcome(theirs, rounded)
    assert distance(result[0], expected[0]) < 1.05 * distance(plain[0], expected[0]) < 0.03
    assert largest_distance(result[1], expected[1]) < 1.2 * largest_distance(plain[1], expected[1])


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_other_loras_run_the_code_of_peft(lora):
    theirs, ours = pair(V15, ATTENTION, **lora)
    batch = inputs(V15)
    torch.manual_seed(1)
    expected = outcome(theirs, batch)
    torch.manual_seed(1)
    result = outcome(ours, batch)
    assert distance(result[0], expected[0]) < 1e-6
    assert largest_distance(result[1], expected[1]) < 5e-6


@pytest.mark.parametrize("checkpointing", CHECKPOINTING_MODES[1:])
@pytest.mark.parametrize(
    "config, lora",
    [*((config, {}) for config in CONFIGS.values()), (V15, {"lora_dropout": 0.5})],
    ids=[*CONFIGS, "dropout"],
)
def test_recomputation_is_exact(config, checkpointing, lora):
    _, ours = pair(config, "all", **lora)
    ours.detect_dropout()
    batch = inputs(config)
    torch.manual_seed(1)
    expected = outcome(ours, batch)
    ours.set_checkpointing(checkpointing)
    torch.manual_seed(1)
    result = outcome(ours, batch)
    assert torch.equal(result[0], expected[0])
    assert all(torch.equal(result[1][name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize("mode", CHECKPOINTING_MODES[1:])
def test_every_split_of_the_blocks_is_exact(mode):
    """A resumed run may therefore choose another one."""
    _, ours = pair(V15, ATTENTION)
    batch = inputs(V15)
    expected = outcome(ours, batch)
    for num_kept in range(4):
        ours.set_checkpointing(BlockCheckpointing(mode, num_kept, 3))
        modes = [block.checkpointing for block in ours.transformer_blocks]
        assert modes == [mode] * (3 - num_kept) + ["none"] * num_kept
        result = outcome(ours, batch)
        assert torch.equal(result[0], expected[0])
        assert all(torch.equal(result[1][name], gradient) for name, gradient in expected[1].items())


class Calls(TorchDispatchMode):
    """Records operations that really run, which excludes those whose saved results are reused."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def count_calls(checkpointing):
    """Return the numbers of calls of attention and LayerNorm."""
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
    none, selective, full = map(count_calls, CHECKPOINTING_MODES[:3])
    assert (none[0], selective[0], full[0]) == (3, 3, 6)
    assert none[1] < selective[1] == full[1]


def bytes_on_device(checkpointing):
    """Return the bytes alive after the forward pass, without those that would be in host memory on a GPU machine."""
    _, ours = pair(V15, ATTENTION)
    ours.set_checkpointing(checkpointing)
    batch = inputs(V15)
    tensors = [tensor for tensor in batch.values() if isinstance(tensor, torch.Tensor)]
    with LiveBytes([*ours.parameters(), *ours.buffers(), *tensors, *batch["image_rotary_emb"]]) as live:
        output = ours(**batch)[0]
        offload = ours.transformer_blocks[0].offload
        on_host = offload._on_host if offload is not None else []
        num_bytes = live.live - sum(offloaded.host.nbytes for offloaded in on_host)
    del output
    return num_bytes


def test_each_checkpointing_mode_takes_less_memory_than_the_one_before():
    none, selective, full, offload = map(bytes_on_device, CHECKPOINTING_MODES)
    activation, statistics = 2 * (12 + 5) * 64 * 4, 2 * (12 + 5) * 4 * 4
    assert none > 4 * selective
    assert selective - full == 3 * (activation + statistics)  # attention's outputs of three blocks
    assert full - offload == 3 * activation  # the inputs of three blocks


def test_block_inputs_are_offloaded_and_fetched():
    _, ours = pair(V15, ATTENTION)
    ours.set_checkpointing("full+offload")
    output = ours(**inputs(V15))[0]
    offload = ours.transformer_blocks[0].offload
    assert len(offload._on_host) == 3
    output.sum().backward()
    assert not offload._on_host


def test_without_gradients_nothing_is_offloaded():
    _, ours = pair(V15, ATTENTION)
    batch = inputs(V15)
    ours.set_checkpointing("full+offload")
    with torch.no_grad():
        ours(**batch)
    assert not ours.transformer_blocks[0].offload._on_host


def compile_without_code(transformer):
    """Compile the blocks without generating code, which takes minutes. Returns a list that will contain the graphs."""
    graphs = []

    def backend(graph, _example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    transformer.compile_blocks(backend=backend)
    return graphs


@pytest.mark.parametrize(
    "checkpointing",
    [pytest.param(mode, marks=pytest.mark.slow) for mode in CHECKPOINTING_MODES if mode != "selective"] + ["selective"],
)
def test_all_buckets_share_one_compilation(checkpointing):
    """There is one graph for single clips and one for batches of any size and shape, and another without gradients."""
    _, ours = pair(V15 | {"num_layers": 2}, ATTENTION)
    ours.set_checkpointing(checkpointing)
    sizes = [(4, 4, 6), (6, 6, 4), (2, 4, 4)]
    batches = [inputs(V15, batch, latents) for batch in (1, 2) for latents in sizes]
    plain = [outcome(ours, batch) for batch in batches]
    graphs = compile_without_code(ours)
    results = [outcome(ours, batch) for batch in batches]
    num_graphs = len(graphs)
    assert num_graphs <= 2
    with torch.no_grad():
        ours(**batches[0])
    assert len(graphs) == num_graphs + 1
    for result, expected in zip(results, plain):
        assert distance(result[0], expected[0]) < 1e-6
        assert largest_distance(result[1], expected[1]) < 5e-6


@pytest.mark.slow
def test_a_split_of_the_blocks_is_compiled_once_for_each_of_its_modes():
    _, ours = pair(V15, ATTENTION)
    splits = [BlockCheckpointing("selective", num_kept, 3) for num_kept in (1, 2)]
    batch = inputs(V15, 1, (2, 2, 2))
    ours.set_checkpointing("selective")
    expected = outcome(ours, batch)
    graphs = compile_without_code(ours)
    for split in splits:
        ours.set_checkpointing(split)
        result = outcome(ours, batch)
        assert distance(result[0], expected[0]) < 1e-6
        assert largest_distance(result[1], expected[1]) < 5e-6
    assert len(graphs) == 2


@pytest.mark.slow
def test_all_combinations_of_modes_are_compiled():
    """Checkpointing modes, 1 or 2 clips, with and without gradients: more than Dynamo's default limit of 8 graphs."""
    _, ours = pair(V15, ATTENTION)
    batches = [inputs(V15, batch, (2, 2, 2)) for batch in (1, 2)]
    with torch._dynamo.config.patch(recompile_limit=8):
        graphs = compile_without_code(ours)
        for checkpointing in CHECKPOINTING_MODES[:3]:
            ours.set_checkpointing(checkpointing)
            for batch in batches:
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        ours(**batch)
        assert 8 < len(graphs) <= MAX_GRAPHS
        num_graphs = len(graphs)
        ours.set_kernel("math")  # only a new combination compiles a new graph
        ours(**batches[0])
        ours.set_kernel("torch")
        ours(**batches[0])
        assert len(graphs) == num_graphs + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_generated_code_is_equivalent():
    """One block with one mode and length, because the code generator used in training takes minutes on a CPU."""
    _, ours = pair(V15 | {"num_layers": 1}, ATTENTION)
    ours.set_checkpointing("selective")
    batch = inputs(V15, 1, (2, 4, 4))
    expected = outcome(ours, batch)
    torch._dynamo.reset()
    ours.compile_blocks()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    result = outcome(ours, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "nothing was compiled"
    assert distance(result[0], expected[0]) < 1e-6
    assert largest_distance(result[1], expected[1]) < 5e-6


def partitioned(checkpointing):
    """Compile a block, and return attention calls in the backward graph and bytes that the forward graph saves."""
    _, ours = pair(V15, ATTENTION)
    ours.set_checkpointing(checkpointing)
    graphs = {}

    def keep(name, graph, _example):
        graphs[name] = graph
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    ours.compile_blocks(
        aot_autograd(
            fw_compiler=partial(keep, "forward"),
            bw_compiler=partial(keep, "backward"),
            partition_fn=min_cut_rematerialization_partition,
        )
    )
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
    none, selective, full = map(partitioned, CHECKPOINTING_MODES[:3])
    assert (none[0], selective[0], full[0]) == (0, 0, 1)
    assert none[1] > selective[1] > full[1]


def test_other_positions_are_detected():
    """The members differ by more than rounding: with those of another, the outputs differ."""
    theirs, ours = pair(CONFIGS["5b-i2v"], ATTENTION)
    ours.patch_embed.pos_embedding.zero_()
    batch = inputs(CONFIGS["5b-i2v"])
    assert distance(ours(**batch)[0], theirs(**batch)[0]) > 1e-2
    theirs, ours = pair(CONFIGS["2b"], ATTENTION)
    ours.patch_embed.pos_embedding.mul_(1.1)
    batch = inputs(CONFIGS["2b"])
    assert distance(ours(**batch)[0], theirs(**batch)[0]) > 1e-2
    theirs, ours = pair(CONFIGS["5b"], ATTENTION)
    batch = inputs(CONFIGS["5b"])
    assert distance(ours(**batch | {"image_rotary_emb": None})[0], theirs(**batch)[0]) > 1e-4


@members
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
