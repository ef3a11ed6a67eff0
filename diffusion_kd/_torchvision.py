"""Lets torchvision be imported where its compiled operators do not load.

torchvision registers shape functions for `nms` and `qnms` at import and fails when the operators are unknown,
which happens with a CPU build of torch beside the registry's torchvision wheel. Nothing in this project calls
them, so their schemas are enough. Where the real operators load, nothing is done.

Importing `diffusion_kd` does this. A command that imports torchvision without it, such as `accelerate launch`, needs
`install_startup_line` once (`make install` calls it): where operators are missing it leaves a line in the environment
that imports this package before torchvision.
"""

import importlib.machinery
import importlib.util
import pathlib
import sysconfig

import torch

_OPERATORS = ("nms", "qnms")
_library: torch.library.Library | None = None

_STARTUP = (
    'import sys; sys.meta_path.insert(0, type("BeforeTorchvision", (), {"find_spec": staticmethod('
    "lambda name, path=None, target=None: "
    '__import__("diffusion_kd") and None if name == "torchvision" else None)})())\n'
)


def ensure_operators() -> None:
    """Define the schemas of torchvision's missing operators. Call before torchvision's first import; idempotent."""
    global _library
    if _library is not None or _compiled_operators_load():
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        compiled = pathlib.Path(spec.origin).parent / f"_C{suffix}"
        if compiled.exists():
            try:
                torch.ops.load_library(str(compiled))
            except OSError:
                return False
            return True
    return False


def install_startup_line() -> None:
    """Let every command of this environment import torchvision, where its operators are missing; idempotent."""
    if _library is not None:
        pathlib.Path(sysconfig.get_path("purelib"), "torchvision_operators.pth").write_text(_STARTUP)
