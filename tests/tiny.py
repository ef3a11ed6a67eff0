"""A tiny teacher, a tiny feature network and a few pictures on disk, and how a distillation of them is asked for."""

import json
import pathlib

import numpy as np
import PIL.Image
import transformers

from diffusion_kd import artifact
from diffusion_kd.shapes import model
from tests import toys

SHORT = ["training.images=8", "training.batch_size=2", "training.warmup_images=0", "precision=fp32"]


def write_models(folder: pathlib.Path) -> None:
    """`teacher`, an SDXL-layout folder, and `encoder`, a CLIP folder."""
    parts = toys.tiny_parts()
    artifact.save_pipeline(folder / "teacher", parts=parts)
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=toys.PROJECTION,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=toys.IMAGE_SIZE_PX,
        patch_size=4,
    )
    text = transformers.CLIPTextModelWithProjection(parts.text.text_encoder_2.config)
    joined = transformers.CLIPConfig(
        text_config=text.config.to_dict(), vision_config=config.to_dict(), projection_dim=toys.PROJECTION
    )
    transformers.CLIPModel(joined).save_pretrained(folder / "encoder")
    model.save_tokenizer(parts.text.tokenizers[0], folder / "encoder")


def write_pictures(folder: pathlib.Path) -> None:
    """Five captioned pictures of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index in range(5):
        PIL.Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{index}.jpg")
        lines.append(json.dumps({"file_name": f"{index}.jpg", "text": f"picture {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def arguments(models: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    """Of `training.distill`. more: what overrides what is given here."""
    encoder = f"feature_network={models / 'encoder'}"
    return ["--teacher", str(models / "teacher"), "--out", str(out), *SHORT, encoder, *more]
