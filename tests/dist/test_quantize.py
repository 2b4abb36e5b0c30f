"""Training on a quantized base with DeepSpeed, and its refusal at ZeRO stage 3."""

import importlib.util

import pytest

from cogds.cli import call
from cogds.errors import UserError
from tests.dist.conftest import adapter, losses

pytestmark = pytest.mark.dist
KINDS = [
    ("zero2", "fp32", "int8", "false"),
    pytest.param("zero1", "bf16", "nf4", "false", marks=pytest.mark.slow),
    pytest.param("zero2_offload", "bf16", "int8", "false", marks=pytest.mark.slow),
    pytest.param("zero2", "bf16", "fp8", "true", marks=pytest.mark.slow),
]
missing = [name for name in ("torchao", "bitsandbytes") if importlib.util.find_spec(name) is None]
needs_libraries = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: pip install -e '.[quant]'")


@needs_libraries
@pytest.mark.parametrize("ds, precision, quantization, fp8_matmul", KINDS)
def test_losses_are_close_to_those_of_the_full_base(train_once, ds, precision, quantization, fp8_matmul):
    settings = [] if precision == "fp32" else ["train.precision=bf16"]
    reference = train_once("zero2-bf16" if settings else "zero2", "zero2", *settings)
    settings += [f"model.quantization={quantization}", f"model.fp8_matmul={fp8_matmul}"]
    run = train_once(f"{ds}-{quantization}-{fp8_matmul}", ds, *settings)
    assert losses(run) == pytest.approx(losses(reference), rel=0.02)
    assert losses(run) != losses(reference)
    expected, tensors = adapter(reference), adapter(run)
    assert tensors.keys() == expected.keys()
    assert all(tensor.dtype == expected[name].dtype for name, tensor in tensors.items())
    assert any(tensor.abs().max() > 1e-3 for name, tensor in tensors.items() if "lora_B" in name), "nothing was trained"


def test_stage_3_is_refused_before_anything_is_written(tiny_model, tmp_path):
    arguments = [f"model.path={tiny_model}", f"data.path={tmp_path}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"model\.quantization=int8: .*ZeRO stage 3.*zero2\.json"):
        call("train", ["--deepspeed", "zero3", *arguments, "model.quantization=int8"])
    assert not (tmp_path / "run").exists()
