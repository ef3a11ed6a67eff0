"""What a distillation takes, before any weight is loaded: parameters, memory, time, money, and whether it fits.

Memory is not estimated by formula: one step is rehearsed on fake tensors (`training.rehearsal`), and so is each switch
that may help. What a rehearsal of one process cannot see is added here: what DDP and FSDP2 hold, and the eight-bit
optimizer's state.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffusion_kd import artifact, errors
from diffusion_kd.networks import sdxl
from training import networks, rehearsal

if TYPE_CHECKING:
    from training import distill

RESERVED_GB = 1.0
"""Of a CUDA device, for what no tensor of ours holds: the context, the libraries' workspaces, gaps."""

_GIGA = 1e9
_LORA_RANK = 64
_EIGHT_BIT_FROM = 4096  # weights; smaller tensors keep float32 state (bitsandbytes' min_8bit_size)
_EIGHT_BIT_BLOCK = 256  # values that share a float32 scale
_COMMUNICATION = "communication buffers"


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What a run would run on.

    world: devices, one process on each. device_gb: memory of one, in 10^9 bytes. cuda: else CPUs.
    device_tflops: of one at its best, in 10^12 operations a second, at the run's precision (dense).
    utilisation: share of it that a training reaches: an assumption. price_usd: of one for an hour; 0: not known.
    images_per_s: measured, of all devices together; 0: the time is reckoned from operations.
    """

    world: int = 1
    device_gb: float = 80.0
    cuda: bool = True
    device_tflops: float = 312.0
    utilisation: float = 0.35
    price_usd: float = 0.0
    images_per_s: float = 0.0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("world", self.world >= 1, "1 or more"),
            ("device_gb", 0 < self.device_gb < math.inf, "a number above 0"),
            ("device_tflops", 0 < self.device_tflops < math.inf, "a number above 0"),
            ("utilisation", 0 < self.utilisation <= 1, "a share above 0 and up to 1"),
            ("price_usd", 0 <= self.price_usd < math.inf, "0 (not known) or more"),
            ("images_per_s", 0 <= self.images_per_s < math.inf, "0 (not measured) or more"),
        ):
            errors.require(fits, name, getattr(self, name), wanted)

    @property
    def usable_gb(self) -> float:
        return self.device_gb - RESERVED_GB if self.cuda else self.device_gb


@dataclasses.dataclass(frozen=True, slots=True)
class Switch:
    """Settings that take another amount of memory, rehearsed. settings: as on the command line."""

    settings: str
    peak_gb: float
    fits: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What a run takes. Memory is of one device, in 10^9 bytes.

    parameters: network -> number. at_peak_gb, at_most_gb: part -> memory at the fullest moment, and the most that it
        ever has. peak_moment: what is running then. tera_operations: 10^12 operations an image. rehearsed_s: what this
        plan took.
    """

    teacher: str
    size_px: int
    machine: Machine
    micro_batch: int
    parameters: dict[str, int]
    at_peak_gb: dict[str, float]
    at_most_gb: dict[str, float]
    peak_gb: float
    peak_moment: str
    fits: bool
    steps: int
    images: int
    tera_operations: float
    switches: tuple[Switch, ...]
    rehearsed_s: float

    @property
    def images_per_s(self) -> float:
        """Of all devices together: as measured, else from operations."""
        machine = self.machine
        speed = machine.device_tflops * machine.utilisation * machine.world
        return machine.images_per_s or speed / self.tera_operations

    @property
    def device_hours(self) -> float:
        return self.images / self.images_per_s / 3600 * self.machine.world

    @property
    def cost_usd(self) -> float:
        return self.device_hours * self.machine.price_usd


def make(
    config: "distill.DistillConfig",
    teacher: str,
    machine: Machine | None = None,
    *,
    cached: bool = False,
    goes_on: bool = False,
    base: str | None = None,
    architectures: rehearsal.Architectures | None = None,
    switches: bool | None = None,
) -> Plan:
    """Plan a run of `config` from a teacher by name: its config files are read, its weights are not.

    cached: latents and text come from a prepared cache. goes_on: from an earlier student, as of --student. base: of a
        teacher that is a single file.
    architectures: the networks, if they are at hand.
    switches: whether to rehearse them; None: if the run does not fit.
    Raises ConfigError if the batch cannot be shared among the devices, ModelError for a teacher that cannot be read.
    """
    began = time.monotonic()
    machine = machine or Machine()
    architectures = architectures or _architectures(config, teacher, base)
    planner = _Planner(config, architectures, machine, cached=cached, goes_on=goes_on)
    found = planner.rehearse(config)
    peak = planner.peak(config, found)
    fits = peak.total_bytes / _GIGA <= machine.usable_gb
    wanted = not fits if switches is None else switches
    tried = tuple(planner.switches()) if wanted else ()
    return Plan(
        teacher=teacher,
        size_px=planner.size_px,
        machine=machine,
        micro_batch=planner.micro_batch(config),
        parameters=found.parameters,
        at_peak_gb={part: size / _GIGA for part, size in peak.parts.items()},
        at_most_gb={part: size / _GIGA for part, size in planner.most(config, found).items()},
        peak_gb=peak.total_bytes / _GIGA,
        peak_moment=peak.moment,
        fits=fits,
        steps=config.training.images // config.training.batch_size,
        images=config.training.images,
        tera_operations=found.flops * machine.world / config.training.batch_size / 1e12,
        switches=tried,
        rehearsed_s=time.monotonic() - began,
    )


