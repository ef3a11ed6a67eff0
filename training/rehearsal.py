"""One step of a distillation, rehearsed without weights: the objective's own code on fake tensors, under a ledger.

Fake tensors have shapes, types and storages of a size, and no numbers. The rehearsal runs what a training runs (batch,
phases forward and backward, clipping, optimizers, average), so that a plan and the step cannot drift apart. Random
draws are true ones: which example is treated how is decided as in training.
"""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from diffusion_kd import pipeline
from diffusion_kd.conditioning import time_ids
from diffusion_kd.networks import attention, features
from diffusion_kd.networks.parts import Parts
from diffusion_kd.objectives import add
from diffusion_kd.objectives.base import Batch, Phase
from diffusion_kd.types import Conditioning
from training import average, compute, ledger, networks, parallel

if TYPE_CHECKING:
    from training import distill

GRADIENTS, OPTIMIZER, AVERAGE = "gradients", "optimizer state", "average (EMA)"
TRAINED, HEADS, CASTS = "student weights", "head weights", ledger.CASTS

_CUDA_BLOCK_BYTES = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Architectures:
    """What takes part: on `meta` nothing reads weights. tiny_decoder: None without one."""

    parts: Parts
    feature_network: features.FeatureNetwork
    tiny_decoder: nn.Module | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a step takes on one device.

    parameters: network -> number of weights; of the student's, `trained` learn.
    trained: shape of every weight that learns, the student's and the heads'.
    blocks: weights of the largest block that fsdp2 shards by itself, and of all that it gathers once for the step.
    flops: of a whole step on this device, all its micro-batches.
    """

    trace: ledger.Trace
    parameters: dict[str, int]
    trained: tuple[torch.Size, ...]
    blocks: tuple[int, int]
    flops: int


def rehearse(
    config: "distill.DistillConfig",
    architectures: Architectures,
    *,
    micro_batch: int,
    size_px: int,
    cached: bool = False,
    goes_on: bool = False,
    cuda: bool = True,
) -> Rehearsal:
    """Run one step on micro-batches of `micro_batch` squares of `size_px`.

    cached: latents and text come from a prepared cache, so nothing is encoded. goes_on: from an earlier student, which
        then is a second network beneath adapters too.
    cuda: arithmetic and allocation as on CUDA; else as on a CPU. `compile` is not rehearsed.
    """
    backend = config.attention
    if backend == "auto" or (cuda and backend == "xformers"):
        backend = attention.choose("auto", torch.device("cuda" if cuda else "cpu"))
    config = dataclasses.replace(config, attention=backend, compile=False, optimizer="adamw")
    return _Stage(config, architectures, micro_batch, size_px, cached=cached, goes_on=goes_on, cuda=cuda).run()


class _Stage:
    """The networks as fake tensors, and the step that they run."""

    def __init__(
        self,
        config: "distill.DistillConfig",
        architectures: Architectures,
        micro_batch: int,
        size_px: int,
        *,
        cached: bool,
        goes_on: bool,
        cuda: bool,
    ) -> None:
        self._config, self._micro_batch, self._size_px, self._cached = config, micro_batch, size_px, cached
        self._cuda = cuda
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._ledger = ledger.Ledger(_CUDA_BLOCK_BYTES if cuda else 1)
        self._bones: dict[int, tuple[Tensor, Tensor]] = {}
        architectures = copy.deepcopy(architectures)
        self._parts = architectures.parts
        self._objective = self._make_objective(architectures, goes_on)
        self._phases = self._objective.phases
        with self._fake:
            self._optimizers = [self._make_optimizer(phase) for phase in self._phases]
            self._average = self._make_average()
        self._note_all()
        self._watch_all()

    def run(self) -> Rehearsal:
        micro_batches = self._config.training.accumulate
        rehearsed = min(micro_batches, 2)  # from the second on, gradients stand by while a forward pass runs
        with contextlib.ExitStack() as stack:
            if self._cuda:
                stack.enter_context(ledger.CudaAutocast())
            stack.enter_context(self._ledger)
            self._step(rehearsed)
        trace = self._ledger.trace()
        trained = tuple(weight.shape for phase in self._phases for weight in _learning(phase))
        flops = sum(trace.flops.values()) * micro_batches // rehearsed
        return Rehearsal(trace, self._parameters(), trained, self._blocks(), flops)

    # --- who takes part ---

    def _make_objective(self, architectures: Architectures, goes_on: bool) -> add.ADD:
        """As a training makes it, of weights without numbers; then fake tensors take their places."""
        parts, tiny_decoder = architectures.parts, architectures.tiny_decoder
        objective = networks.make_objective(
            self._config,
            parts,
            feature_network=architectures.feature_network,
            device=torch.device("meta"),
            tiny_decoder=tiny_decoder,
            student=copy.deepcopy(parts.denoiser()) if goes_on else None,
        )
        for module in (objective.student, objective.teacher, objective.heads, objective.feature_network):
            self._strip(module)
        for module in (parts.vae, parts.text, *([tiny_decoder] if tiny_decoder is not None else ())):
            self._strip(module)
        return objective

    def _strip(self, module: nn.Module) -> None:
        """Put fake tensors in the place of a module's."""
        for part in module.modules():
            for owned in (part._parameters, part._buffers):
                for name, tensor in owned.items():
                    if tensor is not None:
                        owned[name] = self._bone(tensor)

    def _bone(self, tensor: Any) -> Any:
        """The fake tensor that stands for a tensor, the same for all who share it."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._bones:
            with self._fake:
                bone: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                bone = nn.Parameter(bone, tensor.requires_grad)
            self._bones[id(tensor)] = (tensor, bone)
        return self._bones[id(tensor)][1]

    def _make_optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """With its state, which a first step makes."""
        trained = _learning(phase)
        optimizer = compute.make_optimizer(self._config, trained, 1e-4, (0.0, 0.99), 0.0)
        for weight in trained:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def _make_average(self) -> average.Average | None:
        decay = self._config.training.ema_decay
        return average.Average(self._objective.student.unet, decay) if decay else None

    def _note_all(self) -> None:
        objective, note = self._objective, self._ledger.note
        for weight in _learning(objective.student):
            note(weight, TRAINED, weight=True)
        for label, module in (
            (HEADS, objective.heads),
            ("teacher weights", objective.teacher),
            ("frozen student weights", objective.student),  # none where they are the teacher's
            ("VAE weights", self._parts.vae),
            ("tiny decoder weights", objective.vae),
            ("text encoder weights", self._parts.text),
            ("feature network weights", objective.feature_network),
        ):
            for tensor in _tensors(module):
                note(tensor, label, weight=True)
        for tensor in self._average.values.values() if self._average else ():
            note(tensor, AVERAGE)
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                for tensor in state.values():
                    note(tensor, OPTIMIZER)

    def _watch_all(self) -> None:
        objective, watch = self._objective, self._ledger.watch
        watch(objective.student, "student U-Net")
        watch(objective.teacher, "teacher U-Net")
        watch(objective.vae.decoder, "decoder")
        watch(objective.feature_network, "feature network")
        for heads in objective.heads.values():
            watch(heads, "heads")
        for phase in self._phases:
            for weight in _learning(phase):
                weight.register_post_accumulate_grad_hook(self._rename_gradient)

    def _rename_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None, "the hook runs after the gradient is there"
        self._ledger.rename([weight.grad], GRADIENTS)

    # --- what they do ---

    def _step(self, micro_batches: int) -> None:
        """As `training.loop` takes it."""
        for index in range(micro_batches):
            batch = self._batch(index)
            for phase in self._phases:
                self._pass(phase, batch)
        for phase, optimizer in zip(self._phases, self._optimizers, strict=True):
            self._ledger.turn = f"{phase.name}, optimizer"
            nn.utils.clip_grad_norm_(_learning(phase), self._config.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._ledger.turn = "average"
        if self._average is not None:
            self._average.update()

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._config.precision == "bf16")

    def _pass(self, phase: Phase, batch: Batch) -> None:
        self._ledger.turn = f"{phase.name}, forward"
        with self._autocast():
            losses = phase(batch)
        self._ledger.turn = f"{phase.name}, backward"
        ledger.backward(torch.stack([loss.float() for loss in losses.values()]).sum())

    @torch.no_grad()
    def _batch(self, index: int) -> Batch:
        """Examples of step 0, at which a lazy R1 is due."""
        self._ledger.turn = "batch"
        count, size_px, parts, dtype = self._micro_batch, self._size_px, self._parts, self._config.frozen_dtype
        encoders, cells = parts.text, size_px // parts.downscale
        configs = [encoder.config for encoder in (encoders.text_encoder, encoders.text_encoder_2)]
        with self._fake:
            images = torch.empty((count, 3, size_px, size_px))
            latents = torch.empty((count, parts.vae.config.latent_channels, cells, cells))
            tokens = torch.zeros((count, configs[0].max_position_embeddings), dtype=torch.int64)
            states = torch.empty((*tokens.shape, sum(config.hidden_size for config in configs)), dtype=dtype)
            pooled = torch.empty((count, configs[1].projection_dim), dtype=dtype)
            cond = Conditioning(states, pooled, time_ids(count, (size_px, size_px)))
        with self._autocast(), self._ledger.during("encoders"):
            if not self._cached:
                latents = parts.encode_images(images)
                cond = encoders(tokens, tokens, (size_px, size_px))
            elif self._config.objective.looks:
                images = self._objective.decode(latents)
        negative = cond if self._config.objective.weighting == "nfsd" else None
        rows = range(index * count, (index + 1) * count)
        return Batch(images, latents, cond, pipeline.no_prompt(cond), negative, step=0, rows=rows, seed=(0,))

    # --- what is to be told of it ---

    def _parameters(self) -> dict[str, int]:
        objective = self._objective
        return {
            "student": _count(objective.student),
            "trained": sum(weight.numel() for weight in _learning(objective.student)),
            "teacher": _count(objective.teacher) - self._adapters(),
            "VAE": _count(self._parts.vae),
            "decoder of the losses": _count(objective.vae),
            "text encoders": _count(self._parts.text),
            "feature network": _count(objective.feature_network),
            "heads": _count(objective.heads),
        }

    def _adapters(self) -> int:
        return sum(weight.numel() for weight in _learning(self._objective.teacher)) if self._config.lora_rank else 0

    def _blocks(self) -> tuple[int, int]:
        unet = self._objective.student.unet
        sharded = [_count(module) for module in unet.modules() if type(module).__name__ in parallel.SHARDED]
        return max(sharded, default=0), _count(unet) - sum(sharded)


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module.parameters() if weight.requires_grad]


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
