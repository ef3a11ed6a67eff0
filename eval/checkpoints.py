"""Files of torch, read without running what is in them."""

import pathlib
from typing import Any

import torch

from diffusion_kd import errors


def load(path: pathlib.Path) -> Any:
    """Tensors of a file written by `torch.save`, on the CPU. Raises ModelError for any other file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - on broken files torch raises whatever its parser stumbles over
        raise errors.ModelError(f"{path} cannot be read as tensors of torch: {errors.first_line(error)}") from None
