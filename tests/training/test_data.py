"""Captioned images: the same asked twice is the same, and a bad folder is named before anything is trained."""

import io
import json
import pathlib

import accelerate
import numpy as np
import PIL.Image
import pytest

from diffusion_kd import errors
from diffusion_kd.shapes import scenes
from tests import toys
from training import data


def folder_with(path: pathlib.Path, entries: list[dict[str, object]], size: tuple[int, int] = (40, 30)) -> pathlib.Path:
    path.mkdir(exist_ok=True)
    for entry in entries:
        if isinstance(entry.get("file_name"), str):
            PIL.Image.new("RGB", size, (200, 10, 10)).save(path / str(entry["file_name"]))
    (path / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_shapes_are_the_same_at_every_asking() -> None:
    images = data.ShapesImages(40, seed=3)
    again = data.ShapesImages(80, seed=3)
    assert np.array_equal(images.images_uint8([5, 30]), again.images_uint8([5, 30]))
    assert images.captions(range(40), 7) == images.captions(range(40), 7)
    assert images.captions(range(40), 7) != images.captions(range(40), 8)


def test_training_scenes_hold_nothing_held_out() -> None:
    assert not any(scene.held_out for scene in scenes.training_scenes(2000, 0))


def test_neighbours_in_a_group_differ_by_one_fact() -> None:
    for group in range(50):
        first, *siblings = list(scenes.training_scenes(200, 1))[group * 4 : group * 4 + 4]
        for sibling in siblings:
            looks = [[(o.shape, o.colour, o.size) for o in scene.objects] for scene in (first, sibling)]
            facts = sum(a != b for one, other in zip(*looks, strict=True) for a, b in zip(one, other, strict=True))
            changed = (
                (looks[0] != looks[1]) + (first.layout != sibling.layout) + (first.background != sibling.background)
            )
            assert changed == 1
            assert facts <= 1 or looks[0] == looks[1][::-1]


def test_a_folder_is_cut_to_size(tmp_path: pathlib.Path) -> None:
    images = data.FolderImages(folder_with(tmp_path / "f", [{"file_name": "a.png", "text": " red "}]), 16)
    assert images.images_uint8([0]).shape == (1, 16, 16, 3)
    assert np.all(images.images_uint8([0])[0, :, :, 0] == 200)
    assert images.captions([0], 0) == ["red"]


def test_pictures_may_lie_elsewhere(tmp_path: pathlib.Path) -> None:
    folder_with(tmp_path / "pictures", [{"file_name": "a.png", "text": "red"}])
    (tmp_path / "captions").mkdir()
    line = {"file_name": str(tmp_path / "pictures" / "a.png"), "text": "red"}
    (tmp_path / "captions" / "metadata.jsonl").write_text(json.dumps(line))
    assert len(data.FolderImages(tmp_path / "captions", 16)) == 1


def test_to_tensor_has_the_promised_range() -> None:
    tensor = data.to_tensor(np.array([[[[0, 255, 128]]]], np.uint8))
    assert tensor.shape == (1, 3, 1, 1)
    assert tensor.flatten().tolist() == pytest.approx([-1, 1, 0.00392], abs=1e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png"}', "line 1"),
        ('{"file_name": "a.png", "text": "  "}', "caption of a.png is empty"),
        ('{"file_name": "b.png", "text": "x"}', "there is no file"),
        (json.dumps({"file_name": "b" * 5000, "text": "x"}), "there is no file"),
        ("not json", "line 1"),
        ('["a.png"]', "line 1"),
        ('{"file_name": 3, "text": "x"}', "line 1"),
        ("", "names no images"),
    ],
)
def test_bad_metadata_is_named(tmp_path: pathlib.Path, line: str, message: str) -> None:
    folder = folder_with(tmp_path / "f", [{"file_name": "a.png", "text": "x"}])
    (folder / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(errors.DataError, match=message):
        data.FolderImages(folder, 16)


def damaged_png() -> bytes:
    """A PNG whose second piece of pixels bears a name that no piece has: Pillow raises SyntaxError."""
    written = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    PIL.Image.fromarray(noise).save(written, "PNG")
    first, second, rest = written.getvalue().partition(b"IDAT")
    before, _, after = rest.partition(b"IDAT")
    assert after, "the picture is too small for two pieces"
    return first + second + before + b"\0\0\0\0" + after


def test_missing_folders_metadata_and_unreadable_images_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.DataError, match="no folder"):
        data.FolderImages(tmp_path / "nowhere", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.DataError, match=r"no metadata\.jsonl"):
        data.FolderImages(tmp_path / "empty", 16)
    folder = folder_with(tmp_path / "f", [{"file_name": "a.png", "text": "x"}])
    (folder / "a.png").write_bytes(b"not a picture")
    with pytest.raises(errors.DataError, match=r"a\.png cannot be read"):
        data.FolderImages(folder, 16)
    (folder / "a.png").write_bytes(damaged_png())
    with pytest.raises(errors.DataError, match=r"a\.png cannot be read"):
        data.FolderImages(folder, 16)
    PIL.Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(folder / "a.png")
    with pytest.raises(errors.DataError, match="more than 8 bits"):
        data.FolderImages(folder, 16)
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(errors.DataError, match=r"a\.png cannot be read"):
        data.FolderImages(folder, 16)


