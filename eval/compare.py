"""Examine a teacher and its students on the same prompts and seeds, one row of numbers each."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_kd import errors
from diffusion_kd.networks import features
from diffusion_kd.shapes import scenes
from eval import embedding, protocols, sampling, stats
from eval.metrics import clip_score, diversity, frechet, perceptual, prompt_accuracy

_log = logging.getLogger(__name__)

TEACHER, TEACHER_FEW_STEPS, STUDENT, SHIPPED_STUDENT = "teacher", "teacher_few_steps", "student", "shipped_student"
"""The names of models in a report."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entrant:
    """A sampler under settings.

    model: one of the names above. guidance_scale: 1 turns a teacher's guidance off; a student takes 0.
    """

    model: str
    sampler: sampling.Sampler
    steps: int
    guidance_scale: float


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What an entrant made, and what is measured on it alone.

    images_uint8: (N, H, W, 3), one for each prompt. vectors: (N, P). diversity: mean distance within a prompt.
    """

    entrant: Entrant
    images_uint8: NDArray[np.uint8]
    vectors: Tensor
    diversity: float
    seconds_per_image: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One entrant's line in the report; None: not defined, or the teacher against itself.

    prompt_accuracy: share of pictures with every fact right, its 95 % Wilson interval, its value among prompts of
        seen and of held-out pairs, and by attribute.
    frechet_distance: to true renders of the same prompts; _to_teacher: to the teacher's pictures.
    clip_score: mean cosine. lpips_to_teacher: mean perceptual distance at the same prompt and seed.
    diversity: mean perceptual distance within a prompt; diversity_ratio: divided by the teacher's.
    All but the first and the last in the features of one network, which the report names.
    """

    model: str
    steps: int
    guidance_scale: float
    prompt_accuracy: float
    prompt_accuracy_interval: tuple[float, float]
    prompt_accuracy_seen: float
    prompt_accuracy_held_out: float
    prompt_accuracy_by: dict[str, float | None]
    frechet_distance: float
    frechet_distance_to_teacher: float | None
    clip_score: float
    lpips_to_teacher: float | None
    diversity: float
    diversity_ratio: float | None
    seconds_per_image: float


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """How true renders do.

    prompt_accuracy, clip_score: the best that a model can hope for.
    frechet_distance: to true renders of as many other prompts of the same kind. It is above a good model's, which is
        held against renders of its own prompts.
    """

    prompt_accuracy: float
    frechet_distance: float
    clip_score: float


