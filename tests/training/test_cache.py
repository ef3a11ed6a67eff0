"""A cache gives back what was written, to its own teacher alone, and names what is damaged."""

import json
import pathlib

import diffusers
import pytest
import safetensors.torch
import torch

from diffusion_kd import artifact, errors
from tests import toys
from training import cache
from training.preparation.identity import Identity

SIZES = {(16, 16): 5, (8, 32): 3}


def rows(size: cache.Size, first: int, count: int) -> cache.Rows:
    """`count` items from `first` on, every number of each of which is its own."""
    numbers = torch.arange(first, first + count)
    value = numbers.half().reshape(-1, 1, 1, 1)
    tensors = {
        "latents": value.expand(-1, 4, size[0] // 2, size[1] // 2),
        "prompt_embeds": value[:, 0].expand(-1, 5, 6) / 4,
        "pooled": value[:, 0, 0].expand(-1, 7) / 2,
        "time_ids": torch.stack([torch.tensor([9, 9, int(number), 0, *size]) for number in numbers]).int(),
        "item": numbers,
        "thumbnail": (numbers * 8).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 8, 9, 3),
        "licence": (numbers % 2).int(),
        "source": torch.zeros(count, dtype=torch.int32),
    }
    return cache.Rows(tensors, [f"caption {number} é" for number in numbers], [f"id {number}" for number in numbers])


def write(folder: pathlib.Path, identity: Identity | None = None, most_bits: int = -1) -> dict[str, object]:
    """Two chunks of both buckets, 16 items, and two rejected."""
    for chunk in (0, 1):
        start, some = chunk * 9, {}
        for size, count in SIZES.items():
            some[size] = rows(size, start, count)
            start += count
        rejected = [cache.Rejected(start, f"id {start}", "flat", "it is flat")]
        notes = {
            "start": chunk * 9,
            "stop": start + 1,
            "scrubbed": {"URL": 2},
            "licences": ["", "MIT"],
            "sources": ["x"],
        }
        cache.write_chunk(folder, chunk, some, rejected, notes)
    return cache.finish(
        folder,
        2,
        identity=identity or Identity({}, {}),
        made={"teacher": "toy"},
        most_rejected=0.5,
        most_bits=most_bits,
        device=torch.device("cpu"),
    )


def test_what_was_written_is_read(tmp_path: pathlib.Path) -> None:
    manifest = write(tmp_path)
    images = cache.CachedImages(tmp_path, verify=True)
    assert len(images) == 16 and images.buckets == {(8, 32): range(6), (16, 16): range(6, 16)}
    batch = images.batch([6, 15, 11])
    assert batch.ids == ["id 0", "id 13", "id 9"] and batch.captions[1] == "caption 13 é"
    assert batch.latents.dtype == torch.float32 and batch.latents.shape == (3, 4, 8, 8)
    assert batch.latents[:, 0, 0, 0].tolist() == [0, 13, 9]
    assert batch.cond.prompt_embeds[:, 4, 5].tolist() == [0, 3.25, 2.25]
    assert batch.cond.pooled[:, 6].tolist() == [0, 6.5, 4.5]
    assert batch.cond.time_ids.tolist()[1] == [9, 9, 13, 0, 16, 16]
    assert images.batch([0]).ids == ["id 5"]
    assert manifest["buckets"] == {"16x16": 10, "8x32": 6} and manifest["items"] == 18
    assert manifest["rejected"] == {"flat": 2} and manifest["scrubbed"] == {"URL": 4}
    assert manifest["licences"] == {"unknown": 8, "MIT": 8} and manifest["sources"] == {"x": 16}
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [one["id"] for one in rejected] == ["id 8", "id 17"] and rejected[0]["detail"] == "it is flat"
    with pytest.raises(errors.DataError, match="items of one bucket, not of 8x32, 16x16"):
        images.batch([0, 6])


def test_many_files_are_read_through_few_open_ones(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setattr(cache, "_OPEN_FILES", 1)
    images = cache.CachedImages(tmp_path)
    assert images.batch([6, 15, 7, 14]).ids == ["id 0", "id 13", "id 1", "id 12"]


def test_duplicates_are_not_in_the_index(tmp_path: pathlib.Path) -> None:
    """Thumbnails of 32 neighbours are all flat, and 8 levels apart; items 16 and 32 levels on are none of them."""
    write(tmp_path, most_bits=0)
    assert len(cache.CachedImages(tmp_path)) == 16
    for chunk in (0, 1):
        some = {(16, 16): rows((16, 16), 2 * chunk, 2)}
        some[16, 16].tensors["thumbnail"] = rows((16, 16), 0, 2).tensors["thumbnail"]
        notes = {"start": 2 * chunk, "stop": 2 * chunk + 2, "scrubbed": {}, "licences": ["", "MIT"], "sources": ["x"]}
        cache.write_chunk(tmp_path, chunk, some, [], notes)
    manifest = cache.finish(
        tmp_path,
        2,
        identity=Identity({}, {}),
        made={},
        most_rejected=0.5,
        most_bits=0,
        device=torch.device("cpu"),
    )
    assert manifest["rejected"] == {"duplicate": 2} and manifest["buckets"] == {"16x16": 2}
    assert [cache.CachedImages(tmp_path).batch([index]).ids for index in (0, 1)] == [["id 0"], ["id 1"]]
    assert "id 2 looks like id 0" in (tmp_path / "rejected.jsonl").read_text()


def test_a_draw_is_of_one_bucket_and_the_same_everywhere(tmp_path: pathlib.Path) -> None:
    write(tmp_path)
    images, again = cache.CachedImages(tmp_path), cache.CachedImages(tmp_path)
    draws = [images.draw((7, 1), step, 4) for step in range(600)]
    assert draws == [again.draw((7, 1), step, 4) for step in range(600)]
    assert draws[:50] != [images.draw((7, 2), step, 4) for step in range(50)]
    for draw in draws:
        assert len(set(draw)) == 4
        assert all(index in images.buckets[8, 32] for index in draw) or min(draw) >= 6
    small = sum(draw[0] < 6 for draw in draws)
    assert small / 600 == pytest.approx(6 / 16, abs=0.06)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=16)
    assert counts.min() > 600 * 4 / 16 / 2
    assert len(images.draw((0,), 0, 40)) == 40


