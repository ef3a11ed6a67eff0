"""Frozen feature networks: an image -> feature maps at several depths and one global vector.

| class              | network                                             | used for                           |
|--------------------|-----------------------------------------------------|------------------------------------|
| `ClipFeatures`     | any transformers CLIP; the embedded encoder is one  | shapes: everything; CLIP score     |
| `OpenClipFeatures` | any open_clip model with a ViT tower                | CLIP score of real images          |
| `DinoFeatures`     | DINOv2 through timm (Oquab et al. 2023)             | ADD's discriminator on real images |

Discriminators, Fréchet distances, perceptual distances and monitoring take any of them. The teacher's own U-Net as
a feature network works on noised latents and is in `networks.discriminator`.
"""

import abc
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import PIL.Image
import safetensors
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from diffusion_kd import _progress, errors

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, slots=True)
class Features:
    """maps: (B, C_k, h_k, w_k), shallow to deep. vector: (B, P), what the network says of the whole image."""

    maps: tuple[Tensor, ...]
    vector: Tensor


class FeatureNetwork(nn.Module, abc.ABC):
    """A frozen network: no parameter learns and no call of `train` changes it. Gradients reach the images.

    name: what its metrics are called after. map_channels: C_k of each map. vector_dim: P.
    resizer, antialias: how images of another size come to the network's own.
    """

    name: str
    map_channels: tuple[int, ...]
    vector_dim: int
    resizer: str = "area"
    antialias: bool = True

    @abc.abstractmethod
    def forward(self, images: Tensor) -> Features:
        """images: (B, 3, H, W) in [-1, 1], of any size; they are scaled by `resizer`."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def _freeze(self) -> None:
        self.requires_grad_(False)
        super().train(False)


class TextImageNetwork(FeatureNetwork):
    """A feature network whose vectors live in one space with vectors of text."""

    @abc.abstractmethod
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """(B, P), comparable with `Features.vector` by cosine. A text is read up to its last token that fits."""

    @abc.abstractmethod
    def overlong(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts have more tokens than the network reads: their end counts for nothing."""


