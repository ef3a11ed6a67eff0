"""Inception features: the only ones whose Fréchet distance is called FID.

The network and its weights are torch-fidelity's; how a picture comes to 299 px is chosen here, as it moves a FID by
more than most models differ.

| preprocessing | resize                                   | antialias | whose FID                                    |
|---------------|------------------------------------------|-----------|----------------------------------------------|
| `tf1`         | bilinear of TensorFlow 1                 | no        | the original code, torch-fidelity            |
| `pytorch-fid` | bilinear of torch                        | no        | pytorch-fid, MLPerf                          |
| `clean`       | bicubic of Pillow on floats              | yes       | clean-fid, and so DMD2, GigaGAN              |
"""

import hashlib
import pathlib

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional

from diffusion_kd import errors
from diffusion_kd.networks import features
from eval import checkpoints

SIZE_PX = 299
WEIGHTS_SHA256_PREFIX = "6726825d"
"""Of the file of the original weights, as its name says: `weights-inception-2015-12-05-6726825d.pth`."""

_RESIZERS = {"tf1": ("tf1-bilinear", False), "pytorch-fid": ("torch-bilinear", False), "clean": ("pil-bicubic", True)}
_LAYERS = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e",
    "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool",
)  # fmt: skip


class InceptionFeatures(features.FeatureNetwork):
    """Inception V3 as FID uses it: the vector is the last pooling layer, 2048-d. No maps.

    name: `inception` for the original weights, `inception-<hash>` for any others, so that no other distance is a FID.
    Raises ModelError if the file is not a checkpoint of this network, ConfigError for an unknown preprocessing.
    """

    map_channels, vector_dim = (), 2048

    def __init__(self, weights: pathlib.Path, preprocessing: str = "tf1") -> None:
        super().__init__()
        from torch_fidelity import feature_extractor_inceptionv3

        if preprocessing not in _RESIZERS:
            raise errors.ConfigError(f"preprocessing must be one of {', '.join(_RESIZERS)}, not {preprocessing!r}")
        checkpoints.load(weights)  # refuses what is not plain tensors, before torch-fidelity opens it
        try:
            self.inception = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
                "inception", ["2048"], feature_extractor_weights_path=str(weights)
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise errors.ModelError(f"{weights} is not an Inception checkpoint: {errors.first_line(error)}") from None
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        self.name = "inception" if digest.startswith(WEIGHTS_SHA256_PREFIX) else f"inception-{digest[:8]}"
        self.preprocessing = preprocessing
        self.resizer, self.antialias = _RESIZERS[preprocessing]
        self._freeze()

    def forward(self, images: Tensor) -> features.Features:
        pixels = getattr(self, f"_{self.preprocessing.replace('-', '_')}")((images + 1) * 127.5)
        for layer in _LAYERS:
            pixels = getattr(self.inception, layer)(pixels)
        return features.Features((), pixels.flatten(1))

    def _tf1(self, levels: Tensor) -> Tensor:
        from torch_fidelity import interpolate_compat_tensorflow

        resized = interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x(
            levels, size=(SIZE_PX, SIZE_PX), align_corners=False
        )
        return (resized - 128) / 128  # type: ignore[no-any-return]

    def _pytorch_fid(self, levels: Tensor) -> Tensor:
        return functional.interpolate(levels, (SIZE_PX, SIZE_PX), mode="bilinear", align_corners=False) / 127.5 - 1

    def _clean(self, levels: Tensor) -> Tensor:
        """Each channel by itself, in floats: nothing is rounded to 8 bits on the way."""
        flat = levels.detach().cpu().flatten(0, 1).numpy()
        size = (SIZE_PX, SIZE_PX)
        resized = [np.asarray(PIL.Image.fromarray(one).resize(size, PIL.Image.Resampling.BICUBIC)) for one in flat]
        back = torch.from_numpy(np.stack(resized)).clamp(0, 255).unflatten(0, levels.shape[:2])
        return (back.to(levels.device) - 128) / 128  # type: ignore[no-any-return]


def frechet_name(network: features.FeatureNetwork) -> str:
    """`FID` for Inception with its original weights; `FD[...]` for everything else."""
    genuine = isinstance(network, InceptionFeatures) and network.name == "inception"
    return "FID" if genuine else f"FD[{network.name}]"
