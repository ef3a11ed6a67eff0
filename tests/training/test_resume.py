"""kill -9 at random moments: a distillation that goes on ends bit for bit as one that was never interrupted.

DIFFUSION_KD_TEST_KILLS: how often it is killed; 4 unless given.
"""

import json
import os
import pathlib
import signal
from typing import Any

import pytest
import torch

from tests import tiny
from tests.training import processes
from training import checkpoint

KILLS = int(os.environ.get("DIFFUSION_KD_TEST_KILLS", "4"))
STEPS = 10 + 8 * KILLS
PATIENCE_S = 120 + 15 * KILLS


def run(kills: int, given: list[str]) -> dict[str, Any]:
    program = str(pathlib.Path(__file__).with_name("kills.py"))
    said = processes.succeed(program, "0", str(kills), *given, patience_s=PATIENCE_S)
    told: dict[str, Any] = json.loads(said.splitlines()[-1])
    return told


def differing(first: Any, second: Any, where: str = "") -> list[str]:
    """Where two nested states differ in a single bit."""
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [where]
        return [found for key in first for found in differing(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [where]
    return [] if first == second else [where]


def test_a_run_killed_at_random_moments_ends_as_an_unbroken_one(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path, record_property: Any
) -> None:
    length = [f"training.images={2 * STEPS}", "training.log_every_steps=4", "training.sample_every_steps=12"]
    method = ["objective.latent_weight=0.1", "training.learning_rate=1e-2", "training.checkpoint_every_s=0"]
    given = ["--data", str(pictures), *length, *method]
    unbroken = run(0, tiny.arguments(models, tmp_path / "unbroken", *given))
    assert unbroken["codes"] == [0]
    told = run(KILLS, tiny.arguments(models, tmp_path / "killed", *given))
    record_property("kills", told)
    assert told["codes"] == [-signal.SIGKILL] * (len(told["codes"]) - 1) + [0], told
    assert told["codes"].count(-signal.SIGKILL) >= KILLS
    assert told["steps"] == sorted(told["steps"]), "a checkpoint was lost"
    assert told["amid_a_write"] >= 1
    states = [
        checkpoint.Checkpoints(tmp_path / name / "training" / checkpoint.FOLDER).newest()
        for name in ("unbroken", "killed")
    ]
    assert states[0] is not None and states[1] is not None and states[0].step == states[1].step == STEPS
    for found in states:
        found.state.pop("elapsed_s")  # the only thing that goes by the clock
    assert differing(states[0].state, states[1].state) == []
    weights = [(tmp_path / name / "student" / "unet").glob("*.safetensors") for name in ("unbroken", "killed")]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]


@pytest.mark.parametrize(
    ("first", "second", "places"),
    [
        ({"a": torch.ones(2)}, {"a": torch.ones(2)}, []),
        ({"a": torch.ones(2)}, {"a": torch.tensor([1.0, 1.0 + 1e-7])}, ["/a"]),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["/a/b"]),
        ({"a": 1}, {"b": 1}, [""]),
    ],
    ids=["equal", "a bit", "a number", "a key"],
)
def test_a_single_bit_is_seen(first: Any, second: Any, places: list[str]) -> None:
    assert differing(first, second) == places
