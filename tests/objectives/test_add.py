"""ADD: gradients exactly where the paper has them, every option changes what it should, and the known traps."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from diffusion_kd import draws, errors
from diffusion_kd.objectives import add
from tests.toys import ToyFeatures, taught, tiny_batch, tiny_parts


def build(prediction_type: str = "v_prediction", **settings: Any) -> add.ADD:
    parts = tiny_parts(prediction_type)
    torch.manual_seed(2)
    objective = add.ADD(
        add.ADDConfig(**settings),
        student=copy.deepcopy(parts.denoiser()).requires_grad_(True),
        teacher=parts.denoiser(),
        vae=parts.vae,
        feature_network=ToyFeatures(),
    )
    taught(objective.heads)
    return objective


def losses_of(objective: add.ADD, step: int = 0) -> list[dict[str, torch.Tensor]]:
    batch = tiny_batch(tiny_parts(), step=step)
    return [phase(batch) for phase in objective.phases]


def with_gradient(module: nn.Module) -> int:
    return sum(weight.grad is not None and bool(weight.grad.any()) for weight in module.parameters())


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


def test_the_paper_is_the_default() -> None:
    config = add.ADDConfig()
    assert (config.student_steps, config.distillation_weight, config.weighting, config.r1_weight) == (
        4,
        2.5,
        "exp",
        1e-5,
    )
    assert config.text_condition and config.image_condition and config.distance_space == "pixel"
    assert config.terminal_probability is None
    beyond = (config.latent_weight, config.mismatch_weight, config.finite_difference_weight, config.trajectory_weight)
    assert beyond == (0, 0, 0, 0)


def test_the_students_turn_trains_the_student_alone() -> None:
    objective = build(latent_weight=1.0)
    total(objective.phases[0](tiny_batch(tiny_parts()))).backward()
    assert with_gradient(objective.student) > 0
    for frozen in (objective.teacher, objective.vae, objective.feature_network, objective.heads):
        assert with_gradient(frozen) == 0
    assert all(weight.requires_grad for weight in objective.heads.parameters())


def test_the_discriminators_turn_trains_the_heads_alone() -> None:
    objective = build(latent_weight=1.0)
    student, discriminator = objective.phases
    batch = tiny_batch(tiny_parts())
    student(batch)
    total(discriminator(batch)).backward()
    assert with_gradient(objective.heads) > 0
    for frozen in (objective.student, objective.teacher, objective.vae, objective.feature_network):
        assert with_gradient(frozen) == 0


def test_a_phase_holds_the_parameters_that_learn_and_no_others() -> None:
    objective = build()
    student, discriminator = (set(phase.parameters()) for phase in objective.phases)
    assert student == set(objective.student.parameters())
    assert discriminator == set(objective.heads.parameters())


def test_terms_appear_as_configured() -> None:
    student, discriminator = losses_of(build())
    assert set(student) == {"adversarial", "distillation"}
    assert set(discriminator) == {"hinge", "r1"}
    student, discriminator = losses_of(build(latent_weight=1.0, mismatch_weight=0.5, finite_difference_weight=1.0))
    assert set(student) == {"adversarial", "adversarial_latent", "distillation"}
    assert set(discriminator) == {"hinge", "r1", "hinge_latent", "mismatch", "finite_difference"}
    (alone,) = losses_of(build(adversarial_weight=0.0))
    assert set(alone) == {"distillation"}
    (alone,) = losses_of(build(adversarial_weight=0.0, distillation_weight=0.0, trajectory_weight=1.0))
    assert set(alone) == {"trajectory"}
    student, _ = losses_of(build(distillation_weight=0.0))
    assert set(student) == {"adversarial"}


@pytest.mark.parametrize(
    "settings",
    [
        {"weighting": "sds"},
        {"weighting": "nfsd"},
        {"distance_space": "latent"},
        {"teacher_guidance": [1.0]},
        {"teacher_guidance": [3.0, 8.0]},
        {"terminal_probability": 1.0},
    ],
)
def test_settings_change_the_distillation(settings: dict[str, Any]) -> None:
    plain = losses_of(build(adversarial_weight=0.0, terminal_probability=0.0))[0]["distillation"]
    changed = losses_of(build(adversarial_weight=0.0, **{"terminal_probability": 0.0, **settings}))[0]["distillation"]
    assert changed.isfinite() and not torch.isclose(changed, plain, rtol=1e-4)


def test_distillation_weight_is_linear() -> None:
    one, three = (losses_of(build(distillation_weight=weight))[0]["distillation"] for weight in (1.0, 3.0))
    assert three.item() == pytest.approx(3 * one.item(), rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_both_kinds_of_teacher_work(prediction_type: str) -> None:
    for losses in losses_of(build(prediction_type, terminal_probability=1.0)):
        assert all(loss.isfinite() for loss in losses.values())


def test_heads_without_conditions_do_not_read_the_caption() -> None:
    parts, objective = tiny_parts(), build(text_condition=False, image_condition=False)
    student, discriminator = objective.phases
    batch = tiny_batch(parts)
    assert objective.conditions(batch.cond, torch.ones(4, 8), torch.zeros(4, dtype=torch.bool)) == []
    student(batch)
    assert discriminator(batch)["hinge"].isfinite()


def test_text_condition_is_the_pooled_embedding() -> None:
    objective, batch = build(image_condition=False), tiny_batch(tiny_parts())
    (told,) = objective.conditions(batch.cond, torch.ones(4, 8), torch.zeros(4, dtype=torch.bool))
    assert torch.equal(told, batch.cond.pooled)


def test_image_condition_is_zero_at_pure_noise() -> None:
    objective, batch = build(text_condition=False), tiny_batch(tiny_parts())
    at_end = torch.tensor([True, False, True, False])
    (told,) = objective.conditions(batch.cond, torch.ones(4, 8), at_end)
    assert told.any(1).tolist() == [False, True, False, True]


def test_r1_is_lazy() -> None:
    for step in (1, 2, 3):
        assert "r1" not in losses_of(build(r1_interval=4), step=step)[1]
    every_step, every_fourth = (losses_of(build(r1_interval=interval), step=4)[1]["r1"] for interval in (1, 4))
    assert every_fourth.item() == pytest.approx(4 * every_step.item(), rel=1e-4)


def test_r1_reaches_the_heads_through_the_features_not_the_images() -> None:
    """R1's gradient is taken at the heads' input: in the discriminator's turn no feature network runs at all."""
    objective = build(r1_weight=1.0)
    looks: list[bool] = []
    objective.feature_network.register_forward_hook(lambda *_: looks.append(torch.is_grad_enabled()))
    student, discriminator = objective.phases
    batch = tiny_batch(tiny_parts())
    student(batch)
    assert looks == [True, False]  # the student's images with a graph, the real ones without
    discriminator(batch)["r1"].backward()
    assert len(looks) == 2
    assert with_gradient(objective.heads) > 0


