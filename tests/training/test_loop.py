"""The loop: learning rates, resuming bit for bit, skipping what is not finite, and writing whole files."""

import dataclasses
import errno
import json
import math
import pathlib
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from diffusion_kd import draws, errors
from training import checkpoint, loop, tracking

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


def draw(place: loop.Place) -> dict[str, Any]:
    return {"x": draws.Draws(place.seed, place.step, place.rows, 0).normal([3]), "poison": False}


def fit(folder: pathlib.Path, config: loop.LoopConfig = CONFIG, draw: Any = draw) -> Toy:
    """The toy that a training leaves: its average, where one is kept."""
    module = Toy()
    learner = loop.Learner("toy", module, config.learning_rate)
    loop.fit(accelerate.Accelerator(cpu=True), [learner], draw, config, folder, averaged=module)
    return module


def newest(folder: pathlib.Path) -> checkpoint.Checkpoint:
    found = checkpoint.Checkpoints(folder / checkpoint.FOLDER).newest()
    assert found is not None
    return found


def test_learning_rate_warms_up_holds_and_falls() -> None:
    config = dataclasses.replace(CONFIG, images=100, warmup_images=10, decay_share=0.5)
    shares = [loop.learning_rate_share(images, 0, config) for images in (0, 8, 40, 50, 75, 100)]
    assert shares == pytest.approx([0.2, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_a_time_limit_brings_the_learning_rate_down_in_time() -> None:
    config = dataclasses.replace(CONFIG, images=10**9, warmup_images=0, decay_share=0.5, time_limit_s=100.0)
    shares = [loop.learning_rate_share(0, elapsed, config) for elapsed in (0, 50, 75, 100)]
    assert shares == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_training_learns(tmp_path: pathlib.Path) -> None:
    module = fit(tmp_path, dataclasses.replace(CONFIG, images=400))
    assert module.line.weight.detach().flatten().tolist() == pytest.approx([1, 1, 1], abs=0.1)


def test_a_killed_run_resumed_equals_an_unbroken_one(tmp_path: pathlib.Path) -> None:
    unbroken = fit(tmp_path / "unbroken")

    def killed(place: loop.Place) -> dict[str, Any]:
        if place.step == 13:
            raise KeyboardInterrupt
        return draw(place)

    eager = dataclasses.replace(CONFIG, checkpoint_every_s=0)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "broken", eager, killed)
    resumed = fit(tmp_path / "broken", eager)
    assert torch.equal(resumed.line.weight, unbroken.line.weight)
    ours, theirs = newest(tmp_path / "broken").state, newest(tmp_path / "unbroken").state
    for name in ("toy", "toy_optimizer", "average", "sums", "monitor"):
        assert flat(ours[name]) == flat(theirs[name]), name


def flat(content: Any) -> Any:
    """Nested numbers for `==`."""
    if isinstance(content, dict):
        return {key: flat(value) for key, value in content.items()}
    return content.tolist() if isinstance(content, Tensor) else content


def test_the_average_is_what_is_left_and_what_is_shown(tmp_path: pathlib.Path) -> None:
    """By hand: avg = decay * avg + (1 - decay) * weights, from the first step's weights on."""
    seen: list[Tensor] = []
    module = Toy()
    config = dataclasses.replace(CONFIG, log_every_steps=1, images=6)
    steps: list[Tensor] = []

    def watched(place: loop.Place) -> dict[str, Any]:
        steps.append(module.line.weight.detach().clone())
        return draw(place)

    loop.fit(
        accelerate.Accelerator(cpu=True),
        [loop.Learner("toy", module, 0.1)],
        watched,
        config,
        tmp_path,
        averaged=module,
        on_report=lambda images_seen, progress: seen.append(module.line.weight.detach().clone()),
    )
    first, second = steps[1], steps[2]  # the weights after steps 1 and 2
    assert torch.equal(seen[0], first)
    torch.testing.assert_close(seen[1], 0.9 * first + 0.1 * second)
    assert torch.equal(module.line.weight, seen[2])


def test_what_is_not_finite_is_skipped_and_counted(tmp_path: pathlib.Path) -> None:
    def poisoned(place: loop.Place) -> dict[str, Any]:
        return draw(place) | {"poison": place.step % 2 == 1}

    module = fit(tmp_path, dataclasses.replace(CONFIG, log_every_steps=100), poisoned)
    assert module.line.weight.isfinite().all()
    assert newest(tmp_path).state["toy_optimizer"]["state"][0]["step"] == 10


def test_parts_of_a_batch_give_what_the_whole_gives(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, batch_size=4)
    whole = fit(tmp_path / "whole", config)
    parts = fit(tmp_path / "parts", dataclasses.replace(config, accumulate=4))
    torch.testing.assert_close(parts.line.weight, whole.line.weight)
    assert newest(tmp_path / "parts").step == newest(tmp_path / "whole").step == 10


def test_a_run_that_falls_ill_goes_back_and_recovers(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """From step 30 on its data are poison, but not on the second attempt."""
    config = dataclasses.replace(
        CONFIG, images=100, checkpoint_every_s=0, log_every_steps=2, health="rollback", keep_checkpoints=1
    )
    rates: list[float] = []

    def poisoned(place: loop.Place) -> dict[str, Any]:
        rates.append(float(place.attempt))
        return draw(place) | {"poison": place.step >= 30 and place.attempt == 0}

    with caplog.at_level("WARNING"):
        module = fit(tmp_path, config, poisoned)
    assert module.line.weight.isfinite().all()
    assert newest(tmp_path).step == 50 and newest(tmp_path).state["monitor"]["attempt"] == 1
    assert "attempt 1 of 3" in caplog.text
    (line,) = (tmp_path / "health.jsonl").read_text().splitlines()
    healthy = json.loads(line)["to_images"] // 2
    assert 28 <= healthy <= 31  # a skipped step has changed nothing
    assert rates.count(1.0) == 50 - healthy


def test_a_run_that_is_always_ill_ends_with_a_reason(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, images=400, checkpoint_every_s=0, log_every_steps=2, health="rollback")

    def poisoned(place: loop.Place) -> dict[str, Any]:
        return draw(place) | {"poison": place.step >= 30}

    with pytest.raises(errors.TrainingError, match=r"fell ill again after 3 roll-backs.*learning rate"):
        fit(tmp_path, config, poisoned)


def test_one_bad_part_skips_the_whole_step(tmp_path: pathlib.Path) -> None:
    def poisoned(place: loop.Place) -> dict[str, Any]:
        return draw(place) | {"poison": place.rows.start == 1}

    before = Toy().line.weight
    module = fit(tmp_path, dataclasses.replace(CONFIG, accumulate=2), poisoned)
    assert torch.equal(module.line.weight, before)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: pathlib.Path) -> None:
    fit(tmp_path)
    other = nn.ModuleDict({"other": nn.Linear(2, 2)})
    learner = loop.Learner("toy", other, 0.1)
    with pytest.raises(errors.ConfigError, match="another configuration"):
        loop.fit(
            accelerate.Accelerator(cpu=True), [learner], draw, CONFIG, tmp_path, averaged=other
        )  # nothing is drawn


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    save, tries = torch.save, list[int]()

    def sometimes(*given: Any, **named: Any) -> None:
        tries.append(1)
        if len(tries) in (5, 6):
            raise full
        save(*given, **named)

    monkeypatch.setattr(checkpoint.torch, "save", sometimes)
    with caplog.at_level("WARNING"):
        module = fit(tmp_path, dataclasses.replace(CONFIG, checkpoint_every_s=0))
    assert len(tries) == 20 and newest(tmp_path).step == 20
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "the run goes on" in caplog.text and "step 4 still stands" in caplog.text
    assert torch.equal(module.line.weight, fit(tmp_path / "other").line.weight)


def test_the_last_checkpoint_must_be_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(errors.TrainingError, match="could not be written"):
        fit(tmp_path)


def test_a_run_that_used_up_its_time_trains_no_further(tmp_path: pathlib.Path) -> None:
    limited = dataclasses.replace(CONFIG, images=10**9, time_limit_s=0.2)
    first = fit(tmp_path, limited)
    reached = newest(tmp_path)
    assert reached.state["elapsed_s"] >= 0.2
    assert loop.images_seen(tmp_path, limited) == reached.step * limited.batch_size > 0

    def refuse(place: loop.Place) -> dict[str, Any]:
        raise AssertionError("its time is over")

    assert torch.equal(fit(tmp_path, limited, refuse).line.weight, first.line.weight)


def test_all_processes_go_by_the_main_ones_clock(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loop._Run, "_agree", lambda run, *values: [1e9] * len(values) if len(values) > 1 else list(values)
    )
    fit(tmp_path, dataclasses.replace(CONFIG, time_limit_s=1e6))
    assert newest(tmp_path).step == 1


def test_a_batch_that_cannot_be_shared_evenly_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 3)
    with pytest.raises(errors.ConfigError, match="multiple of 3"):
        fit(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_hundred_skipped_steps_in_a_row_end_the_training(tmp_path: pathlib.Path) -> None:
    def poisoned(place: loop.Place) -> dict[str, Any]:
        return draw(place) | {"poison": place.step >= 5}

    with pytest.raises(errors.TrainingError, match="toy: the last 100 steps up to step 105"):
        fit(tmp_path / "unbroken", dataclasses.replace(CONFIG, images=1000), poisoned)
    fit(tmp_path / "resumed", dataclasses.replace(CONFIG, images=120), poisoned)  # to step 60
    with pytest.raises(errors.TrainingError, match="toy: the last 100 steps up to step 105"):
        fit(tmp_path / "resumed", dataclasses.replace(CONFIG, images=1000), poisoned)


def test_a_checkpoint_that_counts_no_skipped_steps_is_taken_up(tmp_path: pathlib.Path) -> None:
    fit(tmp_path, dataclasses.replace(CONFIG, images=20))
    found = newest(tmp_path)
    older = {name: part for name, part in found.state.items() if name != "skipped"}
    checkpoint.Checkpoints(tmp_path / checkpoint.FOLDER).save(found.step, older, healthy=True)
    fit(tmp_path)
    assert newest(tmp_path).step == 20


def test_skipped_steps_stay_out_of_the_means_and_two_learners_count_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(tracking.Progress):
        def report(self, step: int, most_left_s: float, loud: bool) -> dict[str, float]:
            self._since = tracking.time.monotonic() - 1  # as if the steps had taken a second
            assert len(self.sums["loss"]) == 10 and all(map(math.isfinite, self.sums["loss"]))
            assert self.sums["a_skipped"] == self.sums["b_skipped"] == [0.0, 1.0] * 5
            return super().report(step, most_left_s, loud)

    monkeypatch.setattr(loop.tracking, "Progress", Slow)
    first, second = Toy(), Toy()
    learners = [loop.Learner("a", first, 0.1), loop.Learner("b", second, 0.1)]

    def poisoned(place: loop.Place) -> dict[str, Any]:
        return draw(place) | {"poison": place.step % 2 == 1}

    with caplog.at_level("INFO"):
        loop.fit(accelerate.Accelerator(cpu=True), learners, poisoned, CONFIG, tmp_path, averaged=first)
    assert "20 images/s" in caplog.records[0].getMessage()


def test_a_damaged_checkpoint_is_one_sentence(tmp_path: pathlib.Path) -> None:
    fit(tmp_path)
    path = newest(tmp_path).path / checkpoint.STATE
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(errors.ConfigError, match="can be read") as caught:
            fit(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [checkpoint.STATE, checkpoint.MANIFEST])
def test_images_are_counted_by_the_newest_checkpoint_that_is_whole(name: str, tmp_path: pathlib.Path) -> None:
    assert loop.images_seen(tmp_path, CONFIG) == 0
    fit(tmp_path, dataclasses.replace(CONFIG, checkpoint_every_s=0))
    assert loop.images_seen(tmp_path, CONFIG) == CONFIG.images
    damaged = newest(tmp_path).path / name
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert loop.images_seen(tmp_path, CONFIG) == CONFIG.images - CONFIG.batch_size
    assert newest(tmp_path).step * CONFIG.batch_size == CONFIG.images - CONFIG.batch_size


def test_there_must_be_something_to_restore(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.ConfigError, match="no checkpoint to go by"):
        loop.restore(accelerate.Accelerator(cpu=True), [], CONFIG, tmp_path, averaged=Toy())


def test_what_is_restored_is_what_the_training_left(tmp_path: pathlib.Path) -> None:
    trained, restored = fit(tmp_path), Toy()
    learner = loop.Learner("toy", restored, 0.1)
    loop.restore(accelerate.Accelerator(cpu=True), [learner], CONFIG, tmp_path, averaged=restored)
    assert torch.equal(restored.line.weight, trained.line.weight)


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
        ("keep_checkpoints", 0),
        ("sample_every_steps", -1),
        ("accumulate", 0),
        ("health", "ill"),
    ],
)
def test_settings_out_of_range_are_named(key: str, value: float | str) -> None:
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
