"""Versions of cuDNN that compute the VAE's 3-D convolutions wrongly.

cuDNN 9.8 to 9.14 does so in bf16 (pytorch issues 163539, 166480, 163581), and up to 9.15 in float32 with TF32, which is
torch's default for convolutions (issue 167024). Encodings would be wrong without an error, and stay in the cache.
"""

import torch

from cogds.errors import UserError

FIRST_WRONG = 90800
FIRST_RIGHT = {torch.bfloat16: 91500, torch.float32: 91600}


def cudnn_version() -> int | None:
    """Return the version of cuDNN, such as 91002 for 9.10.2; None on a machine without a GPU."""
    return torch.backends.cudnn.version() if torch.cuda.is_available() else None


def check_cudnn(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if the VAE would be computed wrongly with this dtype."""
    if device.type == "cuda" and (message := find_cudnn_problem(cudnn_version(), dtype)):
        raise UserError(message)


def find_cudnn_problem(version: int | None, dtype: torch.dtype) -> str:
    """Return an error message if this version computes the VAE wrongly, or ""."""
    if version is None or not FIRST_WRONG <= version < FIRST_RIGHT[dtype]:
        return ""
    if dtype is torch.float32 and not torch.backends.cudnn.allow_tf32:
        return ""
    name, first_right = _name(version), _name(FIRST_RIGHT[dtype])
    package = f"nvidia-cudnn-cu{(torch.version.cuda or '12').partition('.')[0]}"
    return (
        f"cuDNN {name}: computes the VAE's 3-D convolutions wrongly in {str(dtype).removeprefix('torch.')}. Install a "
        f"newer version: pip install '{package}>={first_right}'."
    )


def _name(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}" + (f".{version % 100}" if version % 100 else "")
