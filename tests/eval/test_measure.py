"""What is measured on models whose worth is known, and that it is streamed."""

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_kd import errors
from eval import images, measure, networks, processes, protocols, reference, sampling, suites
from eval.metrics import frechet, kid

Make = Callable[..., images.Entrant]


@pytest.fixture
def text_vectors(instruments: networks.Networks, suite: suites.Suite) -> Tensor:
    return networks.text_vectors(instruments.clip, [prompt.text for prompt in suite.prompts], 4)


@pytest.fixture
def truth(protocol: protocols.Protocol, suite: suites.Suite, tmp_path: pathlib.Path) -> reference.Pictures:
    opened = reference.open_reference(protocol, suite, tmp_path, 0)
    assert isinstance(opened, reference.Pictures)
    return opened


def _gallery(folder: pathlib.Path, entrant: images.Entrant, suite: suites.Suite, batch: int = 8) -> images.Gallery:
    gallery = images.Gallery(folder, entrant, images.items(suite, 2, 0), batch)
    gallery.fill(processes.Processes())
    return gallery


def test_a_painter_is_right_everywhere(
    ruler: measure.Ruler,
    suite: suites.Suite,
    painter: sampling.Sampler,
    make_entrant: Make,
    text_vectors: Tensor,
    tmp_path: pathlib.Path,
) -> None:
    gallery = _gallery(tmp_path, make_entrant(painter), suite)
    found = ruler.measure(gallery, gallery, text_vectors)
    assert found.scores["prompt_accuracy"].tolist() == [1] * len(suite.prompts)
    assert all(set(row[np.isfinite(row)]) == {1} for row in found.facts.values())
    assert "lpips_to_teacher" not in found.scores
    assert (found.scores["diversity"] > 0).all()
    assert found.sets.whole.shape == (48, 12)  # standard prompts alone
    assert found.sets.groups is not None and found.sets.groups.tolist() == [
        index % 20 for index in range(24) for _ in "ab"
    ]


def test_edge_cases_have_scores_and_no_part_in_set_distances(
    ruler: measure.Ruler,
    suite: suites.Suite,
    painter: sampling.Sampler,
    make_entrant: Make,
    text_vectors: Tensor,
    tmp_path: pathlib.Path,
) -> None:
    edge = {prompt.text for prompt in suite.prompts if prompt.edge_case}

    def careless(prompts: list[str], seeds: list[int], *, steps: int, guidance_scale: float) -> Tensor:
        drawn = painter(prompts, seeds, steps=steps, guidance_scale=guidance_scale)
        drawn[[prompt in edge for prompt in prompts]] = 0
        return drawn

    teacher = _gallery(tmp_path, make_entrant(painter, "teacher"), suite)
    gallery = _gallery(tmp_path, make_entrant(careless), suite)  # type: ignore[arg-type]
    found, whole = ruler.measure(gallery, teacher, text_vectors), ruler.measure(teacher, teacher, text_vectors)
    assert found.scores["prompt_accuracy"].tolist() == [1] * 24 + [0] * 8
    assert found.scores["lpips_to_teacher"][:24].tolist() == [0] * 24
    assert (found.scores["lpips_to_teacher"][24:] > 0).all()
    assert np.array_equal(found.sets.whole, whole.sets.whole)
    assert np.array_equal(found.sets.patch, whole.sets.patch)


def test_nothing_depends_on_the_batch_size(
    protocol: protocols.Protocol,
    suite: suites.Suite,
    instruments: networks.Networks,
    painter: sampling.Sampler,
    make_entrant: Make,
    text_vectors: Tensor,
    tmp_path: pathlib.Path,
) -> None:
    found = []
    for size in (4, 22):
        ruler = measure.Ruler(protocol, suite, instruments, tmp_path, batch_size=size)
        gallery = _gallery(tmp_path, make_entrant(painter), suite, size)
        found.append(ruler.measure(gallery, gallery, text_vectors))
    one, other = found
    assert np.allclose(one.sets.whole, other.sets.whole, atol=1e-6)
    assert np.allclose(one.sets.patch, other.sets.patch, atol=1e-6)
    for metric, scores in one.scores.items():
        assert np.allclose(scores, other.scores[metric], atol=1e-6)