class _Planner:
    """Rehearsals of a run and of what it might be instead, on one machine."""

    def __init__(
        self,
        config: "distill.DistillConfig",
        architectures: rehearsal.Architectures,
        machine: Machine,
        *,
        cached: bool,
        goes_on: bool,
    ) -> None:
        self.size_px = config.size_px or architectures.parts.size_px
        self._config, self._architectures, self._machine = config, architectures, machine
        self._cached, self._goes_on = cached, goes_on
        self._rehearsed: dict[str, rehearsal.Rehearsal] = {}
        errors.require(
            self.size_px % architectures.parts.downscale == 0,
            "size_px",
            self.size_px,
            f"a multiple of {architectures.parts.downscale}",
        )

    def micro_batch(self, config: "distill.DistillConfig") -> int:
        parts = self._machine.world * config.training.accumulate
        if config.training.batch_size % parts:
            raise errors.ConfigError(
                f"batch_size {config.training.batch_size} cannot be shared among {self._machine.world} processes with "
                f"accumulate={config.training.accumulate}; it must be a multiple of {parts}"
            )
        return config.micro_batch(self._machine.world)

    def rehearse(self, config: "distill.DistillConfig") -> rehearsal.Rehearsal:
        """Once for all configs that differ only in what `_beyond_one_process` adds."""
        count = self.micro_batch(config)
        config = dataclasses.replace(config, optimizer="adamw", parallel="ddp")
        if repr(config) not in self._rehearsed:
            tiny = None
            if config.pixel_decoder:
                channels = self._architectures.parts.vae.config.latent_channels
                tiny = self._architectures.tiny_decoder or sdxl.build_tiny_decoder("meta", channels)
            architectures = dataclasses.replace(self._architectures, tiny_decoder=tiny)
            self._rehearsed[repr(config)] = rehearsal.rehearse(
                config,
                architectures,
                micro_batch=count,
                size_px=self.size_px,
                cached=self._cached,
                goes_on=self._goes_on,
                cuda=self._machine.cuda,
            )
        return self._rehearsed[repr(config)]

    def peak(self, config: "distill.DistillConfig", found: rehearsal.Rehearsal) -> Any:
        scale, extra = self._beyond_one_process(config, found)
        return found.trace.peak(scale, extra)

    def most(self, config: "distill.DistillConfig", found: rehearsal.Rehearsal) -> dict[str, int]:
        scale, extra = self._beyond_one_process(config, found)
        return {part: round(size * scale.get(part, 1)) for part, size in found.trace.most().items()} | extra

    def _beyond_one_process(
        self, config: "distill.DistillConfig", found: rehearsal.Rehearsal
    ) -> tuple[dict[str, float], dict[str, int]]:
        """Factors and additions (bytes) for what the rehearsal, one process with AdamW, has not seen."""
        scale: dict[str, float] = {}
        extra: dict[str, int] = {}
        if config.optimizer == "adamw8bit":
            scale[rehearsal.OPTIMIZER] = _eight_bit_share(found.trained)
        if self._machine.world > 1 and config.parallel == "fsdp2":
            student, heads = found.parameters["trained"], found.parameters["heads"]
            share = 1 / self._machine.world
            learnt = (student * share + heads) / (student + heads)
            scale |= {rehearsal.TRAINED: share, rehearsal.AVERAGE: share, rehearsal.CASTS: 0.0}
            scale |= {rehearsal.GRADIENTS: learnt, rehearsal.OPTIMIZER: learnt * scale.get(rehearsal.OPTIMIZER, 1.0)}
            extra[_COMMUNICATION] = _gathered_bytes(config, found.blocks)
        elif self._machine.world > 1:
            # DDP's buckets hold all gradients, all the time; gradients are views of them.
            scale[rehearsal.GRADIENTS] = 0.0
            extra[_COMMUNICATION] = 4 * sum(shape.numel() for shape in found.trained)
        return scale, extra

    def switches(self) -> Iterator[Switch]:
        """Each setting that may help by itself, then all together that go with each other, without LoRA and with it."""
        # Alone, fsdp2 shards nothing and stands in the way of others.
        now = _without_shards(self._config) if self._machine.world == 1 else self._config
        single, together = [], now
        for name, change in _changes(now, self._machine.world):
            changed = _apply(now, change)
            if changed is None:
                continue
            single.append((name, changed))
            if not name.startswith("lora_rank"):
                together = _apply(together, change) or together
        for name, changed in single:
            yield self._try(name, changed)
        if len(single) > 1:
            yield self._try("together" if self._config.lora_rank else "together, all weights", together)
        smallest = _apply(_without_shards(together), {"lora_rank": self._config.lora_rank or _LORA_RANK})
        if smallest is not None and not self._config.lora_rank:
            yield self._try("together, LoRA", smallest)

    def _try(self, name: str, config: "distill.DistillConfig") -> Switch:
        peak_gb = self.peak(config, self.rehearse(config)).total_bytes / _GIGA
        return Switch(name, peak_gb, peak_gb <= self._machine.usable_gb)


