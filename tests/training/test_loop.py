"""The loop: learning rates, resuming bit for bit, skipping what is not finite, and writing whole files."""

import dataclasses
import pathlib
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from diffusion_kd import errors
from training import loop

CONFIG = loop.LoopConfig(
    images=40,
    batch_size=2,
    learning_rate=0.1,
    warmup_images=4,
    ema_decay=0.9,
    checkpoint_every_s=1e9,
    log_every_steps=10,
)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 1)

    def forward(self, x: Tensor, poison: bool) -> dict[str, Tensor]:
        loss = (self.line(x) - x.sum(1, keepdim=True)).square().mean()
        return {"loss": loss * float("nan") if poison else loss}


def draw(step: int, count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(count, 3, generator=generator), "poison": False}


def fit(folder: pathlib.Path, config: loop.LoopConfig = CONFIG, draw: Any = draw) -> tuple[Toy, nn.Module]:
    module = Toy()
    learner = loop.Learner("toy", module, config.learning_rate)
    average = loop.fit(accelerate.Accelerator(cpu=True), [learner], draw, config, folder, averaged=module)
    return module, average


def test_learning_rate_warms_up_holds_and_falls() -> None:
    config = dataclasses.replace(CONFIG, images=100, warmup_images=10, decay_share=0.5)
    shares = [loop.learning_rate_share(images, 0, config) for images in (0, 8, 40, 50, 75, 100)]
    assert shares == pytest.approx([0.2, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_a_time_limit_brings_the_learning_rate_down_in_time() -> None:
    config = dataclasses.replace(CONFIG, images=10**9, warmup_images=0, decay_share=0.5, time_limit_s=100.0)
    shares = [loop.learning_rate_share(0, elapsed, config) for elapsed in (0, 50, 75, 100)]
    assert shares == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_training_learns(tmp_path: pathlib.Path) -> None:
    module, _ = fit(tmp_path, dataclasses.replace(CONFIG, images=400))
    assert module.line.weight.detach().flatten().tolist() == pytest.approx([1, 1, 1], abs=0.1)


def test_a_killed_run_resumed_equals_an_unbroken_one(tmp_path: pathlib.Path) -> None:
    unbroken, unbroken_average = fit(tmp_path / "unbroken")

    def killed(step: int, count: int) -> dict[str, Any]:
        if step == 13:
            raise KeyboardInterrupt
        return draw(step, count)

    eager = dataclasses.replace(CONFIG, checkpoint_every_s=0)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "broken", eager, killed)
    resumed, resumed_average = fit(tmp_path / "broken", eager)
    assert torch.equal(resumed.line.weight, unbroken.line.weight)
    pairs = zip(resumed_average.parameters(), unbroken_average.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_is_not_finite_is_skipped(tmp_path: pathlib.Path) -> None:
    def poisoned(step: int, count: int) -> dict[str, Any]:
        return draw(step, count) | {"poison": step % 2 == 1}

    module, average = fit(tmp_path, draw=poisoned)
    assert module.line.weight.isfinite().all()
    assert all(weight.isfinite().all() for weight in average.parameters())


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: pathlib.Path) -> None:
    fit(tmp_path)
    other = nn.ModuleDict({"other": nn.Linear(2, 2)})
    learner = loop.Learner("toy", other, 0.1)
    with pytest.raises(errors.ConfigError, match="another configuration"):
        loop.fit(accelerate.Accelerator(cpu=True), [learner], draw, CONFIG, tmp_path, averaged=other)


def test_an_interrupted_write_leaves_the_last_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    loop.save_atomically({"step": 1}, path)

    def fail(content: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(loop.torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        loop.save_atomically({"step": 2}, path)
    monkeypatch.undo()
    assert torch.load(path)["step"] == 1


@pytest.mark.parametrize(("images", "batch_size"), [(0, 1), (1, 2), (4, 0)])
def test_impossible_lengths_are_refused(images: int, batch_size: int) -> None:
    with pytest.raises(errors.ConfigError, match="at least one batch"):
        loop.LoopConfig(images=images, batch_size=batch_size, learning_rate=0.1)