def identity_of(seed: int, part: str) -> Identity:
    """That of the toy teacher, of which one part has other weights."""
    parts = toys.tiny_parts()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in getattr(parts, part).parameters():
            weight += torch.randn(weight.shape, generator=generator) * 0.1
    return Identity.of(parts)


def test_another_teachers_cache_is_refused(tmp_path: pathlib.Path) -> None:
    parts = toys.tiny_parts()
    write(tmp_path, Identity.of(parts))
    cache.CachedImages(tmp_path, parts)
    cache.CachedImages(tmp_path, identity_of(1, "unet"))
    with pytest.raises(errors.DataError, match="made with the autoencoder of toy, and this teacher has another"):
        cache.CachedImages(tmp_path, identity_of(1, "vae"))
    with pytest.raises(errors.DataError, match="made with the text encoders of toy"):
        cache.CachedImages(tmp_path, identity_of(1, "text"))
    parts.vae.register_to_config(scaling_factor=0.7)
    with pytest.raises(errors.DataError, match="autoencoder"):
        cache.CachedImages(tmp_path, parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_is_known_again_in_any_precision(dtype: torch.dtype) -> None:
    whole = toys.tiny_parts()
    identity = Identity.from_json(json.loads(json.dumps(Identity.of(whole).to_json())))
    halves = artifact.Parts(whole.unet, whole.vae.to(dtype), whole.text.to(dtype), whole.scheduler)
    assert identity.difference(Identity.of(halves)) is None
    assert isinstance(whole.vae, diffusers.AutoencoderKL)


def test_damage_is_named(tmp_path: pathlib.Path) -> None:
    write(tmp_path)
    path = tmp_path / "chunks" / "000001" / "16x16.safetensors"
    content = bytearray(path.read_bytes())
    tensors = safetensors.torch.load(bytes(content))
    tensors["latents"] = tensors["latents"].clone()
    tensors["latents"][2, 1, 0, 0] = float("nan")
    path.write_bytes(safetensors.torch.save(tensors))
    images = cache.CachedImages(tmp_path)
    assert images.batch([11]).ids == ["id 9"]
    with pytest.raises(errors.DataError, match=r"000001/16x16\.safetensors, row 2: latents hold NaN"):
        images.batch([11, 13])
    with pytest.raises(errors.DataError, match=r"16x16\.safetensors was changed after it was written"):
        cache.CachedImages(tmp_path, verify=True)
    path.write_bytes(content[:-9])
    with pytest.raises(errors.DataError, match=rf"16x16\.safetensors is {len(content) - 9} bytes long and not"):
        cache.CachedImages(tmp_path)
    path.unlink()
    with pytest.raises(errors.DataError, match=r"16x16\.safetensors is missing"):
        cache.CachedImages(tmp_path)


def test_what_is_no_finished_cache_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.DataError, match="is no cache"):
        cache.CachedImages(tmp_path)
    assert not cache.is_cache(tmp_path)
    manifest = write(tmp_path)
    assert cache.is_cache(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(errors.DataError, match="schema version 99; this release reads 1"):
        cache.CachedImages(tmp_path)
    for content in ("{", "[]", "{}", json.dumps({**manifest, "files": 3})):
        path.write_text(content)
        with pytest.raises(errors.DataError, match=r"manifest\.json is damaged"):
            cache.CachedImages(tmp_path)
    path.write_text(json.dumps({**manifest, "teacher": {"weights": 3}}))
    with pytest.raises(errors.DataError, match=r"manifest\.json is damaged"):
        cache.CachedImages(tmp_path, toys.tiny_parts())
    path.unlink()
    with pytest.raises(errors.DataError, match="unfinished: prepare it with the same command"):
        cache.CachedImages(tmp_path)


def test_too_much_rejected_says_why() -> None:
    many = [
        cache.Rejected(index, str(index), "flat" if index else "too small", f"detail {index}") for index in range(6)
    ]
    cache.check_share(many, 12, 0.5)
    with pytest.raises(
        errors.DataError, match=r"6 of 11 items .* flat: 5, such as: detail 1; too small: 1, .* detail 0"
    ):
        cache.check_share(many, 11, 0.5)
    with pytest.raises(errors.DataError, match="6 of 6 items"):
        cache.check_share(many, 6, 1.0)
    with pytest.raises(errors.DataError, match=r"0 of 0 items .* The source is empty"):
        cache.check_share([], 0, 0.5)