def test_the_students_pictures_are_decoded_once_with_a_graph() -> None:
    """The trap: two decoder graphs at a time, one for each network's turn, double the peak of memory."""
    objective = build()
    graphs = []
    decode = objective.vae.decode

    def counting(latents: torch.Tensor, **options: Any) -> Any:
        graphs.append(latents.requires_grad)
        return decode(latents, **options)

    objective.vae.decode = counting
    losses_of(objective)
    assert graphs == [True, False]  # the student's picture; the teacher's target


def test_terminal_probability() -> None:
    plain, biased, always = (build(terminal_probability=share) for share in (None, 0.7, 1.0))
    many = draws.Draws((0,), 0, range(4000), 0)
    share = [(each.draw_student_timesteps(many) == 999).float().mean().item() for each in (plain, biased, always)]
    assert share == pytest.approx([0.25, 0.7, 1.0], abs=0.03)
    drawn = set(plain.draw_student_timesteps(many).tolist())
    assert drawn == {249, 499, 749, 999}


def test_the_same_seed_gives_the_same_losses() -> None:
    first, second = losses_of(build()), losses_of(build())
    for a, b in zip(first, second, strict=True):
        assert {name: loss.item() for name, loss in a.items()} == {name: loss.item() for name, loss in b.items()}
    other = losses_of(build(), step=1)
    assert other[0]["distillation"].item() != first[0]["distillation"].item()


