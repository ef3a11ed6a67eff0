"""How a training computes: precision, memory, processes. It is about time and memory, and hardly changes what is
learnt (LoRA apart, which is a smaller student)."""

import contextlib
import ctypes
import dataclasses
import datetime
import logging
from collections.abc import Iterator
from typing import Any

import accelerate
import torch
from accelerate import InitProcessGroupKwargs
from torch import nn

from diffusion_kd import artifact, errors
from diffusion_kd.networks import attention, lora

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's mallopt

_LAUNCHERS = (
    accelerate.DistributedType.NO,
    accelerate.DistributedType.MULTI_CPU,
    accelerate.DistributedType.MULTI_GPU,
)


@dataclasses.dataclass
class ComputeConfig:
    """How a U-Net is trained on the machines at hand.

    precision: fp32 or bf16, of the trained networks' arithmetic. Trained weights, x0 and losses stay float32.
    frozen_precision: fp32, bf16 or fp16, in which networks that do not learn stay in memory; other than fp32 it needs
        precision=bf16. An autoencoder that overflows in half precision, as SDXL's does, stays float32 under fp16.
    attention: auto, sdpa, xformers or plain; auto is sdpa on a GPU and plain on CPUs, whose backward pass is faster so.
    gradient_checkpointing: compute activations twice and keep few: about a third slower, a fraction of the memory.
    compile: torch.compile of the trained U-Net; the first steps take minutes.
    optimizer: adamw, or adamw8bit (bitsandbytes; CUDA), whose state takes 2 bytes a weight instead of 8.
    parallel: ddp, every process holds all; or fsdp2, which shards the trained U-Net, its gradients, its optimizer and
        its average over the processes.
    lora_rank: 0 trains all weights; above 0 trains low-rank adapters of that rank on the transformer blocks, and the
        teacher shares the frozen weights beneath. lora_alpha: their scale times the rank; 0 stands for the rank.
    """

    precision: str = "bf16"
    frozen_precision: str = "fp32"
    attention: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    optimizer: str = "adamw"
    parallel: str = "ddp"
    lora_rank: int = 0
    lora_alpha: int = 0

    def check(self) -> None:
        """Raise ConfigError for a value out of range or options that contradict each other."""
        for name, choices in (
            ("precision", ("fp32", "bf16")),
            ("frozen_precision", tuple(DTYPES)),
            ("attention", attention.BACKENDS),
            ("optimizer", ("adamw", "adamw8bit")),
            ("parallel", ("ddp", "fsdp2")),
        ):
            value = getattr(self, name)
            errors.require(value in choices, name, value, f"{', '.join(choices[:-1])} or {choices[-1]}")
        errors.require(0 <= self.lora_rank <= 1024, "lora_rank", self.lora_rank, "0 (all weights) to 1024")
        errors.require(self.lora_alpha >= 0, "lora_alpha", self.lora_alpha, "0 (the rank) or more")
        for contradicts, why in (
            (
                self.frozen_precision != "fp32" and self.precision == "fp32",
                f"frozen_precision={self.frozen_precision} with precision=fp32; give precision=bf16, or keep both fp32",
            ),
            (
                self.parallel == "fsdp2" and self.lora_rank > 0,
                "parallel=fsdp2 with lora_rank; adapters are small, so there is nothing to shard: give parallel=ddp",
            ),
            (
                self.parallel == "fsdp2" and self.optimizer == "adamw8bit",
                "parallel=fsdp2 with optimizer=adamw8bit, which does not know shards; give optimizer=adamw",
            ),
            (self.lora_alpha > 0 and not self.lora_rank, "lora_alpha without lora_rank; give lora_rank as well"),
        ):
            if contradicts:
                raise errors.ConfigError(f"options contradict each other: {why}")

    @property
    def frozen_dtype(self) -> torch.dtype:
        return DTYPES[self.frozen_precision]

    def decisive(self) -> dict[str, object]:
        """The settings that decide what is learnt or how a checkpoint looks."""
        names = ("precision", "frozen_precision", "optimizer", "lora_rank", "lora_alpha")
        return {name: getattr(self, name) for name in names}

    def prepare(self, unet: Any, device: torch.device) -> None:
        """Ready a U-Net to learn: all weights in float32, or adapters in float32 on the weights as they are."""
        if self.lora_rank:
            lora.add(unet, self.lora_rank, self.lora_alpha or self.lora_rank)
        else:
            unet.float().requires_grad_(True)
        attention.use(unet, self.attention, device)
        if self.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if self.compile:
            unet.compile()


