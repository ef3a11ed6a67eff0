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


def checkpoint(folder: pathlib.Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / loop.CHECKPOINT)
    return content


def test_a_run_that_used_up_its_time_trains_no_further(tmp_path: pathlib.Path) -> None:
    limited = dataclasses.replace(CONFIG, images=10**9, time_limit_s=0.2)
    first, _ = fit(tmp_path, limited)
    reached = checkpoint(tmp_path)
    assert reached["elapsed_s"] >= 0.2
    assert loop.images_seen(tmp_path, limited) == reached["step"] * limited.batch_size > 0

    def refuse(step: int, count: int) -> dict[str, Any]:
        raise AssertionError("its time is over")

    again, _ = fit(tmp_path, limited, refuse)
    assert torch.equal(again.line.weight, first.line.weight)


def test_a_checkpoint_that_knows_no_time_is_gone_on_with(tmp_path: pathlib.Path) -> None:
    fit(tmp_path)
    old = checkpoint(tmp_path)
    del old["elapsed_s"]
    loop.save_atomically(old, tmp_path / loop.CHECKPOINT)
    fit(tmp_path, dataclasses.replace(CONFIG, images=44))
    assert checkpoint(tmp_path)["step"] == 22


def test_all_processes_go_by_the_main_ones_clock(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.accelerate.utils, "broadcast", lambda tensor: torch.full_like(tensor, 1e9))
    fit(tmp_path, dataclasses.replace(CONFIG, time_limit_s=1e6))
    assert checkpoint(tmp_path)["step"] == 1


def test_a_batch_that_cannot_be_shared_evenly_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 3)
    with pytest.raises(errors.ConfigError, match="multiple of 3"):
        fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_hundred_skipped_steps_in_a_row_end_the_training(tmp_path: pathlib.Path) -> None:
    def poisoned(step: int, count: int) -> dict[str, Any]:
        return draw(step, count) | {"poison": step >= 5}

    with pytest.raises(errors.TrainingError, match="toy: the last 100 steps up to step 105"):
        fit(tmp_path, dataclasses.replace(CONFIG, images=1000), poisoned)


def test_skipped_steps_stay_out_of_the_means_and_two_learners_count_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Twice(loop._Progress):
        def report(self, step: int, most_left_s: float = float("inf")) -> None:
            self._since = loop.time.monotonic() - 1  # as if the steps had taken a second
            assert float("nan") not in self._sums["loss"] and len(self._sums["loss"]) == 10
            assert self._sums["a_skipped"] == self._sums["b_skipped"] == [0.0, 1.0] * 5
            super().report(step, most_left_s)

    monkeypatch.setattr(loop, "_Progress", Twice)
    first, second = Toy(), Toy()
    learners = [loop.Learner("a", first, 0.1), loop.Learner("b", second, 0.1)]

    def poisoned(step: int, count: int) -> dict[str, Any]:
        return draw(step, count) | {"poison": step % 2 == 1}

    with caplog.at_level("INFO"):
        loop.fit(accelerate.Accelerator(cpu=True), learners, poisoned, CONFIG, tmp_path, averaged=first)
    assert "20 images/s" in caplog.records[0].getMessage()


def test_a_damaged_checkpoint_is_one_sentence(tmp_path: pathlib.Path) -> None:
    fit(tmp_path)
    path = tmp_path / loop.CHECKPOINT
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(errors.ConfigError, match="cannot be read") as caught:
            fit(tmp_path)
        assert "\n" not in str(caught.value)


def test_there_must_be_something_to_restore(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"no checkpoint\.pt"):
        loop.restore(accelerate.Accelerator(cpu=True), [], draw, CONFIG, tmp_path, averaged=Toy())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("warmup_images", -1),
        ("decay_share", 1.5),
        ("weight_decay", -1.0),
        ("weight_decay", float("nan")),
        ("ema_decay", 1.0),
        ("max_grad_norm", 0.0),
        ("time_limit_s", -1.0),
        ("checkpoint_every_s", -1.0),
        ("log_every_steps", 0),
    ],
)
def test_settings_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(errors.ConfigError, match=f"{key} is {value!r}"):
        dataclasses.replace(CONFIG, **{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("images", "batch_size"), [(0, 1), (1, 2), (4, 0)])
def test_impossible_lengths_are_refused(images: int, batch_size: int) -> None:
    with pytest.raises(errors.ConfigError, match="at least one batch"):
        loop.LoopConfig(images=images, batch_size=batch_size, learning_rate=0.1)


def test_the_time_left_knows_the_limit(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(tmp_path, dataclasses.replace(CONFIG, images=10**7, time_limit_s=0.5))
    left = [float(record.args[-1]) for record in caplog.records if "min left" in record.msg and record.args]  # type: ignore[arg-type]
    assert left and max(left) <= 0.5 / 60
