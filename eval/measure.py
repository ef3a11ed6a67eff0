"""Stream pictures through the metrics: what is kept of a picture is a row of features and its prompt's scores.

Features lie in files, so memory does not grow with the number of pictures.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import tqdm
from numpy.typing import NDArray
from torch import Tensor

from diffusion_kd import errors
from diffusion_kd.networks import features
from diffusion_kd.shapes import oracle
from eval import images, networks, protocols, reference, sampling, stats, suites
from eval.metrics import clip_score, cmmd, diversity, frechet, kid, mind, patches, precision_recall, prompt_accuracy

Scores = dict[str, NDArray[np.float64]]
"""Metric -> one score for each prompt of the suite, (P,); NaN where the metric says nothing of a prompt."""

SET_DISTANCES = {"fd": frechet, "kid": kid, "cmmd": cmmd, "mind": mind}
"""Distances of whole sets of pictures."""

MOST_KERNEL_ROWS = 16_384
"""Crops of a set that a kernel distance compares each with each."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sets:
    """Features of the pictures of standard prompts. groups: (N,), the jackknife group of each; None: of none.

    whole, clip: (N, d), of the picture at the protocol's resolution. patch: (N * k, d), of k crops of native pixels.
    clip is whole where one network serves as both.
    """

    whole: NDArray[np.float32]
    clip: NDArray[np.float32]
    patch: NDArray[np.float32]
    groups: NDArray[np.int64] | None


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on one entrant. facts: scores by attribute of the shapes oracle."""

    entrant: images.Entrant
    sets: Sets
    scores: Scores
    facts: Scores


class Ruler:
    """The protocol's metrics on the prompts that every entrant could draw.

    workspace: a folder for features. excluded: ids of prompts that count for nobody.
    """

    def __init__(
        self,
        protocol: protocols.Protocol,
        suite: suites.Suite,
        instruments: networks.Networks,
        workspace: pathlib.Path,
        *,
        batch_size: int,
    ) -> None:
        self.protocol, self.suite, self.instruments = protocol, suite, instruments
        self.workspace, self.batch_size = workspace, batch_size
        self.device = networks.device_of(instruments.features)
        self.excluded: frozenset[str] = frozenset()
        self._files = 0

    # --- features of sets ---------------------------------------------------------------------------

    def reference_sets(self, truth: reference.Pictures) -> Sets:
        """Features of the true pictures. Raises DataError for one that cannot be read."""
        writer = _SetWriter(self, truth.count)
        bar = tqdm.tqdm(truth.batches(self.batch_size), desc="reference", total=-(-truth.count // self.batch_size))
        for batch in bar:
            whole = images.fit(batch, self.protocol.resolution_px)
            large = [min(image.shape[:2]) >= self.protocol.crop_px for image in batch]
            native = [image if fits else small for image, fits, small in zip(batch, large, whole, strict=True)]
            writer.add(whole, native)
        return writer.sets(None if truth.places is None else self.suite.groups[truth.places])

    def kept(self, sets: Sets, prompts: NDArray[np.int64]) -> Sets:
        """Without the excluded prompts. prompts: (N,), the place of each picture's prompt in the suite."""
        if not self.excluded:
            return sets
        excluded = [index for index, prompt in enumerate(self.suite.prompts) if prompt.id in self.excluded]
        kept = ~np.isin(prompts, excluded)
        groups = None if sets.groups is None else sets.groups[kept]
        crops = kept.repeat(self.protocol.crops_per_image)
        return Sets(sets.whole[kept], sets.clip[kept], sets.patch[crops], groups)

    # --- one entrant --------------------------------------------------------------------------------

    def measure(self, gallery: images.Gallery, teacher: images.Gallery, text_vectors: Tensor) -> Measured:
        """Stream one entrant's pictures; `teacher` may be the same gallery. text_vectors: (P, d), of each prompt."""
        everyone = [(index, each) for index, each in enumerate(self.suite.prompts) if each.id not in self.excluded]
        standard = [index for index, prompt in everyone if not prompt.edge_case]
        groups = self.suite.groups[standard].repeat(self.protocol.images_per_prompt)
        writer = _SetWriter(self, len(groups))
        sheet = _ScoreSheet(len(self.suite.prompts))
        each = self.protocol.images_per_prompt
        bar = tqdm.tqdm(total=len(everyone) * each, desc=f"measuring {gallery.entrant.label}", unit="img")
        with bar:
            for part in _parts(everyone, max(self.batch_size // each, 1)):
                some = [item for index, _ in part for item in gallery.items[index * each : (index + 1) * each]]
                native = gallery.read(some)
                whole = images.fit(list(native), self.protocol.resolution_px)
                is_standard = np.repeat([not prompt.edge_case for _, prompt in part], each)
                _, clip = writer.add(whole, list(native), keep=is_standard)
                self._score(sheet, part, whole, clip, text_vectors)
                if teacher is not gallery:
                    others = images.fit(list(teacher.read(some)), self.protocol.resolution_px)
                    sheet.add("lpips_to_teacher", part, self._distance(whole, others))
                bar.update(len(some))
        return Measured(gallery.entrant, writer.sets(groups), sheet.scores, sheet.facts)

    def _score(
        self,
        sheet: "_ScoreSheet",
        part: Sequence[tuple[int, suites.Prompt]],
        whole: NDArray[np.uint8],
        clip: Tensor,
        text_vectors: Tensor,
    ) -> None:
        each = self.protocol.images_per_prompt
        indices = np.repeat([index for index, _ in part], each)
        cosine = clip_score.clip_scores(clip, text_vectors[indices]).numpy() * self.protocol.clip_scale
        sheet.add("clip_score", part, cosine)
        if each > 1:
            spread = diversity.mean_pairwise_distances(sampling.to_images(whole), each, self._on_device)
            sheet.add("diversity", part, spread.double().numpy())
        if self.protocol.oracle:
            for number, (index, prompt) in enumerate(part):
                if prompt.asks is not None:
                    mine = whole[number * each : (number + 1) * each]
                    sheet.add_verdicts(index, prompt_accuracy.judge(mine, [prompt.asks] * each))

    @torch.no_grad()
    def _on_device(self, ours: Tensor, theirs: Tensor) -> Tensor:
        found: Tensor = self.instruments.distance.between(ours.to(self.device), theirs.to(self.device))
        return found.float().cpu()

    def _distance(self, ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> NDArray[np.float64]:
        return self._on_device(sampling.to_images(ours), sampling.to_images(theirs)).double().numpy()

    @torch.no_grad()
    def vectors(self, network: features.FeatureNetwork, images_uint8: NDArray[np.uint8]) -> Tensor:
        """(B, H, W, 3) -> (B, P) float32 on the CPU. Raises ModelError if they are not finite."""
        found: Tensor = network(sampling.to_images(images_uint8).to(self.device)).vector.float().cpu()
        if not found.isfinite().all():
            raise errors.ModelError(f"{network.name} makes NaN or infinite features")
        return found

    def storage(self, rows: int, columns: int) -> NDArray[np.float32]:
        self._files += 1
        path = self.workspace / f"{self._files}.features"
        return np.memmap(path, np.float32, "w+", shape=(rows, columns)) if rows else np.zeros((0, columns), np.float32)


class _SetWriter:
    """Writes features of one entrant, or of the reference, row by row."""

    def __init__(self, ruler: Ruler, rows: int) -> None:
        self._ruler, self._row = ruler, 0
        parts = ruler.instruments
        self._whole = ruler.storage(rows, parts.features.vector_dim)
        self._shared = parts.clip is parts.features
        self._clip = self._whole if self._shared else ruler.storage(rows, parts.clip.vector_dim)
        self._patch = ruler.storage(rows * ruler.protocol.crops_per_image, parts.features.vector_dim)

    def add(
        self, whole: NDArray[np.uint8], native: Sequence[NDArray[np.uint8]], keep: NDArray[np.bool_] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features and CLIP vectors of all pictures; rows are written of those that are kept."""
        ruler, keep = self._ruler, np.ones(len(whole), bool) if keep is None else keep
        vectors = ruler.vectors(ruler.instruments.features, whole)
        clip = vectors if self._shared else ruler.vectors(ruler.instruments.clip, whole)
        rows = slice(self._row, self._row + int(keep.sum()))
        if keep.any():
            kept = (image for image, is_kept in zip(native, keep, strict=True) if is_kept)
            self._whole[rows] = vectors[torch.from_numpy(keep)].numpy()
            self._add_crops(rows.start, list(kept))
            if not self._shared:
                self._clip[rows] = clip[torch.from_numpy(keep)].numpy()
        self._row = rows.stop
        return vectors, clip

    def _add_crops(self, row: int, pictures: Sequence[NDArray[np.uint8]]) -> None:
        """Of the pictures from `row` on, all in one call of the network; a crop's place follows from its own row."""
        each, size_px = self._ruler.protocol.crops_per_image, self._ruler.protocol.crop_px
        first = row * each
        crops = [
            patches.crop(picture, size_px, first + number * each + place)
            for number, picture in enumerate(pictures)
            for place in range(each)
        ]
        found = self._ruler.vectors(self._ruler.instruments.features, np.stack(crops))
        self._patch[first : first + len(crops)] = found.numpy()

    def sets(self, groups: NDArray[np.int64] | None) -> Sets:
        assert self._row == len(self._whole), f"{self._row} of {len(self._whole)} rows were written"
        return Sets(self._whole, self._clip, self._patch, groups)


class _ScoreSheet:
    """Scores of prompts: the mean over a prompt's pictures."""

    def __init__(self, prompts: int) -> None:
        self._prompts = prompts
        self.scores: Scores = {}
        self.facts: Scores = {}

    def add(self, metric: str, part: Sequence[tuple[int, suites.Prompt]], values: NDArray[np.float64]) -> None:
        """values: (k * len(part),), those of one prompt beside one another."""
        row = self.scores.setdefault(metric, np.full(self._prompts, np.nan))
        row[[index for index, _ in part]] = values.reshape(len(part), -1).mean(1)

    def add_verdicts(self, index: int, verdicts: Sequence[oracle.Verdict]) -> None:
        row = self.scores.setdefault("prompt_accuracy", np.full(self._prompts, np.nan))
        row[index] = np.mean([verdict.correct for verdict in verdicts])
        for attribute in verdicts[0].facts:
            facts = self.facts.setdefault(attribute, np.full(self._prompts, np.nan))
            facts[index] = np.mean([verdict.facts[attribute] for verdict in verdicts])


def _parts(prompts: Sequence[tuple[int, suites.Prompt]], size: int) -> Iterator[Sequence[tuple[int, suites.Prompt]]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


# --- distances of sets ------------------------------------------------------------------------------


def distances(sets: Sets, other: Sets | frechet.Gaussian) -> dict[str, stats.Jackknife]:
    """Every set distance; against stored moments the Fréchet distance alone."""
    assert sets.groups is not None, "an entrant's pictures have groups"
    groups = compact(sets.groups)
    if isinstance(other, frechet.Gaussian):
        return {"fd": frechet.jackknife(sets.whole, other, groups)}
    other_groups = None if other.groups is None else compact(other.groups)
    found = {
        name: metric.jackknife(
            *((sets.clip, other.clip) if name == "cmmd" else (sets.whole, other.whole)), groups, other_groups
        )
        for name, metric in SET_DISTANCES.items()
    }
    for name, metric, most in (("patch_fd", frechet, None), ("patch_kid", kid, MOST_KERNEL_ROWS)):
        (patch, each), (other_patch, other_each) = _crops(sets, most), _crops(other, most)
        labels = None if other_groups is None else other_groups.repeat(other_each)
        found[name] = metric.jackknife(patch, other_patch, groups.repeat(each), labels)
    return found


def _crops(sets: Sets, most: int | None) -> tuple[NDArray[np.float32], int]:
    """Features of crops, and how many of each picture: all, or the first few where all would be more than `most`."""
    pictures, crops = len(sets.whole), len(sets.patch) // len(sets.whole)
    each = crops if most is None else min(crops, max(1, most // pictures))
    return sets.patch.reshape(pictures, crops, -1)[:, :each].reshape(pictures * each, -1), each


def compact(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Group numbers without gaps: few prompts fill fewer groups."""
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def precision_and_recall(sets: Sets, other: Sets) -> dict[str, float]:
    """Empty for sets too small for their neighbours."""
    if min(len(sets.whole), len(other.whole)) <= precision_recall.NEIGHBOURS:
        return {}
    both = (torch.from_numpy(np.asarray(each.whole)) for each in (sets, other))
    return dict(zip(("precision", "recall"), precision_recall.precision_recall(*both), strict=True))
