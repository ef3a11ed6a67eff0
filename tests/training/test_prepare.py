"""`python -m training.prepare`, whole: bad items are counted and named, a killed run's cache is an unbroken one's."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from diffusion_kd import artifact, errors, files
from tests import toys
from tests.training import processes
from training import cache, prepare
from training.preparation import buckets, chunks, encoding, filters, sources

SIZES = [(16, 16), (40, 30), (20, 60), (64, 16), (33, 50)]


def write_folder(folder: pathlib.Path, count: int, **extra: str) -> pathlib.Path:
    """Pictures of soft noise of five shapes, each with a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        coarse = np.random.default_rng(index).integers(0, 256, (6, 6, 3), np.uint8)
        image = PIL.Image.fromarray(coarse).resize(SIZES[index % 5], PIL.Image.Resampling.BICUBIC)
        image.save(folder / f"{index:03d}.png")
        lines.append(json.dumps({"file_name": f"{index:03d}.png", "text": f"a picture of {index}", **extra}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def add(folder: pathlib.Path, name: str, text: object, content: bytes | PIL.Image.Image | None) -> None:
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    elif content is not None:
        content.save(folder / name)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": name, "text": text}))


def run(models: pathlib.Path, out: pathlib.Path, *options: object) -> dict[str, Any]:
    prepare.main(["--teacher", str(models / "teacher"), "--out", str(out), *map(str, options)])
    return cache.read_manifest(out)


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_folder_becomes_a_cache_that_holds_what_the_networks_say(
    models: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = write_folder(tmp_path / "f", 12, licence="CC0-1.0", source="https://x.org/a?user=1")
    manifest = run(models, tmp_path / "c", "--data", folder, "--chunk-items", 5, "--batch-size", 3)
    assert manifest["count"] == 12 and manifest["rejected"] == {}
    assert manifest["licences"] == {"CC0-1.0": 12} and manifest["sources"] == {"x.org": 12}
    assert manifest["made"]["settings"]["precision"] == "fp32"
    parts = artifact.load(str(models / "teacher"))
    images = cache.CachedImages(tmp_path / "c", parts, verify=True)
    batch = images.batch(range(12))
    assert batch.ids == [f"{index:03d}.png" for index in range(12)]
    assert batch.captions[7] == "a picture of 7"
    cond = parts.text.encode(batch.captions, (16, 16))
    torch.testing.assert_close(batch.cond.prompt_embeds, cond.prompt_embeds, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch.cond.pooled, cond.pooled, rtol=1e-3, atol=1e-3)
    first = PIL.Image.open(folder / "000.png")
    pixels = torch.from_numpy(np.array(first)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        mean = parts.vae.encode(pixels).latent_dist.mean * 0.5
    torch.testing.assert_close(batch.latents[:1], mean, rtol=1e-3, atol=1e-3)
    assert batch.cond.time_ids[1].tolist() == [30, 40, 0, 3, 16, 16]
    assert batch.cond.time_ids[2].tolist() == [60, 20, 16, 0, 16, 16]


def test_buckets_keep_the_shape(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "f", 10)
    manifest = run(models, tmp_path / "c", "--data", folder, "--buckets", "aspect", "--chunk-items", 4)
    table = buckets.build("aspect", 16, 4)
    expected = sorted(cache.size_name(table.nearest(height, width)) for width, height in SIZES for _ in "12")
    assert sorted(name for name, count in manifest["buckets"].items() for _ in range(count)) == expected
    images = cache.CachedImages(tmp_path / "c")
    for size, numbers in images.buckets.items():
        batch = images.batch(list(numbers))
        assert batch.latents.shape[-2:] == (size[0] // 2, size[1] // 2)
        assert {tuple(row) for row in batch.cond.time_ids[:, 4:].tolist()} == {size}


def test_what_cannot_be_used_is_counted_and_named(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "f", 14)
    whole = (folder / "001.png").read_bytes()
    soft = PIL.Image.open(folder / "003.png")
    bad: list[tuple[str, object, bytes | PIL.Image.Image | None, str]] = [
        ("cut.png", "x", whole[: len(whole) // 2], filters.UNREADABLE),
        ("text.png", "x", b"text", filters.UNREADABLE),
        ("deep.png", "x", PIL.Image.fromarray(np.full((20, 20), 30_000, np.uint16)), filters.TOO_DEEP),
        ("small.png", "x", soft.resize((30, 7)), filters.TOO_SMALL),
        ("long.png", "x", soft.resize((90, 20)), filters.EXTREME),
        ("black.png", "x", PIL.Image.new("RGB", (20, 20)), filters.FLAT),
        ("silent.png", " \n", soft, filters.NO_CAPTION),
        ("none.png", None, soft, filters.NO_CAPTION),
        ("mail.png", "a@b.org", soft, filters.NO_CAPTION),
        ("gone.png", "x", None, filters.MISSING),
        ("../f/000.png", "x", None, filters.OUTSIDE),
        ("000.png", "x", None, filters.TWICE),
        ("copy.png", "y", PIL.Image.open(folder / "002.png").convert("RGBA"), filters.DUPLICATE),
    ]
    for name, text, content, _ in bad:
        add(folder, name, text, content)
    turned = PIL.Image.open(folder / "004.png").rotate(90)
    add(folder, "last.png", "see www.x.org, +1 555 123 4567", turned)
    manifest = run(models, tmp_path / "c", "--data", folder, "--chunk-items", 6)
    found = [json.loads(line) for line in (tmp_path / "c" / "rejected.jsonl").read_text().splitlines()]
    assert [(one["id"], one["reason"]) for one in found] == [(name, reason) for name, _, _, reason in bad]
    assert all(one["id"].split("/")[-1] in one["detail"] for one in found)
    assert manifest["count"] == 15 and sum(manifest["rejected"].values()) == len(bad)
    assert manifest["rejected"][filters.NO_CAPTION] == 3
    assert manifest["scrubbed"] == {"URL": 1, "e-mail address": 1, "phone number": 1}
    assert cache.CachedImages(tmp_path / "c").batch([14]).captions == ["see,"]


def test_filters_can_be_turned_off(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "f", 2)
    add(folder, "black.png", "write to a@b.org", PIL.Image.new("RGB", (90, 2)))
    add(folder, "again.png", "x", PIL.Image.open(folder / "000.png"))
    off = ("--least-contrast", 0, "--min-size-px", 0, "--most-aspect", 99, "--duplicate-bits", -1, "--no-scrub")
    manifest = run(models, tmp_path / "c", "--data", folder, *off)
    assert manifest["count"] == 4 and manifest["scrubbed"] == {}
    assert cache.CachedImages(tmp_path / "c").batch([2]).captions == ["write to a@b.org"]


def test_the_clip_floor_keeps_what_shows_its_caption(tmp_path: pathlib.Path) -> None:
    """On shapes, with the embedded encoder: true captions pass, those of other pictures do not."""
    from diffusion_kd.shapes import scenes

    folder = tmp_path / "f"
    folder.mkdir()
    chosen = list(scenes.training_scenes(8, 5))
    lines = []
    for index, scene in enumerate(chosen):
        PIL.Image.fromarray(scenes.render(scene)).save(folder / f"{index}.png")
        rng = np.random.default_rng(index)
        truth = scenes.describe(scene, rng, scenes.Mentions.draw(rng)).text
        lines.append(
            json.dumps({"file_name": f"{index}.png", "text": "a photograph of a train" if index % 2 else truth})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    options = ["--data", str(folder), "--clip", "shapes-encoder", "--clip-floor", "0.6", "--duplicate-bits", "-1"]
    prepare.main(["--teacher", "shapes-teacher", "--out", str(tmp_path / "c"), *options])
    found = [json.loads(line) for line in (tmp_path / "c" / "rejected.jsonl").read_text().splitlines()]
    assert {one["reason"] for one in found} == {filters.LOW_SCORE}
    assert [one["item"] for one in found] == [1, 3, 5, 7]
    assert "shapes-encoder gives" in found[0]["detail"] and "less than 0.6" in found[0]["detail"]


def test_latents_beyond_half_precision_are_rejected(tmp_path: pathlib.Path) -> None:
    parts = toys.tiny_parts()
    parts.vae.register_to_config(scaling_factor=1e6)
    folder = write_folder(tmp_path / "f", 3)
    encoder = encoding.Encoder(parts, device=torch.device("cpu"), precision="fp32")
    work = chunks.Preparation(
        chunks.Settings(size_px=16),
        sources.Folder(folder),
        encoder,
        buckets.build("square", 16, 4),
        tmp_path / "c",
        most_rejected=1.0,
    )
    work.run()
    record = cache.read_record(tmp_path / "c", 0)
    assert record is not None and record["buckets"] == {}
    assert {one["reason"] for one in record["rejected"]} == {filters.NOT_FINITE} and len(record["rejected"]) == 3


def test_too_much_rejected_ends_it_early_and_may_be_allowed(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "f", 4)
    for index in range(16):
        add(folder, f"black{index:02d}.png", "x", PIL.Image.new("RGB", (20, 20)))
    arguments = ("--data", folder, "--chunk-items", 4)
    with pytest.raises(errors.DataError, match=r"12 of 20 items were rejected.*flat: 12, such as: black00\.png"):
        run(models, tmp_path / "c", *arguments)
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert len(list((tmp_path / "c" / "chunks").iterdir())) == 4
    assert run(models, tmp_path / "c", *arguments, "--most-rejected", 0.9)["count"] == 4


def test_a_source_or_settings_that_changed_need_another_folder(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "f", 3)
    run(models, tmp_path / "c", "--data", folder)
    with pytest.raises(errors.ConfigError, match=r"settings\.min_size_px = 8, not 2; give another --out"):
        run(models, tmp_path / "c", "--data", folder, "--min-size-px", 2)
    add(folder, "more.png", "x", PIL.Image.open(folder / "000.png"))
    with pytest.raises(errors.ConfigError, match="source_digest"):
        run(models, tmp_path / "c", "--data", folder)


class Killed(BaseException): ...


def kill_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    count = iter(range(calls))

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(count, None) is None:
            raise Killed
        return function(*arguments, **options)

    return killed


@pytest.mark.parametrize("place", ["write_bytes", "write_text", "rename", "replace"])
def test_broken_off_at_any_write_it_goes_on_to_the_same_cache(
    models: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = write_folder(tmp_path / "f", 9)
    options = ("--data", folder, "--chunk-items", 4, "--buckets", "aspect", "--batch-size", 2)
    run(models, tmp_path / "whole", *options)
    for calls in range(40):
        with monkeypatch.context() as patched:
            patched.setattr(pathlib.Path, place, kill_after(calls, getattr(pathlib.Path, place)))
            try:
                run(models, tmp_path / "broken", *options)
            except Killed:
                continue
        break
    assert calls > 1
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "whole")


def test_killed_by_the_system_it_goes_on_to_the_same_cache(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """SIGKILL, as soon as the second chunk stands: nothing is tidied up, and what is half written does not stay."""
    folder = write_folder(tmp_path / "f", 40)
    options = ["--data", str(folder), "--chunk-items", "1", "--batch-size", "1"]
    run(models, tmp_path / "whole", *options)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "training.prepare", "--teacher", str(models / "teacher"), "--out", str(out)]
    process = subprocess.Popen(
        [*command, *options], stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline_s = time.monotonic() + 60
    while not (out / "chunks" / "000001").exists() and time.monotonic() < deadline_s:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stood = len([path for path in (out / "chunks").iterdir() if not path.name.startswith(".")])
    assert 2 <= stood <= 40 and not (out / "manifest.json").exists()
    (out / "chunks" / ".000002.half").mkdir()
    (out / "chunks" / ".000002.half" / "16x16.safetensors").write_bytes(b"half")
    run(models, out, *options)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_chunk_that_was_cut_short_is_made_anew(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "f", 5)
    run(models, tmp_path / "c", "--data", folder, "--chunk-items", 2)
    before = files_of(tmp_path / "c")
    path = tmp_path / "c" / "chunks" / "000001" / "16x16.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    run(models, tmp_path / "c", "--data", folder, "--chunk-items", 2)
    assert files_of(tmp_path / "c") == before


def test_processes_that_share_the_chunks_make_the_same_cache(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "f", 11)
    add(folder, "black.png", "x", PIL.Image.new("RGB", (20, 20)))
    run(models, tmp_path / "one", "--data", folder, "--chunk-items", 2)
    barrier = threading.Barrier(2)

    class State:
        num_processes, device = 2, torch.device("cpu")

        def __init__(self, rank: int) -> None:
            self.process_index = rank

        def wait_for_everyone(self) -> None:
            barrier.wait(60)

    teacher = str(models / "teacher")
    settings = chunks.Settings(size_px=16, min_size_px=8, chunk_items=2)

    def work(rank: int, parts: artifact.Parts) -> None:
        fellows = prepare.Fellows(State(rank))  # type: ignore[arg-type]
        prepare.prepare(settings, teacher, parts, sources.Folder(folder), tmp_path / "two", fellows=fellows)

    threads = [threading.Thread(target=work, args=(rank, artifact.load(teacher))) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_the_teacher_makes_the_set(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\na blue star, me@x.org\nme@x.org\n")
    options = ("--prompts", prompts, "--images-per-prompt", 2, "--steps", 2, "--licence", "MIT")
    manifest = run(models, tmp_path / "c", *options, "--duplicate-bits", -1, "--least-contrast", 0)
    assert manifest["count"] == 4 and manifest["rejected"] == {filters.NO_CAPTION: 2}
    assert manifest["scrubbed"] == {"e-mail address": 4} and manifest["licences"] == {"MIT": 4}
    images = cache.CachedImages(tmp_path / "c")
    assert images.batch(range(4)).captions == ["a red circle"] * 2 + ["a blue star,"] * 2
    assert len(list((tmp_path / "c" / "images").glob("*.png"))) == 4
    again = files_of(tmp_path / "c")
    run(models, tmp_path / "c", *options, "--duplicate-bits", -1, "--least-contrast", 0)
    assert files_of(tmp_path / "c") == again
    assert b"me@x" not in b"".join(again.values())


def test_shards_and_datasets_are_prepared_too(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import datasets

    folder = write_folder(tmp_path / "f", 4)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{"image": str(folder / line["file_name"]), "caption": line["text"]} for line in lines]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "d")
    subprocess.run(["tar", "cf", str(tmp_path / "0.tar"), "-C", str(folder), "000.png", "001.png"], check=True)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    assert run(models, tmp_path / "c1", "--dataset", tmp_path / "d")["count"] == 4
    with pytest.raises(
        errors.DataError, match=r"3 of 3 items .* no caption: 2.*; shard cut short: 1, .*cut\.tar .*000\.png"
    ):
        run(models, tmp_path / "c2", "--shards", f"{tmp_path}/{{0,cut}}.tar")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clip-floor", "0.2"], "clip_floor is 0.2; it must be given with --clip"),
        (["--most-rejected", "2"], "most_rejected is 2.0; it must be from 0 to 1"),
        (["--images-from", "https://h"], "images_from is 'https://h'; it must be given with --prompts"),
        (["--size-px", "18"], "size_px is 18; it must be a multiple of 4"),
        (["--chunk-items", "0"], "chunk_items is 0; it must be above 0"),
        (["--workers", "0"], "workers is 0"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    models: pathlib.Path, tmp_path: pathlib.Path, options: list[str], message: str
) -> None:
    folder = write_folder(tmp_path / "f", 1)
    with pytest.raises(errors.ConfigError, match=message):
        run(models, tmp_path / "c", "--data", folder, *options)
    assert not (tmp_path / "c" / "chunks").exists()


def test_an_api_key_is_read_from_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    assert prepare._key(tmp_path / "key") == "secret" and prepare._key(None) == ""
    (tmp_path / "empty").write_text("\n")
    for name in ("empty", "gone"):
        with pytest.raises(errors.ConfigError, match=name):
            prepare._key(tmp_path / name)


def test_a_second_command_in_the_same_folder_is_told_of_the_first(
    models: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock binds other processes; that they are told is tested with the checkpoints' own."""
    folder = write_folder(tmp_path / "f", 2)

    def taken(path: pathlib.Path) -> int:
        raise errors.ConfigError(f"process 7 on host writes to {path.parent}")

    monkeypatch.setattr(files, "lock", taken)
    with pytest.raises(errors.ConfigError, match=rf"process 7 on host writes to {tmp_path}/c"):
        run(models, tmp_path / "c", "--data", folder)
    assert list((tmp_path / "c").iterdir()) == []


def test_torchrun_shares_the_work(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "f", 9)
    given = ["--teacher", str(models / "teacher"), "--data", str(folder), "--chunk-items", "2"]
    processes.succeed("-m", "training.prepare", *given, "--out", str(tmp_path / "two"), processes=2)
    prepare.main([*given, "--out", str(tmp_path / "one")])
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_a_teacher_that_is_not_there_leaves_no_folder(tmp_path: pathlib.Path) -> None:
    folder = write_folder(tmp_path / "f", 2)
    with pytest.raises(errors.ModelError, match="no model"):
        prepare.main(["--teacher", str(tmp_path / "nobody"), "--out", str(tmp_path / "c"), "--data", str(folder)])
    assert not (tmp_path / "c").exists()
