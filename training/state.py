"""Everything of a training that must outlive its process: trained weights, optimizers, the average.

Whole tensors go in and out, however they are spread over processes, so a run may go on with another number of them.
"""

from collections.abc import Mapping
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from diffusion_kd import errors
from training import average, parallel


class State:
    """modules: by name; optimizers: of the same names. averaged: what is averaged, if anything."""

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        averaged: average.Average | None,
    ) -> None:
        self._main = accelerator.is_main_process
        self._modules, self._optimizers, self._average = modules, optimizers, averaged

    def collect(self) -> dict[str, Any]:
        """Tensors, numbers, lists and dicts, for a file. All processes must ask together; the main one gets it all."""
        content: dict[str, Any] = {}
        for name, module in self._modules.items():
            content[name] = self._whole(_kept(module))
            content[f"{name}_optimizer"] = self._whole(self._optimizers[name].state_dict())
        if self._average is not None:
            content["average"] = {"updates": self._average.updates, "values": self._whole(self._average.values)}
        return content

    @torch.no_grad()
    def restore(self, content: Mapping[str, Any]) -> None:
        """Take over what `collect` gave. Raises ConfigError if it is of other networks or settings."""
        try:
            for name, module in self._modules.items():
                _copy_all(_kept(module), content[name])
                self._restore_optimizer(name, content[f"{name}_optimizer"])
            if self._average is not None:
                _copy_all(self._average.values, content["average"]["values"])
                self._average.updates = int(content["average"]["updates"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise errors.ConfigError(
                f"the checkpoint is of another configuration ({errors.first_line(error)}); "
                "use its own config, or another folder with --out"
            ) from None

    def _restore_optimizer(self, name: str, content: Mapping[str, Any]) -> None:
        optimizer = self._optimizers[name]
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        if len(content["param_groups"][0]["params"]) != len(weights):
            raise ValueError(f"{name}'s optimizer knows {len(content['param_groups'][0]['params'])} weights")
        spread = {
            index: {
                key: parallel.like(value.clone(), weights[index]) if _is_of(value, weights[index]) else value
                for key, value in values.items()
            }
            for index, values in content["state"].items()
        }
        optimizer.load_state_dict({"state": spread, "param_groups": content["param_groups"]})

    def _whole(self, content: Any) -> Any:
        """Tensors made whole, on the CPU; other processes than the main one take part and keep nothing."""
        if isinstance(content, Tensor):
            full = parallel.whole(content.detach())
            return full.cpu() if self._main else None
        if isinstance(content, Mapping):
            return {key: self._whole(value) for key, value in content.items()}
        return [self._whole(value) for value in content] if isinstance(content, list) else content


def _kept(module: nn.Module) -> dict[str, Tensor]:
    """What of a module changes in training: weights that learn, and buffers."""
    trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    return trained | dict(module.named_buffers())


def _is_of(value: object, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape


def _copy_all(targets: Mapping[str, Tensor], content: Mapping[str, Tensor]) -> None:
    if targets.keys() != content.keys():
        differing = sorted(targets.keys() ^ content.keys())
        raise ValueError(f"{len(differing)} weights are on one side alone, {differing[0]} among them")
    for name, target in targets.items():
        if target.shape != content[name].shape:
            raise ValueError(f"{name} is {tuple(content[name].shape)} there and {tuple(target.shape)} here")
        target.copy_(parallel.like(content[name], target))
