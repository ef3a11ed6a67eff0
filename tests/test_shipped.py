"""The shipped weights: small enough, loadable by name, and as good as the documentation says (on a few prompts)."""

import hashlib
import pathlib

import numpy as np
import pytest
import torch

from diffusion_kd import artifact, pipeline
from diffusion_kd.shapes import oracle, scenes
from eval import cases, compare, images, sampling
from eval.metrics import diversity, perceptual

WEIGHTS = artifact.SHIPPED["shapes-teacher"].parent
CASES = [*scenes.draw_cases(24, 2024), *scenes.draw_cases(8, 2024, held_out=True)]
PROMPTS = [prompt.text for _, prompt in CASES]


def accuracy(images: torch.Tensor) -> float:
    pictures = sampling.to_uint8(images)
    right = [
        oracle.judge(oracle.read(picture), prompt).correct for picture, (_, prompt) in zip(pictures, CASES, strict=True)
    ]
    return float(np.mean(right))


def test_everything_together_stays_below_thirty_megabytes() -> None:
    files = [path for path in WEIGHTS.rglob("*.safetensors") if not path.parent.is_symlink()]
    assert 0 < sum(path.stat().st_size for path in files) <= 30e6


def test_the_autoencoder_keeps_what_a_picture_shows() -> None:
    vae = artifact.load("shapes-teacher").vae
    images = sampling.to_images(np.stack([scenes.render(scene) for scene, _ in CASES]))
    with torch.inference_mode():
        assert accuracy(vae.decode(vae.encode(images).latent_dist.mean).sample) >= 0.93


def test_the_teacher_draws_what_is_asked() -> None:
    images = pipeline.load_teacher("shapes-teacher")(PROMPTS, range(len(PROMPTS)), steps=20, guidance_scale=2.0)
    assert accuracy(images) >= 0.75


@pytest.mark.parametrize(("steps", "least"), [(1, 0.8), (2, 0.85), (4, 0.85)])
def test_the_student_draws_what_is_asked(steps: int, least: float) -> None:
    images = pipeline.load_student("shapes-student")(PROMPTS, range(len(PROMPTS)), steps=steps)
    assert accuracy(images) >= least


def test_the_student_draws_another_picture_for_another_seed() -> None:
    """A collapsed student draws what is asked, too: nearly the same picture for every seed."""
    network = pipeline.load_feature_network("shapes-encoder")
    distance = perceptual.from_features(network)
    prompts, seeds = [PROMPTS[index // 4] for index in range(48)], range(48)
    teacher = pipeline.load_teacher("shapes-teacher")(prompts, seeds, steps=8, guidance_scale=2.0)
    student = pipeline.load_student("shapes-student")(prompts, seeds, steps=1)
    with torch.inference_mode():
        theirs, ours = (diversity.mean_pairwise_distances(each, 4, distance).mean() for each in (teacher, student))
    assert ours > 0.7 * theirs


def test_the_feature_network_matches_pictures_and_words() -> None:
    network = pipeline.load_feature_network("shapes-encoder")
    images = sampling.to_images(np.stack([scenes.render(scene) for scene, _ in CASES]))
    with torch.inference_mode():
        seen, said = network(images).vector, network.embed_text(PROMPTS)
    similar = torch.nn.functional.cosine_similarity(seen[:, None], said[None], dim=-1)
    assert (similar.argmax(1) == torch.arange(len(CASES))).float().mean() > 0.6


def test_a_student_knows_its_teacher() -> None:
    distillation = artifact.read_distillation("shapes-student")
    assert distillation.lineage["teacher"] == "shapes-teacher" and distillation.guidance_scale == 0
    assert pathlib.Path(WEIGHTS / "shapes-student" / "vae").resolve() == (WEIGHTS / "shapes-teacher" / "vae").resolve()


def test_the_shipped_evaluation_is_of_the_shipped_student() -> None:
    report, chosen = compare.load(WEIGHTS), cases.load(WEIGHTS)
    assert report["protocol"]["as_written"] and report["complete"]
    for model in ("student", "teacher"):
        assert report["models"][model]["artifact_sha256"] == images.artifact_sha256(f"shapes-{model}")
    assert chosen.report.sha256 == hashlib.sha256((WEIGHTS / "report.json").read_bytes()).hexdigest()