def launch(config: ComputeConfig) -> accelerate.Accelerator:
    """This process among its fellows; they wait up to a day for one another, for one may draw or export alone.

    Raises ConfigError where accelerate was told to shard by itself, or optimizer=adamw8bit cannot run.
    """
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))
    precision = "no" if config.precision == "fp32" else config.precision
    # accelerate takes processes on CPUs for strangers to one another unless it is told that CPUs are meant.
    cpu = not torch.accelerator.is_available()
    accelerator = accelerate.Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[patience])
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.ERROR)  # all would say the same
    if accelerator.distributed_type not in _LAUNCHERS:
        raise errors.ConfigError(
            f"accelerate was launched for {accelerator.distributed_type.value}; launch it plainly (--multi_gpu) and "
            "say parallel=fsdp2 in the config"
        )
    return accelerator


@contextlib.contextmanager
def memory_kept(device: torch.device) -> Iterator[None]:
    """On a CPU, let glibc take large blocks from its heap meanwhile and give none back, as CUDA's allocator does.

    By itself it gives each back to the kernel, which clears its pages anew at the next use: a tenth of a step's time.
    Afterwards all is given back, and limits stand where glibc's own, which move, end up. Elsewhere it does nothing.
    """
    libc = None
    if device.type == "cpu":
        with contextlib.suppress(OSError):
            libc = ctypes.CDLL("libc.so.6")
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        for option, value in ((_MMAP_MAX, 65_536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20)):
            libc.mallopt(option, value)
        libc.malloc_trim(0)


def load_teacher(config: ComputeConfig, name: str, *, base: str | None = None, size_px: int = 0) -> artifact.Parts:
    """In full precision, as all its weights may learn; beneath adapters the precision to keep will do.

    base: configs and tokenizers of a single file. size_px: see `sized`. Raises ModelError, ConfigError.
    """
    dtype = config.frozen_dtype if config.lora_rank else torch.float32
    return sized(artifact.load(name, dtype=dtype, base=base), size_px)


def sized(parts: artifact.Parts, size_px: int) -> artifact.Parts:
    """The same parts, to be trained and sampled at `size_px`; 0: at their own.

    Raises ConfigError for a size that the networks cannot make.
    """
    if size_px:
        errors.require(
            size_px % parts.multiple_px == 0, "size_px", size_px, f"a multiple of {parts.multiple_px} for this teacher"
        )
        parts.unet.register_to_config(sample_size=size_px // parts.downscale)
    return parts


def close(accelerator: accelerate.Accelerator) -> None:
    """Leave together: a process that goes while another still waits for it ends the other with an error."""
    accelerator.wait_for_everyone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def make_optimizer(
    config: ComputeConfig, trained: list[nn.Parameter], learning_rate: float, betas: tuple[float, float], decay: float
) -> torch.optim.Optimizer:
    """AdamW over `trained`. Raises ConfigError where optimizer=adamw8bit cannot run."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(trained, learning_rate, betas=betas, weight_decay=decay, fused=True)
    if trained[0].device.type != "cuda":
        raise errors.ConfigError("optimizer=adamw8bit runs on CUDA alone and there is none here; give optimizer=adamw")
    try:
        import bitsandbytes
    except ImportError:
        raise errors.ConfigError(
            "optimizer=adamw8bit needs the package bitsandbytes; pip install bitsandbytes, or give optimizer=adamw"
        ) from None
    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(trained, learning_rate, betas=betas, weight_decay=decay)
    return made
