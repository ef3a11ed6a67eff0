"""CLIP score: agreement of images and prompts in a joint space."""

from torch import Tensor
from torch.nn import functional

from diffusion_kd import errors


def clip_scores(image_vectors: Tensor, text_vectors: Tensor) -> Tensor:
    """Cosine of each image's vector and its prompt's vector, (N,) in [-1, 1].

    image_vectors, text_vectors: (N, P), of any length. Neither clamped at 0 nor multiplied by 2.5 or 100, as some
    libraries do. Raises DataError when the shapes differ. Source: Hessel et al. 2021, equation 1, without w and max.
    """
    if image_vectors.ndim != 2 or image_vectors.shape != text_vectors.shape:
        shapes = f"{tuple(image_vectors.shape)} and {tuple(text_vectors.shape)}"
        raise errors.DataError(f"image and text vectors must both be (N, P), not {shapes}")
    return functional.cosine_similarity(image_vectors.double(), text_vectors.double(), dim=1)
