"""Few-step and teacher sampling: seeds, batches, step counts, and what plain diffusers makes of the same folder."""

import json
import pathlib
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

from diffusion_kd import artifact, errors, pipeline
from tests import toys

PROMPTS = ["a red circle", "a blue star above a green ring", "a pink cross"]
SEEDS = [11, 2, 999]


def few_step(prediction_type: str = "v_prediction") -> pipeline.FewStepPipeline:
    timesteps = pipeline.trained_timesteps(4)
    return pipeline.FewStepPipeline(toys.tiny_parts(prediction_type), {int(n): t for n, t in timesteps.items()})


def export(folder: pathlib.Path, prediction_type: str) -> pathlib.Path:
    parts = toys.tiny_parts(prediction_type)
    parts = artifact.dataclasses.replace(parts, scheduler=artifact.student_scheduler(parts.scheduler, 4))
    distillation = artifact.Distillation(
        "add", pipeline.trained_timesteps(4), prediction_type, parts.size_px, {"teacher": "toy"}
    )
    artifact.export_student(folder, parts=parts, distillation=distillation)
    return folder


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_images_have_the_promised_form(steps: int) -> None:
    images = few_step()(PROMPTS, SEEDS, steps=steps)
    assert images.shape == (3, 3, toys.IMAGE_SIZE_PX, toys.IMAGE_SIZE_PX)
    assert images.dtype == torch.float32 and images.min() >= -1 and images.max() <= 1


def test_an_image_depends_on_its_own_prompt_and_seed_alone() -> None:
    student, teacher = few_step(), pipeline.TeacherPipeline(toys.tiny_parts())
    for sampler, options in ((student, {"steps": 4}), (teacher, {"steps": 3, "guidance_scale": 4.0})):
        together = sampler(PROMPTS, SEEDS, **options)  # type: ignore[arg-type]
        alone = torch.cat([sampler([p], [s], **options) for p, s in zip(PROMPTS, SEEDS, strict=True)])  # type: ignore[arg-type]
        assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(student(PROMPTS[:1], [1]), student(PROMPTS[:1], [2]), atol=1e-2)


def test_trained_timesteps_are_those_of_the_exported_scheduler() -> None:
    scheduler = artifact.student_scheduler(toys.tiny_parts().scheduler, 4)
    for steps, timesteps in pipeline.trained_timesteps(4).items():
        scheduler.set_timesteps(int(steps))
        assert scheduler.timesteps.tolist() == timesteps
    assert pipeline.trained_timesteps(4)["4"] == [999, 749, 499, 249]
    assert pipeline.trained_timesteps(2) == {"1": [999], "2": [999, 499]}


@pytest.mark.parametrize(("steps", "guidance_scale"), [(5, 0.0), (0, 0.0), (4, 5.0)])
def test_what_a_student_cannot_do_is_refused(steps: int, guidance_scale: float) -> None:
    with pytest.raises(errors.ConfigError):
        few_step()(PROMPTS, SEEDS, steps=steps, guidance_scale=guidance_scale)


def test_each_prompt_needs_a_seed() -> None:
    with pytest.raises(errors.ConfigError, match="3 prompts, 1 seeds"):
        few_step()(PROMPTS, [1])


def test_guidance_of_one_is_no_guidance_and_more_is() -> None:
    teacher = pipeline.TeacherPipeline(toys.tiny_parts())
    plain, off, guided = (teacher(PROMPTS, SEEDS, steps=3, guidance_scale=scale) for scale in (1.0, 0.0, 8.0))
    assert torch.equal(plain, off)
    assert not torch.allclose(plain, guided, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_teacher_is_what_plain_diffusers_samples(tmp_path: pathlib.Path, prediction_type: str) -> None:
    artifact.save_pipeline(tmp_path / "teacher", parts=toys.tiny_parts(prediction_type), dtype=torch.float32)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "teacher", add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = theirs(PROMPTS, num_inference_steps=4, guidance_scale=5.0, generator=generators, output_type="pt").images
    ours = pipeline.load_teacher(str(tmp_path / "teacher"))(PROMPTS, SEEDS, steps=4, guidance_scale=5.0)
    assert torch.allclose((ours + 1) / 2, expected, atol=1e-4)


_PLAIN = """
import json, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "BeforeTorchvision"]
sys.modules["diffusion_kd"] = None  # importing it is an error
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in json.loads(sys.argv[4]):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import diffusers, numpy
pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sys.argv[1], add_watermarker=False)
pictures = []
for steps in (1, 2, 3, 4):
    generators = [torch.Generator().manual_seed(seed) for seed in json.loads(sys.argv[3])]
    pictures.append(pipe(json.loads(sys.argv[2]), num_inference_steps=steps, guidance_scale=0, generator=generators,
                         output_type="np").images)
numpy.save(sys.argv[1] + "/pictures.npy", numpy.stack(pictures))
"""


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_plain_diffusers_samples_the_export_without_this_project(tmp_path: pathlib.Path, prediction_type: str) -> None:
    folder = export(tmp_path / "student", prediction_type)
    from diffusion_kd import _torchvision

    missing = [] if _torchvision._library is None else list(_torchvision._OPERATORS)
    arguments = [str(folder), json.dumps(PROMPTS), json.dumps(SEEDS), json.dumps(missing)]
    run = subprocess.run([sys.executable, "-c", _PLAIN, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    theirs = np.load(folder / "pictures.npy")
    student = pipeline.load_student(str(folder))
    for index, steps in enumerate((1, 2, 3, 4)):
        ours = ((student(PROMPTS, SEEDS, steps=steps) + 1) / 2).permute(0, 2, 3, 1).numpy()
        assert np.abs(ours - theirs[index]).max() < 1e-3


def test_a_student_whose_files_disagree_is_refused(tmp_path: pathlib.Path) -> None:
    folder = export(tmp_path / "student", "v_prediction")
    path = folder / artifact.DISTILLATION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    with pytest.raises(errors.ModelError, match="says prediction type 'epsilon' and the scheduler 'v_prediction'"):
        pipeline.load_student(str(folder))


def test_a_scheduler_without_a_generator_samples_too() -> None:
    parts = toys.tiny_parts("epsilon")
    scheduler = diffusers.PNDMScheduler.from_config(parts.scheduler.config)
    sampler = pipeline.TeacherPipeline(artifact.dataclasses.replace(parts, scheduler=scheduler))
    assert sampler(PROMPTS, SEEDS, steps=4).isfinite().all()


def test_a_teacher_in_low_precision_is_given_its_own() -> None:
    parts = toys.tiny_parts()
    for part in (parts.unet, parts.vae, parts.text):
        part.to(torch.bfloat16)
    assert pipeline.TeacherPipeline(parts)(PROMPTS, SEEDS, steps=2).isfinite().all()
