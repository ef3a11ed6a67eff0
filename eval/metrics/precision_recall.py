"""Precision and recall of a set of pictures against a reference, in a feature space."""

from torch import Tensor

from diffusion_kd import errors

NEIGHBOURS = 3
_BATCH = 250
"""Vectors whose distances to all others are held at a time."""


def precision_recall(features: Tensor, reference: Tensor, *, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of pictures inside the reference's manifold, share of the reference inside the pictures' manifold.

    features (N, d), reference (M, d), N, M > neighbours. A manifold is the union of balls that reach from each vector
    to its k-th nearest neighbour. Low precision: bad pictures; low recall: missing kinds of pictures.
    Computed by torch-fidelity, block by block. Raises DataError for sets that do not match.
    Source: Kynkäänniemi et al. 2019, equations 1 and 2.
    """
    from torch_fidelity import metric_prc

    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        shapes = f"{tuple(features.shape)} and {tuple(reference.shape)}"
        raise errors.DataError(f"feature sets must be (N, d) and (M, d), not {shapes}")
    if min(len(features), len(reference)) <= neighbours:
        raise errors.DataError(
            f"{neighbours} neighbours need {neighbours + 1} vectors a set, not {len(features)} and {len(reference)}"
        )
    found = metric_prc.prc_features_to_metric(
        features, reference, prc_neighborhood=neighbours, prc_batch_size=_BATCH, save_cpu_ram=True, verbose=False
    )
    return found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]
