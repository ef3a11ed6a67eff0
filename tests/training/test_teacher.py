"""The teacher from nothing: on shapes, on a folder of pictures, and stopped half-way."""

import json
import pathlib

import numpy as np
import PIL.Image
import pytest
import torch

from diffusion_kd import artifact, errors, pipeline
from tests.training import processes
from training import checkpoint, stages, teacher

SHORT = [
    f"{stage}.{key}"
    for stage, batch_size in (("contrastive", 4), ("vae", 2), ("decoder", 2), ("unet", 2))
    for key in (f"images={2 * batch_size}", f"batch_size={batch_size}", "warmup_images=0")
]


def weights(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    parts = artifact.load(str(folder / "teacher"))
    return {
        **parts.unet.state_dict(),
        **parts.text.state_dict(),
        **{f"vae.{k}": v for k, v in parts.vae.state_dict().items()},
    }


def test_shapes_resumed_after_every_stage_equal_an_unbroken_run(tmp_path: pathlib.Path) -> None:
    command = ["--config", "shapes", "scenes=64", *SHORT]
    teacher.main([*command, "--out", str(tmp_path / "whole")])
    for chosen in ("[contrastive]", "[contrastive,vae]", "[contrastive,vae,decoder]", "[contrastive,vae,decoder,unet]"):
        teacher.main([*command, f"stages={chosen}", "--out", str(tmp_path / "parts")])
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    sampler = pipeline.load_teacher(str(tmp_path / "whole" / "teacher"))
    assert sampler(["a red circle"], [0], steps=2).shape == (1, 3, 64, 64)
    network = pipeline.load_feature_network(str(tmp_path / "whole" / "encoder"))
    assert network(torch.zeros(1, 3, 64, 64)).vector.shape == (1, network.vector_dim)


def test_a_folder_of_pictures_with_words_of_its_own(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    captions = ["eine Katze auf dem Dach", "日本の山", "a zebra", "un chat noir", "ein Boot", "a zebra on a boat"]
    for index in range(len(captions)):
        PIL.Image.fromarray(rng.integers(0, 256, (90, 70 + index, 3), np.uint8)).save(folder / f"{index}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    teacher.main(["--data", str(folder), "--out", str(tmp_path / "run"), *SHORT])
    loaded = artifact.load(str(tmp_path / "run" / "teacher"))
    first, _ = loaded.text.tokenizers
    assert first.tokenize("Katze zebra") == ["katze</w>", "zebra</w>"]
    assert teacher.configs.load(teacher.TeacherConfig, str(tmp_path / "run" / "config.yaml")).vae.images == 4
    for stage in ("contrastive", "vae", "unet"):  # several processes would wait for gradients that never come
        found = checkpoint.Checkpoints(tmp_path / "run" / stage / checkpoint.FOLDER).newest()
        assert found is not None and not any("cells" in name for name in found.state[stage])


def test_a_folder_of_another_run_is_refused(tmp_path: pathlib.Path) -> None:
    command = [*SHORT, "stages=[vae]", "--out", str(tmp_path / "run")]
    teacher.main(["scenes=64", *command])
    with pytest.raises(errors.ConfigError, match="a run with data = 'shapes, 64 scenes', not 'shapes, 32 scenes'"):
        teacher.main(["scenes=32", *command])


def test_latents_are_normalised_without_changing_pictures(tmp_path: pathlib.Path) -> None:
    build = teacher.Build(
        teacher.configs.load(teacher.TeacherConfig, "shapes", ["scenes=64", *SHORT]),
        tmp_path,
        teacher.data.ShapesImages(64, 0),
    )
    images = teacher.data.to_tensor(build.images.images_uint8(range(32)))
    with torch.no_grad():
        before = build.vae.decode(build.vae.encode(images).latent_dist.mean).sample
        build._normalise_latents()
        posterior = build.vae.encode(images).latent_dist
        after = build.vae.decode(posterior.mean).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(posterior.mean.std((0, 2, 3)), torch.ones(12), atol=0.4)


def test_half_a_tokenizer_is_never_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(tokenizer: object, folder: pathlib.Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    config, images = teacher.TeacherConfig(), teacher.data.ShapesImages(8, 0)
    monkeypatch.setattr(teacher.model, "save_tokenizer", cut)
    with pytest.raises(KeyboardInterrupt):
        teacher.Build(config, tmp_path, images)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["origin.json"]
    build = teacher.Build(config, tmp_path, images)
    assert "cells.read.weight" in stages.Contrastive(build.text, build.image_encoder, labelled=True).state_dict()


def test_bad_input_is_one_sentence_exit_code_two_and_nothing_written(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "file").write_text("")
    for more, said in (
        (["--data", str(tmp_path / "nowhere")], "no folder"),
        (["unet.lr=1"], "unknown config key 'unet.lr'"),
        (["scenes=64", "--out", str(tmp_path / "file" / "run")], "is a file"),
        (["--export-now"], "no checkpoint to go by"),
    ):
        result = processes.run("-m", "training.teacher", "--out", str(out), *more)
        assert result.returncode == 2 and said in result.stderr
        assert result.stderr.count("\n") == 1
        assert not out.exists()
