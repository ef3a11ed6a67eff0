"""Protocols of true pictures, stored moments and foreign networks, whole, on small data and random weights."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from diffusion_kd import pipeline
from diffusion_kd.shapes import scenes
from eval import inception, protocols, run, sampling, suites

CASES = scenes.draw_cases(44, 5)


@pytest.fixture
def data(
    tmp_path: pathlib.Path, inception_weights: pathlib.Path, alexnet_weights: pathlib.Path, tiny_clip: pathlib.Path
) -> pathlib.Path:
    """A small COCO: pictures of several sizes, captions; weights where protocols want them."""
    folder = tmp_path / "data"
    (folder / "coco").mkdir(parents=True)
    for number, (scene, _) in enumerate(CASES):
        picture = PIL.Image.fromarray(scenes.render(scene)).resize((64 + number % 3 * 8, 64 + number % 2 * 16))
        picture.save(folder / "coco" / f"{number:012d}.png")
    captions = {
        "images": [{"id": number, "file_name": f"{number:012d}.png"} for number in range(len(CASES))],
        "annotations": [{"image_id": number, "caption": prompt.text} for number, (_, prompt) in enumerate(CASES)],
    }
    (folder / "captions.json").write_text(json.dumps(captions))
    for name, path in (("inception.pth", inception_weights), ("alexnet.pth", alexnet_weights), ("clip.pt", tiny_clip)):
        (folder / name).symlink_to(path)
    return folder


def _suite(folder: pathlib.Path) -> suites.Suite:
    captions = protocols.coco_captions(folder / "captions.json")
    return suites.checked(
        "coco", [suites.Prompt(pathlib.Path(name).stem, "coco", False, text) for name, text in captions]
    )


COCO = protocols.Protocol(
    id="small-coco", about="A small one.", prompts=_suite, resolution_px=48, teacher_steps=3, guidance_scale=2.0,
    floor="coco", reference="coco", paired=True, features="inception:clean:inception.pth",
    clip="open_clip:tiny-clip:clip.pt", distance="lpips-alex:alexnet.pth", crop_px=40,
)  # fmt: skip


def _run(data: pathlib.Path, monkeypatch: pytest.MonkeyPatch, protocol: protocols.Protocol) -> tuple[int, Any]:
    monkeypatch.setitem(protocols.PROTOCOLS, protocol.id, protocol)
    out = data.parent / "report"
    code = run.main([
        "--protocol", protocol.id, "--teacher", str(pipeline.artifact.SHIPPED["shapes-teacher"]),
        "--student", str(pipeline.artifact.SHIPPED["shapes-student"]), "--steps", "1", "--data", str(data),
        "--cache", str(data.parent / "cache"), "--out", str(out), "--device", "cpu",
    ])  # fmt: skip
    return code, json.loads((out / "report.json").read_text())


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than")
def test_a_coco_like_protocol(data: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, written = _run(data, monkeypatch, COCO)
    assert code in (1, 2)  # 44 pictures cannot pass; random networks may see anything
    values = written["rows"][1]["values"]
    name = f"inception-{inception.hashlib.sha256((data / 'inception.pth').read_bytes()).hexdigest()[:8]}"
    assert values["fd"]["name"] == f"FD[{name}]" and values["patch_fd"]["name"] == f"patch FD[{name}]"
    assert values["kid"]["name"] == f"KID[{name}]" and values["lpips_to_teacher"]["name"] == "LPIPS[lpips-alex]"
    assert values["clip_score"]["name"] == "CLIP score[open_clip-tiny-clip]"
    assert {"cmmd", "mind", "precision", "recall"} <= values.keys()
    assert "prompt_accuracy" not in values and "diversity" not in values  # one picture a prompt, no oracle
    prints = {key: written["fingerprints"][value["fingerprint"]] for key, value in values.items()}
    assert (prints["fd"]["resizer"], prints["fd"]["antialias"]) == ("pil-bicubic", True)
    assert prints["fd"]["reference"].startswith("coco, 44 pictures, ") and prints["fd"]["resolution_px"] == 48
    assert prints["clip_score"]["resizer"] == "pil-bicubic"
    assert all(value["interval"] for value in (values["fd"], values["cmmd"], values["clip_score"]))


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than")
def test_an_mlperf_like_protocol(data: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((50, 2048)).astype(np.float32)
    np.savez(data / "val.npz", mu=features.mean(0), sigma=np.eye(2048, dtype=np.float64))
    shape = pipeline.load_teacher("shapes-teacher").parts.unet.config
    torch.save(torch.randn(1, shape.in_channels, shape.sample_size, shape.sample_size), data / "latents.pt")
    protocol = dataclasses.replace(
        COCO, id="small-mlperf", resolution_px=64, latents="latents.pt", negative_prompt="a red circle",
        reference="val.npz", paired=False, features="inception:pytorch-fid:inception.pth", clip_scale=100.0,
        windows={"fd": (0.0, 1e9), "clip_score": (99.0, 100.0)},
    )  # fmt: skip
    _, written = _run(data, monkeypatch, protocol)
    teacher, student = written["rows"]
    assert teacher["windows"]["fd"]["met"] is True and teacher["windows"]["clip_score"]["met"] is False
    assert {key for key in student["values"] if not key.endswith("_to_teacher")} == {"fd", "clip_score"}
    assert student["values"]["clip_score"]["name"] == "CLIP score[open_clip-tiny-clip] x100"
    assert written["reference"].startswith("stored moments ")
    assert written["fingerprints"][student["values"]["fd"]["fingerprint"]]["resizer"] == "torch-bilinear"


def test_latents_and_a_negative_prompt_reach_the_picture() -> None:
    teacher = pipeline.load_teacher("shapes-teacher")
    config = teacher.parts.unet.config
    noise = torch.randn(
        config.in_channels, config.sample_size, config.sample_size, generator=torch.Generator().manual_seed(0)
    )
    prompts = ["a red circle", "a red circle"]
    fixed = teacher(prompts, [1, 2], steps=3, guidance_scale=2.0, latents=noise)
    assert np.array_equal(*sampling.to_uint8(fixed))
    drawn = teacher(prompts, [1, 2], steps=3, guidance_scale=2.0)
    assert not np.array_equal(*sampling.to_uint8(drawn))
    away = teacher(prompts, [1, 2], steps=3, guidance_scale=2.0, latents=noise, negative_prompt="a blue star")
    assert not torch.allclose(away, fixed, atol=0.05)
    student = pipeline.load_student("shapes-student")
    assert np.array_equal(*sampling.to_uint8(student(prompts, [1, 2], steps=1, latents=noise)))
    with pytest.raises(pipeline.errors.ConfigError, match="latents must be"):
        student(prompts, [1, 2], steps=1, latents=noise[:1])