def _prepare(images: Tensor, size_px: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[-1, 1] -> the network's own size and normalisation; area averaging, as in StyleGAN-T's discriminator."""
    if images.shape[-2:] != (size_px, size_px):
        images = functional.interpolate(images, (size_px, size_px), mode="area")
    shift, scale = images.new_tensor(mean), images.new_tensor(std)
    normalised: Tensor = ((images + 1) / 2 - shift[:, None, None]) / scale[:, None, None]
    return normalised


def resize_pil(images: Tensor, size_px: int) -> Tensor:
    """Centre square, bicubic by Pillow on 8 bits: what CLIP was trained with, and what open_clip does to a picture.

    images: (B, 3, H, W) in [-1, 1] -> (B, 3, size_px, size_px) in [-1, 1], on the same device, without gradients.
    """
    height, width = images.shape[-2:]
    scale = size_px / min(height, width)
    # torchvision's Resize: the shorter side exactly, the longer one truncated; then CenterCrop, rounded.
    shape = (int(width * scale), size_px) if height <= width else (size_px, int(height * scale))
    left, top = (round((side - size_px) / 2) for side in shape)
    pixels = ((images.detach().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    pictures = [PIL.Image.fromarray(each.numpy()).resize(shape, PIL.Image.Resampling.BICUBIC) for each in pixels]
    cut = [np.asarray(picture.crop((left, top, left + size_px, top + size_px))) for picture in pictures]
    resized = torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).to(images.device, torch.float32)
    return resized / 127.5 - 1


def _grid(tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, 1 + N, C) with the class token first -> (B, C, h, w), the class token added to each patch (StyleGAN-T)."""
    patches: Tensor = tokens[:, 1:] + tokens[:, :1]
    return patches.mT.unflatten(-1, shape)  # type: ignore[no-any-return]


class ClipFeatures(TextImageNetwork):
    """A transformers CLIP model. Maps: the input of the first layer and the output of every layer in `depths`."""

    clip: Any

    def __init__(
        self,
        clip: transformers.CLIPModel,
        tokenizer: transformers.CLIPTokenizer,
        name: str,
        *,
        depths: Sequence[int] | None = None,
        mean: Sequence[float] = _CLIP_MEAN,
        std: Sequence[float] = _CLIP_STD,
    ) -> None:
        super().__init__()
        vision = clip.config.vision_config
        self.name, self.clip, self.tokenizer = name, clip, tokenizer
        self.depths = tuple(range(vision.num_hidden_layers + 1)) if depths is None else tuple(depths)
        self.map_channels = (vision.hidden_size,) * len(self.depths)
        self.vector_dim = clip.config.projection_dim
        self._size_px, self._cells = vision.image_size, vision.image_size // vision.patch_size
        self._mean, self._std = tuple(mean), tuple(std)
        self._freeze()

    def forward(self, images: Tensor) -> Features:
        pixels = _prepare(images, self._size_px, self._mean, self._std)
        seen = self.clip.vision_model(pixels, output_hidden_states=True)
        shape = (self._cells, self._cells)
        maps = tuple(_grid(seen.hidden_states[depth], shape) for depth in self.depths)
        return Features(maps, self.clip.visual_projection(seen.pooler_output))

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(self.clip.device)
        vectors: Tensor = self.clip.text_projection(self.clip.text_model(ids).pooler_output)
        return vectors

    def overlong(self, prompts: Sequence[str]) -> list[bool]:
        most = self.tokenizer.model_max_length
        return [len(ids) > most for ids in self.tokenizer(list(prompts), verbose=False).input_ids]


class OpenClipFeatures(TextImageNetwork):
    """An open_clip model with a ViT tower, by its name and weights (a tag or a path); weights None: random.

    resizer: `area`, which gradients pass, or `pil-bicubic`, open_clip's own, for CLIP scores that others can repeat.
    OpenAI's weights want the architectures whose names end in `-quickgelu`.
    """

    clip: Any

    def __init__(
        self,
        architecture: str,
        weights: str | None = None,
        *,
        depths: Sequence[int] | None = None,
        resizer: str = "area",
    ) -> None:
        super().__init__()
        import open_clip

        if resizer not in ("area", "pil-bicubic"):
            raise errors.ConfigError(f"resizer must be area or pil-bicubic, not {resizer!r}")
        self.resizer = resizer

        if architecture not in open_clip.list_models():
            raise errors.ModelError(f"open_clip knows no model {architecture!r}; see open_clip.list_models()")
        self.name = f"open_clip-{architecture}"
        try:
            self.clip = open_clip.create_model(architecture, pretrained=weights)
        except (RuntimeError, OSError) as error:
            raise errors.ModelError(
                f"open_clip cannot load {architecture} with weights {weights!r}: {errors.first_line(error)}"
            ) from None
        self.tokenizer = open_clip.get_tokenizer(architecture)
        visual = self.clip.visual
        layers = len(visual.transformer.resblocks)
        self.depths = tuple(layers * (part + 1) // 4 - 1 for part in range(4)) if depths is None else tuple(depths)
        self.map_channels = (visual.transformer.width,) * len(self.depths)
        self.vector_dim = visual.output_dim
        self._size_px = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
        self._mean, self._std = tuple(visual.image_mean), tuple(visual.image_std)
        self._freeze()

    def forward(self, images: Tensor) -> Features:
        if self.resizer == "pil-bicubic":
            images = resize_pil(images, self._size_px)
        pixels = _prepare(images, self._size_px, self._mean, self._std)
        seen = self.clip.visual.forward_intermediates(pixels, indices=list(self.depths), normalize_intermediates=False)
        return Features(tuple(seen["image_intermediates"]), seen["image_features"])

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        vectors: Tensor = self.clip.encode_text(self.tokenizer(list(prompts)).to(next(self.parameters()).device))
        return vectors

    def overlong(self, prompts: Sequence[str]) -> list[bool]:
        most = self.tokenizer.context_length - 2  # beside the first and the last token
        return [len(self.tokenizer.encode(prompt)) > most for prompt in prompts]


class DinoFeatures(FeatureNetwork):
    """DINOv2 through timm. Maps: the patch embedding and the outputs of four blocks, as ADD's discriminator reads them.

    weights: None for random, True for timm's own download, or a path to a checkpoint.
    Source: Sauer et al. 2023 (ADD), section 3.2; blocks 2, 5, 8, 11 of ViT-S as in StyleGAN-T.
    """

    vit: Any

    def __init__(
        self,
        architecture: str = "vit_small_patch14_dinov2.lvd142m",
        weights: str | bool | None = None,
        *,
        size_px: int = 518,
    ) -> None:
        super().__init__()
        import timm

        pretrained = weights is True
        path = weights if isinstance(weights, str) else None
        try:
            self.vit = timm.create_model(
                architecture, pretrained=pretrained, checkpoint_path=path, img_size=size_px, num_classes=0
            )
        except (RuntimeError, OSError) as error:
            raise errors.ModelError(f"timm cannot make {architecture!r}: {error}") from None
        self.name = architecture
        layers = len(self.vit.blocks)
        self.depths = tuple(layers * (part + 1) // 4 - 1 for part in range(4))
        self.map_channels = (self.vit.embed_dim,) * (len(self.depths) + 1)
        self.vector_dim = self.vit.embed_dim
        self._size_px, self._cells = size_px, size_px // self.vit.patch_embed.patch_size[0]
        self._freeze()

    def forward(self, images: Tensor) -> Features:
        pixels = _prepare(images, self._size_px, _IMAGENET_MEAN, _IMAGENET_STD)
        tokens = self.vit._pos_embed(self.vit.patch_embed(pixels))
        shape = (self._cells, self._cells)
        maps = [_grid(tokens, shape)]
        for depth, block in enumerate(self.vit.blocks):
            tokens = block(tokens)
            if depth in self.depths:
                maps.append(_grid(tokens, shape))
        return Features(tuple(maps), self.vit.norm(tokens)[:, 0])


def load_clip(folder: pathlib.Path, name: str) -> ClipFeatures:
    """A transformers CLIP folder with its tokenizer; `preprocessor_config.json`, if there, gives the normalisation.

    Raises ModelError if it cannot be read or its weights are not finite.
    """
    try:
        with _progress.hidden():
            clip = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise errors.ModelError(f"{name} is not a CLIP model: {errors.first_line(error)}") from None
    if not all(bool(weight.isfinite().all()) for weight in clip.parameters()):
        raise errors.ModelError(f"{name} holds NaN or infinite weights; the file is damaged")
    preprocessing = folder / "preprocessor_config.json"
    config = json.loads(preprocessing.read_text()) if preprocessing.is_file() else {}
    return ClipFeatures(
        clip, tokenizer, name, mean=config.get("image_mean", _CLIP_MEAN), std=config.get("image_std", _CLIP_STD)
    )


def clip_architecture(folder: pathlib.Path, name: str) -> ClipFeatures:
    """The network that `load_clip` would load, on the device `meta`: no weight is read. Raises ModelError."""
    try:
        config = transformers.CLIPConfig.from_pretrained(folder)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise errors.ModelError(f"{name} is not a CLIP model: {errors.first_line(error)}") from None
    with torch.device("meta"):
        return ClipFeatures(transformers.CLIPModel(config), tokenizer, name)
