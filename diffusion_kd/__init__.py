"""diffusion-kd: distil a multi-step SDXL-class teacher into a 1-4 step student."""

from diffusion_kd import _torchvision

_torchvision.ensure_operators()

__version__ = "0.1.0"