def test_an_epsilon_teacher_without_terminal_signal_is_refused() -> None:
    parts = tiny_parts("v_prediction")
    parts.scheduler.register_to_config(prediction_type="epsilon")
    denoiser = parts.denoiser()
    with pytest.raises(errors.ModelError, match="zero terminal signal"):
        add.ADD(add.ADDConfig(), student=denoiser, teacher=denoiser, vae=parts.vae, feature_network=ToyFeatures())


@pytest.mark.parametrize(
    "settings",
    [
        {"student_steps": 0},
        {"student_steps": 5},
        {"weighting": "huber"},
        {"distance_space": "fourier"},
        {"teacher_guidance": []},
        {"teacher_timesteps": [900, 20]},
        {"teacher_timesteps": [20]},
        {"latent_timesteps": [20, 1000]},
        {"r1_interval": 0},
        {"distillation_weight": -1.0},
        {"adversarial_weight": float("nan")},
        {"terminal_probability": 1.5},
        {"trajectory_steps": 0},
        {"trajectory_guidance": float("nan")},
        {"teacher_guidance": [-1.0]},
        {"teacher_guidance": [5.0, 2.0]},
        {"adversarial_weight": 0.0, "mismatch_weight": 1.0},
        {"adversarial_weight": 0.0, "latent_weight": 1.0, "finite_difference_weight": 1.0},
        {"trajectory_steps": 6},
        {"adversarial_weight": 0.0, "distillation_weight": 0.0},
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match=list(settings)[-1]):
        add.ADDConfig(**settings)


def test_a_few_steps_pull_the_student_towards_its_target() -> None:
    """One batch, many steps: the distillation loss falls."""
    objective, batch = build(adversarial_weight=0.0, terminal_probability=1.0), tiny_batch(tiny_parts())
    (student,) = objective.phases
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    history = []
    for _ in range(12):
        loss = student(batch)["distillation"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_a_student_that_follows_its_teachers_trajectories_has_nothing_to_learn_of_them(space: str) -> None:
    """At the last step of the sampler's grid the teacher's own x0 is the endpoint; one step earlier it is not."""
    settings = {"adversarial_weight": 0.0, "distillation_weight": 0.0, "trajectory_weight": 1.0, "student_steps": 1}
    for steps, at_rest in ((1, True), (4, False)):
        for guidance in (1.0, 3.0):
            objective = build(trajectory_guidance=guidance, trajectory_steps=steps, distance_space=space, **settings)
            loss = losses_of(objective)[0]["trajectory"]
            assert (loss.item() < 1e-9) == (at_rest and guidance == 1)


def test_distances_of_latents_decode_nothing() -> None:
    """What makes them cheap: neither the student's latents nor the teacher's go through the autoencoder."""
    objective = build(adversarial_weight=0.0, trajectory_weight=1.0, distance_space="latent")

    def refused(latents: torch.Tensor, **options: Any) -> Any:
        raise AssertionError("decoded")

    objective.vae.decode = refused
    assert set(losses_of(objective)[0]) == {"distillation", "trajectory"}


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_the_trajectory_term_has_a_gradient_towards_the_student_alone(space: str) -> None:
    objective = build(trajectory_weight=1.0, distance_space=space)
    objective.phases[0](tiny_batch(tiny_parts()))["trajectory"].backward()
    assert with_gradient(objective.student) > 0
    for frozen in (objective.teacher, objective.vae, objective.feature_network, objective.heads):
        assert with_gradient(frozen) == 0
