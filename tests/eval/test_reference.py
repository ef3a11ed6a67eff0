"""What pictures are held against: renders, folders, stored moments."""

import dataclasses
import pathlib

import numpy as np
import PIL.Image
import pytest

from diffusion_kd import errors
from diffusion_kd.shapes import oracle
from eval import measure, protocols, reference, suites
from eval.metrics import frechet


def _folder(protocol: protocols.Protocol, *, paired: bool = False) -> protocols.Protocol:
    return dataclasses.replace(protocol, reference="photos", paired=paired, oracle=False, resolution_px=48, crop_px=40)


def _save(path: pathlib.Path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    PIL.Image.fromarray(pixels).save(path)


def test_renders_show_what_is_asked_and_differ_with_seed_and_number(
    protocol: protocols.Protocol, suite: suites.Suite, tmp_path: pathlib.Path
) -> None:
    opened = [reference.open_reference(protocol, suite, tmp_path, seed) for seed in (0, 1)]
    first, second = (np.concatenate([*each.batches(10)]) for each in opened if isinstance(each, reference.Pictures))
    assert first.shape == (96, 64, 64, 3)
    for number, picture in enumerate(first):
        asks = suite.prompts[number // 4].asks
        assert asks is not None and oracle.judge(oracle.read(picture), asks).correct
    assert len({picture.tobytes() for picture in (*first, *second)}) == 192
    assert isinstance(opened[0], reference.Pictures) and opened[0].places is not None
    assert opened[0].places.tolist() == [index for index in range(24) for _ in "abcd"]


def test_a_suite_that_asks_for_nothing_known_has_no_renders(
    protocol: protocols.Protocol, tmp_path: pathlib.Path
) -> None:
    suite = suites.Suite("own", (suites.Prompt("a", "b", False, "a dog"),))
    assert reference.open_reference(protocol, suite, tmp_path, 0) is None


def test_pictures_of_a_folder_are_fitted_and_cropped_where_they_are_large_enough(
    protocol: protocols.Protocol, suite: suites.Suite, ruler: measure.Ruler, tmp_path: pathlib.Path
) -> None:
    for number, size in enumerate(((60, 50), (200, 41), (39, 90), (48, 48), (64, 64))):
        _save(tmp_path / "photos" / f"{number}.png", size, number)
    (tmp_path / "photos" / "readme.txt").write_text("no picture")
    opened = reference.open_reference(_folder(protocol), suite, tmp_path, 0)
    assert isinstance(opened, reference.Pictures)
    assert (opened.count, opened.places) == (5, None)
    ruler.protocol = _folder(protocol)
    sets = ruler.reference_sets(opened)
    assert sets.whole.shape == (5, 12)
    assert sets.patch.shape == (5 * 8, 12)
    assert sets.groups is None


def test_a_paired_folder_must_hold_every_prompt_s_picture(
    protocol: protocols.Protocol, suite: suites.Suite, tmp_path: pathlib.Path
) -> None:
    for number, prompt in enumerate(suite.prompts):
        _save(tmp_path / "photos" / f"{prompt.id}.jpg", (50, 50), number)
    opened = reference.open_reference(_folder(protocol, paired=True), suite, tmp_path, 0)
    assert isinstance(opened, reference.Pictures)
    assert [path.stem for path in opened.sources if isinstance(path, pathlib.Path)] == [
        suite.prompts[place].id for place in suite.standard
    ]
    (tmp_path / "photos" / f"{suite.prompts[4].id}.jpg").unlink()
    with pytest.raises(errors.DataError, match=f"lacks 1 of 24 pictures, {suite.prompts[4].id}"):
        reference.open_reference(_folder(protocol, paired=True), suite, tmp_path, 0)


def test_a_broken_picture_is_named(
    protocol: protocols.Protocol, suite: suites.Suite, ruler: measure.Ruler, tmp_path: pathlib.Path
) -> None:
    _save(tmp_path / "photos" / "a.png", (50, 50), 0)
    (tmp_path / "photos" / "b.jpg").write_bytes(b"\xff\xd8\xff broken")
    opened = reference.open_reference(_folder(protocol), suite, tmp_path, 0)
    assert isinstance(opened, reference.Pictures)
    with pytest.raises(errors.DataError, match=r"b\.jpg is not a readable picture"):
        ruler.reference_sets(opened)


def test_an_empty_or_missing_folder_is_refused(
    protocol: protocols.Protocol, suite: suites.Suite, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(errors.DataError, match="photos cannot be read"):
        reference.open_reference(_folder(protocol), suite, tmp_path, 0)
    (tmp_path / "photos").mkdir()
    with pytest.raises(errors.DataError, match="holds no pictures"):
        reference.open_reference(_folder(protocol), suite, tmp_path, 0)


def test_stored_moments_are_read_as_pytorch_fid_writes_them(tmp_path: pathlib.Path) -> None:
    features = np.random.default_rng(0).standard_normal((40, 6))
    np.savez_compressed(tmp_path / "val.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    loaded, fitted = reference.load_moments(tmp_path / "val.npz"), frechet.Gaussian.fit(features)
    assert frechet.distance(loaded, fitted) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "content",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.zeros((2, 2))},
        {"mu": np.zeros(1), "sigma": np.full((1, 1), np.nan)},
    ],
)
def test_moments_that_are_none_are_refused(tmp_path: pathlib.Path, content: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "val.npz", **content)  # type: ignore[arg-type]
    with pytest.raises(errors.DataError, match=r"val\.npz"):
        reference.load_moments(tmp_path / "val.npz")
    (tmp_path / "val.npz").write_bytes(b"PK broken")
    with pytest.raises(errors.DataError, match=r"val\.npz"):
        reference.load_moments(tmp_path / "val.npz")
