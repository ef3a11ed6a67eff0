"""Pictures on disk: nothing is made twice, nothing half-made counts, nothing that could not be made is hidden."""

import dataclasses
import errno
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from diffusion_kd import errors
from eval import images, processes, sampling, suites

ONE = processes.Processes()
Make = Callable[..., images.Entrant]


@pytest.fixture
def items(suite: suites.Suite) -> list[images.Item]:
    return images.items(suite, 2, 0)[:20]


def _gallery(folder: pathlib.Path, entrant: images.Entrant, items: list[images.Item], batch: int = 8) -> images.Gallery:
    return images.Gallery(folder, entrant, items, batch)


def test_pictures_of_a_prompt_stand_together_and_have_seeds_of_their_own(suite: suites.Suite) -> None:
    made = images.items(suite, 3, 0)
    assert [item.prompt for item in made[:4]] == [suite.prompts[0]] * 3 + [suite.prompts[1]]
    assert len({item.seed for item in made}) == len(made)
    assert {item.seed for item in made}.isdisjoint({item.seed for item in images.items(suite, 3, 1)})
    shorter = images.items(suites.Suite("x", suite.prompts[5:]), 3, 0)
    assert shorter == made[15:]  # a seed follows from the prompt, not from its place


def test_what_is_made_is_kept_to_the_bit(
    tmp_path: pathlib.Path, make_entrant: Make, noise_maker: sampling.Sampler, items: list[images.Item]
) -> None:
    gallery = _gallery(tmp_path, make_entrant(noise_maker), items)
    gallery.fill(ONE)
    drawn = noise_maker([item.prompt.text for item in items], [item.seed for item in items], steps=1, guidance_scale=0)
    assert np.array_equal(gallery.read(items), sampling.to_uint8(drawn))


def test_nothing_is_made_twice(
    tmp_path: pathlib.Path, make_entrant: Make, noise_maker: sampling.Sampler, items: list[images.Item]
) -> None:
    for _ in range(2):
        _gallery(tmp_path, make_entrant(noise_maker), items).fill(ONE)
    assert noise_maker.drawn == 20  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change",
    [{"artifact_sha256": "x"}, {"steps": 2}, {"guidance_scale": 1.0}, {"settings": {"a": "x"}}, {"device": "cuda"}],
)
def test_another_model_or_setting_has_pictures_of_its_own(
    tmp_path: pathlib.Path,
    make_entrant: Make,
    noise_maker: sampling.Sampler,
    items: list[images.Item],
    change: dict[str, object],
) -> None:
    entrant = make_entrant(noise_maker)
    _gallery(tmp_path, entrant, items).fill(ONE)
    _gallery(tmp_path, dataclasses.replace(entrant, **change), items).fill(ONE)  # type: ignore[arg-type]
    assert noise_maker.drawn == 40  # type: ignore[attr-defined]


