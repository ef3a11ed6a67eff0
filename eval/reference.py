"""What generated pictures are held against: renders of the shapes domain, true pictures, or stored moments."""

import dataclasses
import hashlib
import pathlib
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from diffusion_kd import errors
from diffusion_kd.shapes import scenes
from eval import images, protocols, suites
from eval.metrics import frechet

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True, slots=True)
class Pictures:
    """True pictures, in batches. name: for the fingerprint. places: (M,), of each one's prompt in the suite.

    places None: they belong to no prompt. A picture is brought to its protocol's resolution only where it is measured
    whole, so that crops are of native pixels.
    """

    name: str
    count: int
    places: NDArray[np.int64] | None
    sources: Sequence[pathlib.Path] | Sequence[tuple[scenes.Prompt, int]]

    def batches(self, size: int) -> Iterator[list[NDArray[np.uint8]]]:
        for start in range(0, self.count, size):
            yield [_picture(source) for source in self.sources[start : start + size]]


def _picture(source: pathlib.Path | tuple[scenes.Prompt, int]) -> NDArray[np.uint8]:
    if isinstance(source, pathlib.Path):
        return images.load_image(source)
    prompt, seed = source
    return scenes.render(scenes.complete(prompt, np.random.default_rng(seed)))


def open_reference(
    protocol: protocols.Protocol, suite: suites.Suite, data: pathlib.Path, seed: int
) -> Pictures | frechet.Gaussian | None:
    """The protocol's truth for a suite's standard prompts; None where there is none.

    seed: of renders. Raises DataError for a folder without pictures, or with fewer than its prompts, and for
    statistics of another form.
    """
    if protocol.reference is None:
        return None
    if protocol.reference == "renders":
        return renders(suite, protocol.references_per_prompt, seed)
    path = data / protocol.reference
    if path.suffix == ".npz":
        return load_moments(path)
    return _folder(path, suite if protocol.paired else None)


def renders(suite: suites.Suite, each: int, seed: int) -> Pictures | None:
    """`each` true pictures of every standard prompt, what it leaves open being drawn; None if one asks for nothing."""
    asked = [suite.prompts[place] for place in suite.standard]
    if any(prompt.asks is None for prompt in asked):
        return None
    sources = [
        (prompt.asks, images.item_seed(prompt.id, number, seed) + 2**32)
        for prompt in asked
        for number in range(each)
        if prompt.asks is not None
    ]
    return Pictures(
        f"renders of {len(sources)} scenes, seed {seed}", len(sources), suite.standard.repeat(each), sources
    )


def _folder(folder: pathlib.Path, suite: suites.Suite | None) -> Pictures:
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    except OSError as error:
        raise errors.DataError(f"{folder} cannot be read: {errors.first_line(error)}") from None
    if suite is None:
        if not found:
            raise errors.DataError(f"{folder} holds no pictures ({', '.join(_PICTURES)})")
        return Pictures(_folder_name(folder, found), len(found), None, found)
    by_stem, wanted = {path.stem: path for path in found}, [suite.prompts[place].id for place in suite.standard]
    lacking = [prompt_id for prompt_id in wanted if prompt_id not in by_stem]
    if lacking:
        raise errors.DataError(f"{folder} lacks {len(lacking)} of {len(wanted)} pictures, {lacking[0]} among them")
    chosen = [by_stem[prompt_id] for prompt_id in wanted]
    return Pictures(_folder_name(folder, chosen), len(chosen), suite.standard, chosen)


def _folder_name(folder: pathlib.Path, paths: Sequence[pathlib.Path]) -> str:
    """With a hash of names and sizes: another set of pictures is another reference."""
    listed = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    return f"{folder.name}, {len(paths)} pictures, {hashlib.sha256(listed.encode()).hexdigest()[:12]}"


def load_moments(path: pathlib.Path) -> frechet.Gaussian:
    """`mu` (d,) and `sigma` (d, d) of an .npz, as pytorch-fid stores them. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as held:
            mean, covariance = (np.asarray(held[key], np.float64) for key in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise errors.DataError(f"{path} holds no mu and sigma: {errors.first_line(error)}") from None
    if mean.ndim != 1 or covariance.shape != (len(mean),) * 2 or not np.isfinite(covariance).all():
        raise errors.DataError(f"{path}: mu and sigma must be (d,) and (d, d), not {mean.shape} and {covariance.shape}")
    return frechet.Gaussian.from_covariance(mean, covariance)