def _changes(config: "distill.DistillConfig", world: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What may make a run fit, as (what to write, keys and values), the least invasive first."""
    yield "gradient_checkpointing=true", {"gradient_checkpointing": True}
    if config.precision == "bf16" and config.frozen_precision == "fp32":
        yield "frozen_precision=bf16", {"frozen_precision": "bf16"}
    most = config.training.batch_size // world
    if most > config.training.accumulate:
        yield f"training.accumulate={most}", {"training.accumulate": most}
    if not config.pixel_decoder:
        yield "pixel_decoder=madebyollin/taesdxl", {"pixel_decoder": "madebyollin/taesdxl"}
    if world > 1:
        yield "parallel=fsdp2", {"parallel": "fsdp2"}
    yield "optimizer=adamw8bit", {"optimizer": "adamw8bit"}
    if not config.lora_rank:
        sharded = config.parallel == "fsdp2"
        name = f"lora_rank={_LORA_RANK}" + (" parallel=ddp" if sharded else "")
        yield name, {"lora_rank": _LORA_RANK, "parallel": "ddp"}


def _apply(config: "distill.DistillConfig", change: Mapping[str, Any]) -> "distill.DistillConfig | None":
    """A config with changes; None if they change nothing or contradict what stands."""
    own = {key: value for key, value in change.items() if "." not in key}
    nested = {key.partition(".")[2]: value for key, value in change.items() if "." in key}
    try:
        changed = dataclasses.replace(config, **own, training=dataclasses.replace(config.training, **nested))
    except errors.ConfigError:
        return None
    return None if changed == config else changed


def _without_shards(config: "distill.DistillConfig") -> "distill.DistillConfig":
    """Adapters are not sharded."""
    return _apply(config, {"parallel": "ddp"}) or config


def _eight_bit_share(shapes: tuple[torch.Size, ...]) -> float:
    """Bytes of bitsandbytes' AdamW state over those of torch's: two moments a weight, of 8 bits or of 32."""
    whole = eight = 0
    for count in (shape.numel() for shape in shapes):
        whole += 8 * count
        eight += 2 * (count + 4 * -(-count // _EIGHT_BIT_BLOCK)) if count >= _EIGHT_BIT_FROM else 8 * count
    return eight / whole


def _gathered_bytes(config: "distill.DistillConfig", blocks: tuple[int, int]) -> int:
    """What FSDP2 holds beside its shards: of the block at work and the next, weights as gathered, and gradients as
    they come and as float32 to be summed; of what is in no block, the same all along."""
    largest, rest = blocks
    width = 2 if config.precision == "bf16" else 4
    return (2 * largest + rest) * (2 * width + 4)


def _architectures(config: "distill.DistillConfig", teacher: str, base: str | None) -> rehearsal.Architectures:
    parts = artifact.architecture(teacher, base=base)
    return rehearsal.Architectures(
        parts, networks.feature_architecture(config.feature_network, config.size_px or parts.size_px)
    )


def table(plan: Plan) -> str:
    """The plan as a page of plain text."""
    machine = plan.machine
    kind = "CUDA device" if machine.cuda else "CPU process"
    lines = [
        f"{plan.teacher} at {plan.size_px} px on {machine.world} {kind}{'s' if machine.world > 1 else ''}, "
        f"{plan.micro_batch} images at a time on each; rehearsed in {plan.rehearsed_s:.0f} s, no weights read",
        "",
        f"{'parameters':34}{'millions':>12}",
        *(f"  {name:32}{count / 1e6:>12,.1f}" for name, count in plan.parameters.items()),
        "",
        f"{'memory of one device, GB (10^9)':34}{'at the peak':>12}{'at most':>12}",
    ]
    shown = sorted(plan.at_most_gb, key=lambda part: -max(plan.at_peak_gb.get(part, 0), plan.at_most_gb[part]))
    small = 0.0005 * plan.peak_gb
    for part in shown:
        at_peak, at_most = plan.at_peak_gb.get(part, 0.0), plan.at_most_gb[part]
        if max(at_peak, at_most) >= small:
            lines.append(f"  {part:32}{at_peak:>12.3f}{at_most:>12.3f}")
    lines += [f"  {'in all':32}{plan.peak_gb:>12.3f}", f"  the peak is in: {plan.peak_moment}", ""]
    lines += [*_time_lines(plan), "", *_verdict_lines(plan)]
    return "\n".join(lines)


def _time_lines(plan: Plan) -> list[str]:
    machine = plan.machine
    if machine.images_per_s:
        source = f"measured, {machine.images_per_s:g} images/s"
    else:
        source = (
            f"reckoned: {plan.tera_operations:.1f} tera-operations an image, counted; {machine.device_tflops:g} TFLOPS "
            f"a device at {machine.utilisation:.0%}, assumed; {plan.images_per_s:.2f} images/s"
        )
    price = (
        f"{plan.cost_usd:,.2f} USD at {machine.price_usd:g} USD an hour" if machine.price_usd else "give --price-usd"
    )
    return [
        f"{'steps':34}{plan.steps:>12,}",
        f"{'images':34}{plan.images:>12,}",
        f"{'device hours':34}{plan.device_hours:>12,.1f}   {source}",
        f"{'wall hours':34}{plan.device_hours / machine.world:>12,.1f}",
        f"{'cost':34}{'':>12}   {price}",
    ]


def _verdict_lines(plan: Plan) -> list[str]:
    machine = plan.machine
    limit = f"{machine.device_gb:g} GB"
    limit += f" less {RESERVED_GB:g} GB for CUDA itself" if machine.cuda else ""
    lines = [f"{'FITS' if plan.fits else 'DOES NOT FIT'}: {plan.peak_gb:.2f} GB of {limit}"]
    if plan.switches:
        lines += ["", f"{'with':34}{'peak, GB':>12}"]
        lines += [
            f"  {switch.settings:32}{switch.peak_gb:>12.3f}  {'fits' if switch.fits else 'does not fit'}"
            for switch in plan.switches
        ]
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `--plan`, in a group of their own."""
    group = parser.add_argument_group("plan")
    default = Machine()
    group.add_argument("--plan", action="store_true", help="say what the run will take, and read no weights")
    group.add_argument("--world", type=int, default=default.world, help="devices, all nodes together")
    group.add_argument("--device-gb", type=float, default=default.device_gb, help="memory of one, 10^9 bytes")
    group.add_argument("--cpu", action="store_true", help="plan for CPU processes")
    group.add_argument(
        "--device-tflops", type=float, default=default.device_tflops, help="of one, dense, at the run's precision"
    )
    group.add_argument("--utilisation", type=float, default=default.utilisation, help="share of it that is reached")
    group.add_argument("--price-usd", type=float, default=default.price_usd, help="of one device for an hour")
    group.add_argument("--images-per-s", type=float, default=0.0, help="measured, of all devices; instead of reckoning")
    group.add_argument("--switches", action="store_true", help="rehearse what would take less, even if the run fits")


def machine_of(given: argparse.Namespace) -> Machine:
    """The machine that the options of `add_arguments` describe. Raises ConfigError."""
    return Machine(
        world=given.world,
        device_gb=given.device_gb,
        cuda=not given.cpu,
        device_tflops=given.device_tflops,
        utilisation=given.utilisation,
        price_usd=given.price_usd,
        images_per_s=given.images_per_s,
    )


def show(config: "distill.DistillConfig", teacher: str, given: argparse.Namespace, *, cached: bool = False) -> Plan:
    """Write the plan to stdout; what `--plan` does. Raises as `make` does."""
    if given.student is not None:
        artifact.resolve(given.student, ())
    plan = make(
        config,
        teacher,
        machine_of(given),
        cached=cached,
        goes_on=given.student is not None,
        base=given.base,
        switches=given.switches or None,
    )
    sys.stdout.write(table(plan) + "\n")
    return plan
