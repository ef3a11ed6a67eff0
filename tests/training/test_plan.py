"""Plans: memory against what a true training takes, and what a plan says of SDXL, of processes and of money."""

import dataclasses
import pathlib
from typing import Any

import pytest
import torch

from benchmarks import training_step
from diffusion_kd import artifact, errors
from diffusion_kd.networks import sdxl
from tests import toys
from training import distill, ledger, loop, networks, plan, rehearsal

SIZE_PX = 32  # larger than the toys' own, so that activations weigh as much as weights


def config_of(**settings: Any) -> distill.DistillConfig:
    training = {name.removeprefix("training_"): settings.pop(name) for name in list(settings) if "training_" in name}
    length = {"images": 16, "batch_size": 8, "learning_rate": 1e-4, "ema_decay": 0.9, "trackers": []} | training
    settings = {"precision": "fp32", "size_px": SIZE_PX} | settings
    return distill.DistillConfig(training=loop.LoopConfig(**length), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="full"),
        pytest.param({"gradient_checkpointing": True, "precision": "bf16", "training_accumulate": 2}, id="frugal"),
        pytest.param({"precision": "bf16", "frozen_precision": "bf16", "lora_rank": 4}, id="lora"),
    ],
)
def test_the_planned_peak_is_what_a_training_takes(
    settings: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(**settings)
    architectures = rehearsal.Architectures(toys.tiny_parts(), toys.ToyFeatures())
    planned = plan.make(config, "toy", plan.Machine(cuda=False), architectures=architectures)
    monkeypatch.setattr(networks, "load_feature_network", lambda name, size_px: toys.ToyFeatures())
    measured = training_step.measured_bytes(
        lambda: distill.Distillation(
            config, "toy", training_step.Drawn(16, SIZE_PX), tmp_path, parts=toys.tiny_parts()
        ),
        tmp_path,
    )
    assert planned.peak_gb * 1e9 == pytest.approx(measured, rel=0.02)


def test_who_goes_on_from_a_student_has_a_second_network_beneath_the_adapters() -> None:
    config = config_of(precision="bf16", frozen_precision="bf16", lora_rank=4)
    architectures = rehearsal.Architectures(toys.tiny_parts(), toys.ToyFeatures())
    begins, goes_on = (
        plan.make(config, "toy", plan.Machine(cuda=False), architectures=architectures, goes_on=goes_on)
        for goes_on in (False, True)
    )
    own = 4e-9 * (begins.parameters["student"] - begins.parameters["trained"])
    assert goes_on.at_peak_gb["frozen student weights"] == pytest.approx(own, rel=0.01)
    assert "frozen student weights" not in begins.at_peak_gb
    assert goes_on.at_peak_gb["teacher weights"] == pytest.approx(own / 2, rel=0.01)


def plan_of(machine: plan.Machine | None = None, *, switches: bool | None = None, **settings: Any) -> plan.Plan:
    """Latent heads and distances alone: no pixel is decoded, so that it takes little time."""
    objective = distill.add.ADDConfig(adversarial_weight=0.0, distance_space="latent")
    architectures = rehearsal.Architectures(toys.tiny_parts(), toys.ToyFeatures())
    return plan.make(
        config_of(objective=objective, **settings),
        "toy",
        machine or plan.Machine(cuda=False),
        architectures=architectures,
        switches=switches,
    )


def test_sdxl_is_planned_without_its_weights() -> None:
    objective = distill.add.ADDConfig(adversarial_weight=0.0, distance_space="latent")
    config = config_of(objective=objective, precision="bf16", size_px=512, training_batch_size=1)
    with torch.device("meta"):
        eyes = toys.ToyFeatures()
    found = plan.make(
        config, "sdxl-base", plan.Machine(), architectures=rehearsal.Architectures(sdxl.build_parts(), eyes)
    )
    assert found.parameters["student"] == found.parameters["trained"] == 2_567_463_684
    assert found.at_peak_gb["student weights"] == pytest.approx(4 * 2.567463684, rel=1e-3)
    assert found.at_peak_gb["optimizer state"] == pytest.approx(8 * 2.567463684, rel=1e-3)
    assert found.at_peak_gb["average (EMA)"] == pytest.approx(4 * 2.567463684, rel=1e-3)
    # A U-Net's forward pass is 1.5 tera-operations at 512 px: three for learning, two for a guided teacher.
    assert 5 * 1.5 < found.tera_operations < 10


def test_a_single_file_is_planned_by_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def architecture(name: str, *, base: str | None = None) -> artifact.Parts:
        asked.append((name, base))
        return toys.tiny_parts()

    monkeypatch.setattr(artifact, "architecture", architecture)
    monkeypatch.setattr(networks, "feature_architecture", lambda name, size_px: toys.ToyFeatures())
    objective = ["objective.adversarial_weight=0", "objective.distance_space=latent", "training.batch_size=2"]
    distill.main(["--plan", "--teacher", "m.safetensors", "--base", "folder", f"size_px={SIZE_PX}", *objective])
    assert asked == [("m.safetensors", "folder")]


def test_processes_share_what_fsdp2_shards() -> None:
    alone = plan_of(training_batch_size=8)
    ddp = plan_of(plan.Machine(world=4, cuda=False), training_batch_size=32, training_images=32)
    fsdp = plan_of(plan.Machine(world=4, cuda=False), training_batch_size=32, training_images=32, parallel="fsdp2")
    assert ddp.micro_batch == alone.micro_batch == 8
    trained = 4e-9 * alone.parameters["trained"]
    assert ddp.at_peak_gb["communication buffers"] == pytest.approx(trained)
    assert ddp.at_most_gb["gradients"] == 0
    for part, most in (("student weights", trained), ("average (EMA)", trained), ("optimizer state", 2 * trained)):
        assert ddp.at_peak_gb[part] == pytest.approx(most, rel=0.01)
        assert fsdp.at_peak_gb[part] == pytest.approx(most / 4, rel=0.01)


def test_eight_bit_moments_take_a_quarter() -> None:
    big, small = torch.Size((4096, 256)), torch.Size((64,))
    assert plan._eight_bit_share((big,)) == pytest.approx(0.25, rel=0.02)
    assert plan._eight_bit_share((small,)) == 1


def test_a_run_that_does_not_fit_is_told_what_would_help() -> None:
    settings = {
        "gradient_checkpointing": True,
        "pixel_decoder": "tiny",
        "parallel": "fsdp2",
    }  # alone, it shards nothing
    roomy = plan_of(**settings)
    assert roomy.fits and roomy.switches == ()
    tight = plan_of(plan.Machine(cuda=False, device_gb=roomy.peak_gb * 0.9), **settings)
    assert not tight.fits and tight.peak_gb == roomy.peak_gb
    tried = {switch.settings: switch for switch in tight.switches}
    assert list(tried) == [
        *("training.accumulate=8", "optimizer=adamw8bit", "lora_rank=64"),
        *("together, all weights", "together, LoRA"),
    ]
    smaller = plan_of(**settings, training_accumulate=8)
    assert tried["training.accumulate=8"].peak_gb == smaller.peak_gb < roomy.peak_gb
    assert all(switch.fits == (switch.peak_gb <= roomy.peak_gb * 0.9) for switch in tight.switches)
    page = plan.table(tight)
    assert "DOES NOT FIT" in page and f"{smaller.peak_gb:.3f}" in page


@pytest.fixture(scope="module")
def planned() -> plan.Plan:
    return plan_of()


def test_time_and_money_follow_from_a_measured_rate(planned: plan.Plan) -> None:
    machine = plan.Machine(world=2, cuda=False, images_per_s=10.0, price_usd=3.0)
    found = dataclasses.replace(planned, machine=machine, images=72_000)
    assert found.device_hours == pytest.approx(4.0) and found.cost_usd == pytest.approx(12.0)
    assert "measured, 10 images/s" in plan.table(found) and "12.00 USD" in plan.table(found)


def test_time_is_else_reckoned_from_counted_operations(planned: plan.Plan) -> None:
    found = dataclasses.replace(planned, machine=plan.Machine(cuda=False, device_tflops=1.0, utilisation=0.5))
    assert found.images_per_s == pytest.approx(0.5 / found.tera_operations) and found.steps == 2
    assert "assumed" in plan.table(found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"world": 0}, "world is 0"), ({"device_gb": 0.0}, "device_gb is 0"), ({"utilisation": 1.5}, "utilisation")],
)
def test_a_machine_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        plan.Machine(**settings)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match="it must be a multiple of 3"):
        plan_of(plan.Machine(world=3, cuda=False))


def test_cuda_keeps_normalisation_in_float32() -> None:
    norm = torch.nn.LayerNorm(8)
    with ledger.CudaAutocast(), torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.zeros(2, 8, dtype=torch.bfloat16)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.zeros(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_ledger_counts_what_lives_and_forgets_what_dies() -> None:
    book = ledger.Ledger()
    with book:
        book.turn = "first"
        kept = torch.zeros(100)
        torch.ones(1000).sum()
        book.turn = "second"
        more = kept + 1
    trace = book.trace()
    peak = trace.peak()
    assert (peak.total_bytes, peak.moment) == (4 * 1100 + 4, "first")
    assert trace.peak({"first": 0.0}, {"held": 7}).parts == {"second": 4 * len(more), "held": 7}