def test_scores_are_those_of_the_pictures_themselves(
    ruler: measure.Ruler,
    suite: suites.Suite,
    instruments: networks.Networks,
    noise_maker: sampling.Sampler,
    painter: sampling.Sampler,
    make_entrant: Make,
    text_vectors: Tensor,
    tmp_path: pathlib.Path,
) -> None:
    gallery, teacher = (_gallery(tmp_path, make_entrant(each), suite) for each in (noise_maker, painter))
    found = ruler.measure(gallery, teacher, text_vectors)
    number = 11
    mine, theirs = (
        sampling.to_images(each.read(each.items[2 * number : 2 * number + 2])) for each in (gallery, teacher)
    )
    vectors = instruments.clip(mine).vector
    cosine = torch.nn.functional.cosine_similarity(vectors, text_vectors[[number] * 2]).mean().item()
    assert found.scores["clip_score"][number] == pytest.approx(cosine, abs=1e-6)
    distance = instruments.distance.between
    assert found.scores["lpips_to_teacher"][number] == pytest.approx(distance(mine, theirs).mean().item(), rel=1e-5)
    assert found.scores["diversity"][number] == pytest.approx(distance(mine[:1], mine[1:]).item(), rel=1e-5)
    assert np.allclose(found.sets.whole[2 * number : 2 * number + 2], instruments.features(mine).vector, atol=1e-6)


def test_an_excluded_prompt_counts_nowhere(
    ruler: measure.Ruler,
    suite: suites.Suite,
    truth: reference.Pictures,
    painter: sampling.Sampler,
    make_entrant: Make,
    text_vectors: Tensor,
    tmp_path: pathlib.Path,
) -> None:
    gallery = _gallery(tmp_path, make_entrant(painter), suite)
    sets = ruler.reference_sets(truth)
    ruler.excluded = frozenset({suite.prompts[3].id, suite.prompts[30].id})
    found = ruler.measure(gallery, gallery, text_vectors)
    assert np.isnan(found.scores["prompt_accuracy"][[3, 30]]).all()
    assert np.isfinite(found.scores["prompt_accuracy"]).sum() == 30
    assert truth.places is not None
    kept = ruler.kept(sets, truth.places)
    assert (len(found.sets.whole), len(kept.whole), len(kept.patch)) == (46, 92, 92 * 8)
    assert np.array_equal(kept.whole, np.delete(sets.whole, range(12, 16), axis=0))


def test_distances_are_those_of_the_features(
    ruler: measure.Ruler,
    suite: suites.Suite,
    truth: reference.Pictures,
    painter: sampling.Sampler,
    noise_maker: sampling.Sampler,
    make_entrant: Make,
    text_vectors: Tensor,
    tmp_path: pathlib.Path,
) -> None:
    sets = ruler.reference_sets(truth)
    good, bad = (_gallery(tmp_path, make_entrant(each), suite) for each in (painter, noise_maker))
    near, far = (measure.distances(ruler.measure(each, good, text_vectors).sets, sets) for each in (good, bad))
    assert set(near) == {"fd", "kid", "cmmd", "mind", "patch_fd", "patch_kid"}
    assert all(far[name].whole > near[name].whole for name in near if not name.startswith("patch"))
    assert all(len(each.without) == 20 for each in near.values())
    mine = ruler.measure(good, good, text_vectors).sets
    assert near["fd"].whole == pytest.approx(frechet.frechet_distance(mine.whole, sets.whole), rel=1e-6)
    stored = measure.distances(mine, frechet.Gaussian.fit(sets.whole))
    assert set(stored) == {"fd"}
    assert stored["fd"].whole == pytest.approx(near["fd"].whole, rel=1e-9)


def test_a_group_leaves_with_its_crops_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    groups, other_groups = np.arange(40) % 4, np.arange(80) % 4

    def sets(count: int, labels: np.ndarray) -> measure.Sets:
        whole = rng.standard_normal((count, 5)).astype(np.float32)
        return measure.Sets(whole, whole, rng.standard_normal((count * 3, 5)).astype(np.float32), labels)

    ours, theirs = sets(40, groups), sets(80, other_groups)
    found = measure.distances(ours, theirs)
    for group in range(4):
        mine, others = ours.patch[groups.repeat(3) != group], theirs.patch[other_groups.repeat(3) != group]
        assert found["patch_fd"].without[group] == pytest.approx(frechet.frechet_distance(mine, others), rel=1e-6)
        alone = kid.jackknife(mine, others, np.zeros(len(mine), int), np.zeros(len(others), int)).whole
        assert found["patch_kid"].without[group] == pytest.approx(alone, rel=1e-6)


def test_few_prompts_fill_fewer_groups() -> None:
    assert measure.compact(np.array([3, 3, 17, 5])).tolist() == [0, 0, 2, 1]


def test_features_that_are_not_finite_are_refused(ruler: measure.Ruler, instruments: networks.Networks) -> None:
    with torch.no_grad():
        instruments.features(torch.zeros(1, 3, 64, 64))
        ruler.instruments.features.forward = lambda pixels: type("F", (), {"vector": torch.full((1, 12), torch.nan)})()  # type: ignore[method-assign]
    with pytest.raises(errors.ModelError, match="toy makes NaN"):
        ruler.vectors(ruler.instruments.features, np.zeros((1, 64, 64, 3), np.uint8))