def test_other_code_has_pictures_of_its_own(
    tmp_path: pathlib.Path,
    make_entrant: Make,
    noise_maker: sampling.Sampler,
    items: list[images.Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _gallery(tmp_path, make_entrant(noise_maker), items).fill(ONE)
    monkeypatch.setattr(images, "code_sha256", lambda: "other")
    _gallery(tmp_path, make_entrant(noise_maker), items).fill(ONE)
    assert noise_maker.drawn == 40  # type: ignore[attr-defined]


def test_a_killed_run_goes_on_with_whole_blocks(
    tmp_path: pathlib.Path, make_entrant: Make, noise_maker: sampling.Sampler, items: list[images.Item]
) -> None:
    class Killed(Exception): ...

    def dies(prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        if noise_maker.drawn:  # type: ignore[attr-defined]
            raise Killed
        return noise_maker(prompts, seeds, steps=steps, guidance_scale=guidance_scale)

    with pytest.raises(Killed):
        _gallery(tmp_path, make_entrant(dies, sha256="same"), items).fill(ONE)
    gallery = _gallery(tmp_path, make_entrant(noise_maker, sha256="same"), items)
    next(gallery.folder.glob("*.png")).unlink()  # as if it had died in the middle of the block
    noise_maker.asked.clear()  # type: ignore[attr-defined]
    gallery.fill(ONE)
    assert len(noise_maker.asked) == 3  # type: ignore[attr-defined]
    assert len(list(gallery.folder.glob("*.png"))) == 20
    assert not [path for path in gallery.folder.iterdir() if path.name.startswith(".")]


def test_processes_share_the_blocks(
    tmp_path: pathlib.Path, make_entrant: Make, noise_maker: sampling.Sampler, items: list[images.Item]
) -> None:
    gallery = _gallery(tmp_path, make_entrant(noise_maker), items)
    gallery.fill(processes.Processes(0, 2))
    assert noise_maker.drawn == 8 + 4  # type: ignore[attr-defined]
    gallery.fill(processes.Processes(1, 2))
    assert noise_maker.drawn == 20  # type: ignore[attr-defined]
    assert gallery.read(items).shape == (20, 64, 64, 3)


def test_a_damaged_picture_is_made_again(
    tmp_path: pathlib.Path,
    make_entrant: Make,
    noise_maker: sampling.Sampler,
    items: list[images.Item],
    caplog: pytest.LogCaptureFixture,
) -> None:
    gallery = _gallery(tmp_path, make_entrant(noise_maker), items)
    gallery.fill(ONE)
    before = gallery.read(items)
    path = gallery.folder / f"{items[3].name}.png"
    path.write_bytes(path.read_bytes()[:200])
    assert np.array_equal(gallery.read(items), before)
    assert "made again" in caplog.text


def test_pictures_that_are_not_finite_are_counted_and_never_black(
    tmp_path: pathlib.Path, make_entrant: Make, noise_maker: sampling.Sampler, items: list[images.Item]
) -> None:
    bad = items[5]

    def breaks(prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        drawn = noise_maker(prompts, seeds, steps=steps, guidance_scale=guidance_scale)
        drawn[[seed == bad.seed for seed in seeds], :, 10, 10] = torch.nan
        return drawn

    gallery = _gallery(tmp_path, make_entrant(breaks), items)
    gallery.fill(ONE)
    assert gallery.lost() == {bad.prompt.id: "the model made NaN or infinite values"}
    assert not (gallery.folder / f"{bad.name}.png").exists()
    drawn = noise_maker.drawn  # type: ignore[attr-defined]
    gallery.fill(ONE)  # what is lost is known: it is not tried for ever
    assert noise_maker.drawn == drawn  # type: ignore[attr-defined]


def test_a_full_disk_leaves_no_half_picture(
    tmp_path: pathlib.Path,
    make_entrant: Make,
    noise_maker: sampling.Sampler,
    items: list[images.Item],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save, saved = PIL.Image.Image.save, []

    def fills(self: PIL.Image.Image, path: pathlib.Path, **options: object) -> None:
        if len(saved) == 9:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path)
        save(self, path, **options)  # type: ignore[arg-type]

    gallery = _gallery(tmp_path, make_entrant(noise_maker), items)
    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image.Image, "save", fills)
        with pytest.raises(OSError, match="No space"):
            gallery.fill(ONE)
    assert len(list(gallery.folder.iterdir())) == 9 + 1  # and about.json
    gallery.fill(ONE)
    assert gallery.read(items).shape == (20, 64, 64, 3)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 1, 2, 2), (2, 3, 2)])
def test_what_is_no_image_is_refused(make_entrant: Make, shape: tuple[int, ...]) -> None:
    entrant = make_entrant(lambda *arguments, **options: torch.zeros(shape))
    with pytest.raises(errors.ModelError, match=r"must return \(2, 3, H, W\)"):
        entrant.draw(["a", "b"], [0, 1])


def test_a_model_is_known_by_the_names_and_contents_of_its_files(tmp_path: pathlib.Path) -> None:
    for number, (name, content) in enumerate((("a", "1"), ("a", "2"), ("b", "1"), ("a", "1"))):
        folder = tmp_path / str(number) / "unet"
        folder.mkdir(parents=True)
        (folder / name).write_text(content)
    hashes = [images.artifact_sha256(str(tmp_path / str(number))) for number in range(4)]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]


def test_a_model_whose_parts_are_links_is_hashed_whole(tmp_path: pathlib.Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "weights").write_text("1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vae").symlink_to(tmp_path / "parts")
    before = images.artifact_sha256(str(tmp_path / "model"))
    images.artifact_sha256.cache_clear()
    (tmp_path / "parts" / "weights").write_text("2")
    assert images.artifact_sha256(str(tmp_path / "model")) != before


def test_pictures_are_fitted_by_their_centre() -> None:
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = 255
    fitted = images.fit(wide[None], 20)
    assert fitted.shape == (1, 20, 20, 3)
    assert fitted.min() == 255
    same = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), np.uint8)
    assert np.array_equal(images.fit(same, 20), same)


def test_a_file_that_is_no_picture_is_named(tmp_path: pathlib.Path) -> None:
    for content in (b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40):
        path = tmp_path / "broken.png"
        path.write_bytes(content)
        with pytest.raises(errors.DataError, match=r"broken\.png is not a readable picture"):
            images.load_image(path)
