"""Optional packages: the commands that install them, for messages.

The commands name the packages themselves, and not an extra such as ``qm-cupy[plot]``.
So they work in every environment, whether qm_cupy came from a checkout, a wheel or a
package index.
"""

from pathlib import Path
from typing import Any

# The requirement of each extra of pyproject.toml that adds one package for users. The
# extras `cli` and `lm` add several packages, which have their own names here.
REQUIREMENTS = {
    "cuda13": "cupy-cuda13x[ctk]>=14.2,<15",
    "cuda12": "cupy-cuda12x[ctk]>=14.2,<15",
    "plot": "matplotlib>=3.8",
    "safetensors": "safetensors>=0.5",
    "bfloat16": "ml_dtypes>=0.5",
    "torch": "torch>=2.11",
    "jax": "jax>=0.8",
    "tqdm": "tqdm>=4.66",
    "shtab": "shtab>=1.7",
    "gguf": "gguf>=0.17",
}


def install_command(name: str) -> str:
    """Return the command that installs one of the packages in `REQUIREMENTS`."""
    return f'pip install "{REQUIREMENTS[name]}"'


def cupy_command() -> str:
    """Return the command that installs CuPy, and what differs for CUDA 12."""
    return f"{install_command('cuda13')} (cupy-cuda12x for a driver of CUDA 12)"


def import_safetensors(path: Path) -> Any:
    """Return the optional package safetensors, which files of its format need."""
    try:
        import safetensors.numpy
    except ImportError as error:
        command = install_command("safetensors")
        raise ImportError(f"{path} needs the safetensors package: {command}") from error
    return safetensors