class Exam:
    """The prompts, the truth and the measures that every entrant meets.

    network: its features are those of all distances and scores. batch_size: pictures at a time.
    """

    def __init__(
        self,
        protocol: protocols.ShapesProtocol,
        network: features.TextImageNetwork,
        *,
        batch_size: int = 16,
    ) -> None:
        self.protocol, self.network, self.batch_size = protocol, network, batch_size
        self.distance = embedding.distance_on(embedding.device_of(network), perceptual.from_features(network))
        cases = protocol.cases()
        self.wanted = [prompt for _, prompt in cases]
        self.prompts = [prompt.text for prompt in self.wanted]
        self.seeds = protocol.image_seeds()
        self.text_vectors = embedding.text_vectors(network, self.prompts, batch_size)
        self.true_images_uint8 = protocols.renders(cases)
        self.true_vectors = self._vectors(self.true_images_uint8)

    def reference(self) -> Reference:
        verdicts = prompt_accuracy.judge(self.true_images_uint8, self.wanted)
        others = self._vectors(protocols.renders(self.protocol.independent_cases()))
        return Reference(
            prompt_accuracy.prompt_accuracy(verdicts).share,
            frechet.frechet_distance(others, self.true_vectors),
            clip_score.clip_score(self.true_vectors, self.text_vectors),
        )

    def rehearse(self, entrant: Entrant) -> None:
        """Let an entrant draw one picture. Raises ModelError for another size than the protocol judges."""
        picture, _ = self._generate(entrant, [0], self.seeds[:1])
        size = picture.shape[1:3]
        if size != (scenes.IMAGE_SIZE_PX, scenes.IMAGE_SIZE_PX):
            raise errors.ModelError(
                f"{entrant.model} makes pictures of {size[1]}x{size[0]} px; "
                f"the shapes protocol judges {scenes.IMAGE_SIZE_PX}x{scenes.IMAGE_SIZE_PX} px only"
            )

    def sit(self, entrant: Entrant) -> Work:
        """Let an entrant draw every prompt once and some of them several times."""
        images_uint8, seconds_per_image = self._generate(entrant, range(len(self.prompts)), self.seeds)
        repeats_uint8, _ = self._generate(entrant, *self.protocol.repeats())
        groups = sampling.to_images(repeats_uint8).split(self.protocol.diversity_seeds)
        spread = diversity.diversity(groups, self.distance)
        return Work(entrant, images_uint8, self._vectors(images_uint8), spread, seconds_per_image)

    def mark(self, work: Work, teacher: Work) -> Row:
        """Measure one entrant's work against the truth and against the teacher's work."""
        verdicts = prompt_accuracy.judge(work.images_uint8, self.wanted)
        accuracy = prompt_accuracy.prompt_accuracy(verdicts)
        seen = len(verdicts) - self.protocol.held_out
        is_teacher = work is teacher
        return Row(
            model=work.entrant.model,
            steps=work.entrant.steps,
            guidance_scale=work.entrant.guidance_scale,
            prompt_accuracy=accuracy.share,
            prompt_accuracy_interval=stats.wilson_interval(accuracy.correct, accuracy.total),
            prompt_accuracy_seen=prompt_accuracy.prompt_accuracy(verdicts[:seen]).share,
            prompt_accuracy_held_out=prompt_accuracy.prompt_accuracy(verdicts[seen:]).share,
            prompt_accuracy_by=accuracy.by_attribute,
            frechet_distance=frechet.frechet_distance(work.vectors, self.true_vectors),
            frechet_distance_to_teacher=None if is_teacher else frechet.frechet_distance(work.vectors, teacher.vectors),
            clip_score=clip_score.clip_score(work.vectors, self.text_vectors),
            lpips_to_teacher=None if is_teacher else self._mean_distance(work.images_uint8, teacher.images_uint8),
            diversity=work.diversity,
            diversity_ratio=work.diversity / teacher.diversity if teacher.diversity else None,
            seconds_per_image=work.seconds_per_image,
        )

    def _generate(
        self, entrant: Entrant, indices: Sequence[int], seeds: Sequence[int]
    ) -> tuple[NDArray[np.uint8], float]:
        return sampling.generate(
            entrant.sampler,
            [self.prompts[index] for index in indices],
            seeds,
            steps=entrant.steps,
            guidance_scale=entrant.guidance_scale,
            batch_size=self.batch_size,
        )

    def _vectors(self, images_uint8: NDArray[np.uint8]) -> Tensor:
        return embedding.image_vectors(self.network, images_uint8, self.batch_size)

    def _mean_distance(self, images_uint8: NDArray[np.uint8], others_uint8: NDArray[np.uint8]) -> float:
        images = sampling.to_images(images_uint8).split(self.batch_size)
        others = sampling.to_images(others_uint8).split(self.batch_size)
        return torch.cat([self.distance(*pair) for pair in zip(images, others, strict=True)]).mean().item()


def compare(exam: Exam, teacher: Entrant, others: Sequence[Entrant]) -> Iterator[tuple[Row, Work]]:
    """Examine the teacher, then the others; each row with the work that it was marked on.

    Before the first row each entrant has drawn one picture, so none fails after hours of the others' work.
    """
    for entrant in (teacher, *others):
        exam.rehearse(entrant)
    standard: Work | None = None
    for entrant in (teacher, *others):
        _log.info("%s, %d steps, guidance %g", entrant.model, entrant.steps, entrant.guidance_scale)
        work = exam.sit(entrant)
        standard = standard or work
        yield exam.mark(work, standard), work
