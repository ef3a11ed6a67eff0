"""The examination on models whose worth is known."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_kd import errors
from diffusion_kd.networks import features
from diffusion_kd.shapes import oracle
from eval import compare, protocols, sampling


@pytest.fixture
def exam(protocol: protocols.ShapesProtocol, network: features.TextImageNetwork) -> compare.Exam:
    return compare.Exam(protocol, network, batch_size=5)


def _entrants(teacher: sampling.Sampler, student: sampling.Sampler) -> tuple[compare.Entrant, compare.Entrant]:
    return compare.Entrant("teacher", teacher, 50, 5.0), compare.Entrant("student", student, 1, 0.0)


def test_a_painter_beats_noise(exam: compare.Exam, painter: sampling.Sampler, noise_maker: sampling.Sampler) -> None:
    teacher, student = _entrants(painter, noise_maker)
    best, worst = (row for row, _ in compare.compare(exam, teacher, [student]))
    assert (best.model, best.steps, best.guidance_scale) == ("teacher", 50, 5.0)
    assert best.prompt_accuracy == best.prompt_accuracy_seen == best.prompt_accuracy_held_out == 1
    assert best.prompt_accuracy_by == dict.fromkeys(oracle.ATTRIBUTES, 1)
    assert best.prompt_accuracy_interval == pytest.approx((0.8064, 1), abs=1e-4)
    assert (best.frechet_distance_to_teacher, best.lpips_to_teacher, best.diversity_ratio) == (None, None, 1)
    assert (worst.prompt_accuracy, worst.prompt_accuracy_interval[0]) == (0, 0)
    assert worst.frechet_distance > 3 * best.frechet_distance
    assert worst.frechet_distance_to_teacher == pytest.approx(worst.frechet_distance, rel=0.2)
    assert worst.lpips_to_teacher is not None
    assert worst.lpips_to_teacher > 0.1
    assert worst.diversity_ratio == pytest.approx(worst.diversity / best.diversity)
    assert min(best.seconds_per_image, worst.seconds_per_image) > 0


def test_the_truth_and_the_teacher_are_different_measures(
    exam: compare.Exam, painter: sampling.Sampler, noise_maker: sampling.Sampler
) -> None:
    def truth(prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        return painter(prompts, [1] * len(seeds), steps=steps, guidance_scale=guidance_scale)  # 1: not shifted

    teacher, student = _entrants(noise_maker, truth)
    _, (row, _) = compare.compare(exam, teacher, [student])
    assert row.frechet_distance == pytest.approx(0, abs=1e-9)
    assert row.frechet_distance_to_teacher is not None
    assert row.frechet_distance_to_teacher > 1
    assert row.clip_score == pytest.approx(exam.reference().clip_score)


def test_a_student_that_copies_its_teacher_is_at_no_distance(exam: compare.Exam, painter: sampling.Sampler) -> None:
    teacher, student = _entrants(painter, painter)
    _, (copy, _) = compare.compare(exam, teacher, [student])
    assert copy.frechet_distance_to_teacher == pytest.approx(0, abs=1e-9)
    assert (copy.lpips_to_teacher, copy.diversity_ratio) == (0, 1)


def test_a_student_that_ignores_the_seed_has_no_diversity(exam: compare.Exam, painter: sampling.Sampler) -> None:
    def collapsed(prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        return painter(prompts, [0] * len(seeds), steps=steps, guidance_scale=guidance_scale)

    teacher, student = _entrants(painter, collapsed)
    (_, _), (row, _) = compare.compare(exam, teacher, [student])
    assert (row.diversity, row.diversity_ratio, row.prompt_accuracy) == (0, 0, 1)
    assert row.lpips_to_teacher is not None
    assert row.lpips_to_teacher > 0
    (_, _), (row, _) = compare.compare(exam, student, [teacher])
    assert row.diversity_ratio is None


def test_seen_and_held_out_prompts_are_counted_apart(exam: compare.Exam, painter: sampling.Sampler) -> None:
    held_out = {prompt.text for prompt in exam.wanted if prompt.held_out}

    def learnt_by_heart(prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        images = painter(prompts, seeds, steps=steps, guidance_scale=guidance_scale)
        images[[prompt in held_out for prompt in prompts]] = 0
        return images

    teacher, student = _entrants(painter, learnt_by_heart)
    _, (row, _) = compare.compare(exam, teacher, [student])
    assert (row.prompt_accuracy_seen, row.prompt_accuracy_held_out, row.prompt_accuracy) == (1, 0, 0.75)


def test_true_renders_are_the_best_to_hope_for(exam: compare.Exam) -> None:
    reference = exam.reference()
    assert reference.prompt_accuracy == 1
    assert reference.frechet_distance > 0
    assert -1 <= reference.clip_score <= 1


def test_work_does_not_depend_on_the_batch_size(
    protocol: protocols.ShapesProtocol, network: features.TextImageNetwork, noise_maker: sampling.Sampler
) -> None:
    entrant = compare.Entrant("student", noise_maker, 1, 0.0)
    works = [compare.Exam(protocol, network, batch_size=size).sit(entrant) for size in (3, 16)]
    assert np.array_equal(works[0].images_uint8, works[1].images_uint8)
    assert torch.allclose(works[0].vectors, works[1].vectors, atol=1e-6)
    assert works[0].diversity == pytest.approx(works[1].diversity)


def test_a_model_of_another_size_is_refused_before_the_first_row(exam: compare.Exam, painter: sampling.Sampler) -> None:
    asked: list[int] = []

    def small(prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        return torch.zeros(len(prompts), 3, 32, 48)

    def watched(prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        asked.append(len(prompts))
        return painter(prompts, seeds, steps=steps, guidance_scale=guidance_scale)

    teacher, student = _entrants(watched, small)
    with pytest.raises(errors.ModelError, match="48x32 px"):
        next(compare.compare(exam, teacher, [student]))
    assert asked == [1]
