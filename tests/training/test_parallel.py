"""Several processes: gloo on CPUs, DDP and FSDP2, as `torchrun` and `accelerate launch` start them."""

import json
import pathlib
from typing import Any

import pytest
import torch

from diffusion_kd import artifact
from eval import runs
from tests import tiny
from tests.training import fellows, processes
from training import checkpoint, compute, distill

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


def given(models: pathlib.Path, pictures: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    """The arguments of a distillation."""
    return tiny.arguments(models, out, "--data", str(pictures), *LENGTH, *METHOD, *more)


def distil(models: pathlib.Path, pictures: pathlib.Path, out: pathlib.Path, *more: str, count: int = 1) -> None:
    """In `count` processes of its own; fails where one of them hangs."""
    processes.succeed("-m", "training.distill", *given(models, pictures, out, *more), processes=count)


def curves(out: pathlib.Path) -> dict[str, list[float]]:
    (run,) = runs.find(out)
    return {curve.tag: list(curve.values) for curve in runs.read(run).curves}


def state(out: pathlib.Path, step: int | None = None) -> dict[str, Any]:
    """Of the newest checkpoint, or of a step's."""
    kept = checkpoint.Checkpoints(out / "training" / checkpoint.FOLDER)
    found = kept.newest() if step is None else kept.read(step)
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
    distil(models, pictures, tmp_path / "two", f"parallel={parallel}", count=2)
    same_curves(curves(tmp_path / "two"), curves(one))
    same_way(state(tmp_path / "two"), state(one), teachers_weights(models))
    start = artifact.load(str(models / "teacher")).unet.state_dict()
    unets = [artifact.load(str(out / "student")).unet.state_dict() for out in (one, tmp_path / "two")]
    for name, weight in start.items():
        torch.testing.assert_close(unets[1][name] - weight, unets[0][name] - weight, rtol=0, atol=STEP, msg=name)


def same_curves(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    for tag in LOSSES:
        assert found[tag][:2] == pytest.approx(expected[tag][:2], rel=1e-4, abs=1e-6), tag
        assert found[tag] == pytest.approx(expected[tag], rel=5e-3, abs=1e-4), tag
        assert len(found[tag]) == (3 if tag == "r1" else 6)
    for tag in GRADIENTS:
        assert found[tag][0] == pytest.approx(expected[tag][0], rel=1e-5), tag
        assert found[tag] == pytest.approx(expected[tag], rel=2e-2), tag


def teachers_weights(models: pathlib.Path) -> dict[str, torch.Tensor]:
    """What a student starts from, by its names in a checkpoint."""
    unet = artifact.load(str(models / "teacher")).unet
    return {f"student.unet.{key}": value for key, value in unet.state_dict().items()}


def same_way(ours: dict[str, Any], theirs: dict[str, Any], start: dict[str, torch.Tensor]) -> None:
    """Whether two trainings moved the weights alike from their start: nearly all, by far less than they moved."""
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
    distil(models, pictures, out, "training.images=12", "training.decay_share=0", "parallel=fsdp2", count=2)
    distil(models, pictures, out, "training.decay_share=0")
    distil(models, pictures, tmp_path / "unbroken", "training.decay_share=0")
    same_way(state(out), state(tmp_path / "unbroken"), teachers_weights(models))


# --- what shares one start of two processes -----------------------------------------------------------

ADAPTERS = ("lora_rank=4", "training.health=rollback", "training.keep_checkpoints=9")
"""A run that may be rolled back keeps its start, too."""


@pytest.fixture(scope="module")
def together(
    models: pathlib.Path, alone: tuple[pathlib.Path, pathlib.Path], tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """Where two processes left what `fellows` describes."""
    pictures, _ = alone
    out = tmp_path_factory.mktemp("together")
    arguments = given(models, pictures, out / "adapters", *ADAPTERS)
    processes.succeed(fellows.__file__, str(out), *arguments, processes=2, patience_s=3 * processes.PATIENCE_S)
    return out


def test_two_processes_go_back_together_and_end_as_one_does(together: pathlib.Path, tmp_path: pathlib.Path) -> None:
    told = [json.loads((together / f"ill-{rank}.json").read_text()) for rank in range(2)]
    alone = fellows.roll_back(compute.launch(compute.ComputeConfig(precision="fp32")), tmp_path / "ill" / "training")
    taken = [tuple(place) for place in told[0]["taken"]]
    assert taken == alone["taken"] and told[1] == told[0]
    back_at = next(index for index, (_, attempt) in enumerate(taken) if attempt)
    to = taken[back_at][0]
    assert fellows.ILL_FROM - 4 <= to < fellows.ILL_FROM < back_at - 1  # it had learnt nonsense by then
    assert taken[back_at:] == [(step, 1) for step in range(to, fellows.RIGHT)]
    for out in (together, tmp_path):
        (line,) = (out / "ill" / "training" / runs.HEALTH).read_text().splitlines()
        assert json.loads(line)["to_images"] == 4 * to
    weights = torch.tensor(told[0]["weights"])
    assert torch.equal(weights[back_at], weights[to])
    assert float((weights[back_at - 1] - weights[to]).abs().max()) > 0.01, "it should have gone astray"
    torch.testing.assert_close(weights, torch.tensor(alone["weights"]), rtol=1e-4, atol=1e-5)
    ours, theirs = state(together / "ill"), state(tmp_path / "ill")
    torch.testing.assert_close(ours["line"], theirs["line"], rtol=1e-4, atol=1e-5)


def test_adapters_learn_in_two_processes_as_in_one(
    together: pathlib.Path, models: pathlib.Path, alone: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    pictures, _ = alone
    distill.main(given(models, pictures, tmp_path / "adapters", *ADAPTERS))
    one, two = tmp_path / "adapters", together / "adapters"
    same_curves(curves(two), curves(one))
    start = state(one, 0)["student"]
    assert start and all("lora_" in name for name in start)
    torch.testing.assert_close(state(two, 0)["student"], start, rtol=0, atol=0)
    same_way(state(two), state(one), start)


def test_samples_leave_no_trace_in_a_sharded_runs_checkpoints(together: pathlib.Path) -> None:
    """Samples are drawn with the average in the network's place; the checkpoint is written right afterwards, and what
    goes on from it equals what never stopped nor sampled."""
    for step in range(1, fellows.LONG + 1):
        plain, sampled = state(together / "plain", step), state(together / "sampled", step)
        for part in ("unet", "unet_optimizer", "average"):
            torch.testing.assert_close(sampled[part], plain[part], rtol=0, atol=0)
    last = state(together / "sampled")
    apart = [(last["unet"][f"denoiser.unet.{name}"] - value).abs() for name, value in last["average"]["values"].items()]
    assert min(float(each.mean()) for each in apart) > 1e-4, "average and weights should differ, to be told apart"