def draw(prompts: pathlib.Path, out: pathlib.Path, guidance_scale: float = 3.0) -> data.FolderImages:
    return data.teacher_images(
        "toy",
        prompts,
        out,
        parts=toys.tiny_parts(),
        accelerator=accelerate.Accelerator(cpu=True),
        guidance_scale=guidance_scale,
        seed=0,
    )


def test_prompt_files_without_prompts_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.DataError, match="no file"):
        draw(tmp_path / "nowhere.txt", tmp_path / "out")
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(errors.DataError, match="holds no prompts"):
        draw(tmp_path / "empty.txt", tmp_path / "out")
    (tmp_path / "latin.txt").write_bytes("ein Würfel".encode("latin-1"))
    with pytest.raises(errors.DataError, match="not UTF-8"):
        draw(tmp_path / "latin.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_edited_prompt_file_keeps_each_picture_with_its_prompt(tmp_path: pathlib.Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\ufeffa red circle\na blue star\n")
    first = draw(prompts, out)
    assert first.captions([0, 1], 0) == ["a red circle", "a blue star"]
    prompts.write_text("a green ring\na blue star\na red circle\na red circle\n")
    second = draw(prompts, out)
    assert np.array_equal(second.images_uint8([2, 1]), first.images_uint8([0, 1]))
    assert not np.array_equal(second.images_uint8([2]), second.images_uint8([3]))
    assert len(list(out.glob("*.png"))) == 4 and not list(out.glob("*.unfinished"))
    assert not np.array_equal(draw(prompts, out, 8.0).images_uint8([0]), second.images_uint8([0]))


def test_a_killed_drawing_leaves_no_half_picture(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(image: object, path: pathlib.Path, kind: str) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    (tmp_path / "prompts.txt").write_text("a red circle\n")
    monkeypatch.setattr(PIL.Image.Image, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "prompts.txt", tmp_path / "out")
    monkeypatch.undo()
    assert not list((tmp_path / "out").glob("*.png"))
    assert len(draw(tmp_path / "prompts.txt", tmp_path / "out")) == 1


def test_only_the_main_process_draws(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    monkeypatch.setattr(accelerate.Accelerator, "is_main_process", False)
    with pytest.raises(errors.DataError, match="no folder"):
        draw(tmp_path / "prompts.txt", tmp_path / "out")


def test_metadata_of_other_editors_is_read(tmp_path: pathlib.Path) -> None:
    folder = folder_with(tmp_path / "f", [{"file_name": "a.png", "text": "x"}])
    line = json.dumps({"file_name": "a.png", "text": "one\u2028line"}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert data.FolderImages(folder, 16).captions([0], 0) == ["one\u2028line"]
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xff"}')
    with pytest.raises(errors.DataError, match="not UTF-8"):
        data.FolderImages(folder, 16)


def test_pictures_stand_upright(tmp_path: pathlib.Path) -> None:
    folder = folder_with(tmp_path / "f", [{"file_name": "a.png", "text": "x"}])
    picture = PIL.Image.new("RGB", (16, 16))
    picture.paste((255, 255, 255), (0, 0, 16, 8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(folder / "a.png", exif=exif)
    pixels = data.FolderImages(folder, 16).images_uint8([0])[0]
    assert pixels[0].max() == 0 and pixels[-1].min() == 255
