"""Several processes: gloo on CPUs, DDP and FSDP2, as `torchrun` and `accelerate launch` start them."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from diffusion_kd import artifact
from eval import runs
from tests import tiny
from training import checkpoint

PATIENCE_S = 240
STEP = 1e-4
"""The student's learning rate: about what Adam moves a weight by in a step."""

LOSSES = ("distillation", "adversarial", "hinge", "adversarial_latent", "hinge_latent", "r1")
GRADIENTS = ("student_gradient", "discriminator_gradient")
LENGTH = ["training.images=24", "training.batch_size=4", "training.log_every_steps=1", "training.sample_every_steps=3"]
METHOD = [
    "objective.latent_weight=0.1",
    "objective.r1_interval=2",
    "training.learning_rate=1e-4",
    "discriminator_learning_rate=1e-4",
]
"""Not the trajectory term in pixels: while student and teacher agree, its absolute difference has the sign of noise.
Low rates, as Adam makes a whole step of a gradient that is noise."""


def distil(
    models: pathlib.Path, pictures: pathlib.Path, out: pathlib.Path, *more: str, processes: int = 1, port: int = 0
) -> None:
    """In processes of its own; fails where one of them hangs."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", "-m"]
    given = tiny.arguments(models, out, "--data", str(pictures), *LENGTH, *METHOD, *more)
    finished = subprocess.run(
        [*launcher, "training.distill", *given],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def curves(out: pathlib.Path) -> dict[str, list[float]]:
    (run,) = runs.find(out)
    return {curve.tag: list(curve.values) for curve in runs.read(run).curves}


def state(out: pathlib.Path) -> dict[str, Any]:
    found = checkpoint.Checkpoints(out / "training" / checkpoint.FOLDER).newest()
    assert found is not None
    return found.state


@pytest.fixture(scope="module")
def alone(models: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    """The pictures, and a run of one process on them."""
    folder = tmp_path_factory.mktemp("alone")
    tiny.write_pictures(folder / "pictures")
    distil(models, folder / "pictures", folder / "one")
    return folder / "pictures", folder / "one"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does(
    parallel: str, models: pathlib.Path, alone: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    pictures, one = alone
    distil(models, pictures, tmp_path / "two", f"parallel={parallel}", processes=2)
    expected, found = curves(one), curves(tmp_path / "two")
    for tag in LOSSES:
        assert found[tag][:2] == pytest.approx(expected[tag][:2], rel=1e-4, abs=1e-6), tag
        assert found[tag] == pytest.approx(expected[tag], rel=5e-3, abs=1e-4), tag
        assert len(found[tag]) == (3 if tag == "r1" else 6)
    for tag in GRADIENTS:
        assert found[tag][0] == pytest.approx(expected[tag][0], rel=1e-5), tag
        assert found[tag] == pytest.approx(expected[tag], rel=2e-2), tag
    same_way(state(tmp_path / "two"), state(one), models)
    start = artifact.load(str(models / "teacher")).unet.state_dict()
    unets = [artifact.load(str(out / "student")).unet.state_dict() for out in (one, tmp_path / "two")]
    for name, weight in start.items():
        torch.testing.assert_close(unets[1][name] - weight, unets[0][name] - weight, rtol=0, atol=STEP, msg=name)


def same_way(ours: dict[str, Any], theirs: dict[str, Any], models: pathlib.Path) -> None:
    """Whether two trainings moved the weights alike from the teacher's: nearly all, by far less than they moved."""
    start = {
        f"student.unet.{key}": value for key, value in artifact.load(str(models / "teacher")).unet.state_dict().items()
    }
    pairs = [(ours["student"][key] - start[key], theirs["student"][key] - start[key]) for key in theirs["student"]]
    apart = torch.cat([(a - b).flatten().abs() for a, b in pairs])
    moved = torch.cat([b.flatten().abs() for _, b in pairs])
    assert moved.median() > STEP and apart.mean() < 0.05 * moved.mean()
    average = [(ours["average"]["values"][key.removeprefix("student.unet.")] - start[key]) for key in theirs["student"]]
    expected = [
        theirs["average"]["values"][key.removeprefix("student.unet.")] - start[key] for key in theirs["student"]
    ]
    gaps = torch.cat([(a - b).flatten().abs() for a, b in zip(average, expected, strict=True)])
    assert gaps.mean() < 0.05 * torch.cat([each.flatten().abs() for each in expected]).mean()


def test_a_run_goes_on_with_another_number_of_processes(
    models: pathlib.Path, alone: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """Sharded by two, then alone: what a checkpoint holds is whole."""
    pictures, _ = alone
    out = tmp_path / "run"
    distil(models, pictures, out, "training.images=12", "training.decay_share=0", "parallel=fsdp2", processes=2)
    distil(models, pictures, out, "training.decay_share=0")
    distil(models, pictures, tmp_path / "unbroken", "training.decay_share=0")
    same_way(state(out), state(tmp_path / "unbroken"), models)
