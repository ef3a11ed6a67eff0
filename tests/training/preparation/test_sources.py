"""Every source gives the same pictures and captions; what cannot be used is an item that says why."""

import csv
import io
import json
import pathlib
import tarfile

import datasets
import PIL.Image
import pyarrow
import pytest
from pyarrow import parquet

from diffusion_kd import errors
from training.preparation import filters, pictures, sources

ENTRIES = [
    {"file_name": "a.png", "text": "a red, very\nred wall", "licence": "CC0-1.0"},
    {"file_name": "b/c.png", "text": 'a "blue" wall', "source": "https://x.org/1"},
    {"file_name": "d.png", "text": "naïve", "licence": ""},
]
COLOURS = [(200, 0, 0), (0, 0, 200), (0, 200, 0)]


def png(colour: tuple[int, int, int] = (9, 9, 9)) -> bytes:
    written = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), colour).save(written, "PNG")
    return written.getvalue()


def write(folder: pathlib.Path, kind: str, entries: list[dict[str, str]] = ENTRIES) -> pathlib.Path:
    (folder / "b").mkdir(parents=True, exist_ok=True)
    for entry, colour in zip(ENTRIES, COLOURS, strict=True):
        (folder / entry["file_name"]).write_bytes(png(colour))
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    elif kind == "csv":
        with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, sorted({key for entry in entries for key in entry}))
            writer.writeheader()
            writer.writerows(entries)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(entries), folder / "metadata.parquet")
    return folder


def colour_of(item: sources.Item) -> object:
    return pictures.open_rgb(item.image, item.id).getpixel((0, 0))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_folder_is_read_whatever_its_metadata(tmp_path: pathlib.Path, kind: str) -> None:
    columns = [{"licence": "", "source": "", **entry} for entry in ENTRIES]
    folder = sources.Folder(write(tmp_path / "f", kind, columns))
    assert len(folder) == 3
    items = folder.items(0, 3)
    assert [item.id for item in items] == ["a.png", "b/c.png", "d.png"]
    assert [item.caption for item in items] == [entry["text"] for entry in ENTRIES]
    assert [item.licence for item in items] == ["CC0-1.0", "", ""]
    assert items[1].source == "https://x.org/1" and not any(item.problem for item in items)
    assert [colour_of(item) for item in items] == COLOURS
    assert folder.items(1, 2) == items[1:2]
    other = sources.Folder(write(tmp_path / "g", kind, [*columns[:2], {**columns[2], "text": "other"}]))
    assert other.digest != folder.digest == sources.Folder(tmp_path / "f").digest


def test_names_that_lead_out_or_come_twice_or_lead_nowhere_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    names = [
        "a.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "b/../../secret.png",
        "link.png",
        "a.png",
        "no.png",
    ]
    names += ["b", "x\0y", "n" * 5000, "d.png"]
    folder = write(tmp_path / "f", "jsonl", [{"file_name": name, "text": "x"} for name in names])
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    problems = [item.problem for item in sources.Folder(folder).items(0, len(names))]
    reasons = [problem.reason if problem else "" for problem in problems]
    out, missing = filters.OUTSIDE, filters.MISSING
    assert reasons == ["", out, out, out, out, filters.TWICE, missing, missing, out, missing, ""]
    assert problems[1] is not None and "line 2: '../secret.png'" in problems[1].detail


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"image": "a.png", "caption": "x"}', "line 1: not of the form"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n["a"]', "line 2: not a JSON object"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "\xff"}', "not UTF-8"),
        ("metadata.jsonl", b"\n", "names no images"),
        ("metadata.csv", b"image,caption\na.png,x\n", "no column file_name and text; it has image, caption"),
        ("metadata.csv", b"", "no column file_name and text; it has none"),
        ("metadata.csv", b"file_name,text\na.png,\xff\n", "not UTF-8"),
        ("metadata.csv", b'file_name,text\na.png,"x', "after line 1: unexpected end of data"),
        ("metadata.parquet", b"PAR1 no", "cannot be read as parquet"),
    ],
)
def test_metadata_of_no_use_is_an_error(tmp_path: pathlib.Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.DataError, match=message):
        sources.Folder(tmp_path)


def test_parquet_of_other_columns_and_two_metadata_files_are_errors(tmp_path: pathlib.Path) -> None:
    parquet.write_table(pyarrow.table({"file_name": ["a.png"], "caption": ["x"]}), tmp_path / "metadata.parquet")
    with pytest.raises(errors.DataError, match="no column text; it has file_name, caption"):
        sources.Folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(errors.DataError, match=r"metadata\.csv and metadata\.parquet; keep the one"):
        sources.Folder(tmp_path)


def hub_dataset(captions: list[object] | None = None) -> datasets.Dataset:
    columns = {
        "image": [{"bytes": png(colour), "path": None} for colour in COLOURS],
        "text": captions or [entry["text"] for entry in ENTRIES],
        "license": ["CC0-1.0", None, ""],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


@pytest.mark.parametrize("split", [None, "train"])
def test_a_saved_dataset_is_read(tmp_path: pathlib.Path, split: str | None) -> None:
    saved = hub_dataset() if split is None else datasets.DatasetDict({split: hub_dataset()})
    saved.save_to_disk(tmp_path / "d")
    source = sources.HubDataset(str(tmp_path / "d"))
    items = source.items(0, 3)
    assert [item.id for item in items] == ["train/0", "train/1", "train/2"]
    assert [item.caption for item in items] == [entry["text"] for entry in ENTRIES]
    assert [item.licence for item in items] == ["CC0-1.0", "", ""]
    assert [colour_of(item) for item in items] == COLOURS
    assert source.digest == sources.HubDataset(str(tmp_path / "d")).digest
    with pytest.raises(errors.DataError, match="no column 'picture'; it has image, text, license: give --image-column"):
        sources.HubDataset(str(tmp_path / "d"), image_column="picture")
    with pytest.raises(errors.DataError, match=r"no column 'note'.*--caption-column"):
        sources.HubDataset(str(tmp_path / "d"), caption_column="note")
    with pytest.raises(errors.DataError, match=r"'text' of .* not images"):
        sources.HubDataset(str(tmp_path / "d"), image_column="text")
    if split:
        with pytest.raises(errors.DataError, match="no split 'test'; it has train"):
            sources.HubDataset(str(tmp_path / "d"), "test")


def test_missing_pictures_and_captions_of_a_dataset_are_items_without(tmp_path: pathlib.Path) -> None:
    dataset = hub_dataset([["first", "second"], None, []])
    dataset = dataset.map(lambda row, index: {"image": row["image"] if index else None}, with_indices=True)
    dataset.save_to_disk(tmp_path / "d")
    items = sources.HubDataset(str(tmp_path / "d")).items(0, 3)
    assert [item.caption for item in items] == ["first", None, None]
    assert items[0].problem is not None and items[0].problem.reason == filters.MISSING
    assert items[1].problem is None


def test_a_folder_of_datasets_own_builder_is_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "f", "jsonl", [{"file_name": entry["file_name"], "text": entry["text"]} for entry in ENTRIES])
    items = sources.HubDataset(str(tmp_path / "f")).items(0, 3)
    found = {item.caption: colour_of(item) for item in items}
    assert found == {entry["text"]: colour for entry, colour in zip(ENTRIES, COLOURS, strict=True)}
    with pytest.raises(errors.DataError, match=r"dataset .*nowhere cannot be had"):
        sources.HubDataset(str(tmp_path / "nowhere"))


def tar(path: pathlib.Path, members: list[tuple[str, bytes]]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


MEMBERS = [
    ("x/000.png", png(COLOURS[0])),
    ("x/000.txt", b"a red wall"),
    ("x/001.webp", png(COLOURS[1])),
    ("x/001.json", json.dumps({"caption": "a blue wall", "license": "MIT", "url": "https://x.org/1"}).encode()),
    ("x/001.cls", b"7"),
    ("x/002.txt", b"no picture"),
    ("x/003.jpg", png(COLOURS[2])),
    ("x/003.txt", b"\xff\xfe"),
    ("x/004.jpg", png()),
    ("x/004.json", b"[1"),
]


def test_shards_are_read_by_position(tmp_path: pathlib.Path) -> None:
    first = tar(tmp_path / "0.tar", MEMBERS)
    second = tar(tmp_path / "1.tar", MEMBERS[:2])
    source = sources.Shards([first, second])
    items = source.items(0, len(source))
    assert [item.id for item in items] == [*(f"0.tar:x/00{key}" for key in range(5)), "1.tar:x/000"]
    assert [item.caption for item in items] == ["a red wall", "a blue wall", None, None, None, "a red wall"]
    assert (items[1].licence, items[1].source) == ("MIT", "https://x.org/1")
    assert [colour_of(items[index]) for index in (0, 1, 3, 5)] == [*COLOURS, COLOURS[0]]
    assert items[2].problem is not None and items[2].problem.reason == filters.MISSING
    assert source.items(4, 6) == items[4:]
    assert sources.Shards([first], "url").items(0, 2)[1].caption == "https://x.org/1"


def test_a_shard_cut_anywhere_gives_what_it_holds_and_says_where_it_ends(tmp_path: pathlib.Path) -> None:
    whole = tar(
        tmp_path / "0.tar", [(f"{key}.{kind}", png() + b" " * 700) for key in range(3) for kind in ("png", "txt")]
    )
    content = whole.read_bytes()
    items = sources.Shards([whole]).items(0, 9)
    assert len(items) == 3 and not any(item.problem for item in items)
    size = len(content.rstrip(b"\0"))
    for cut in (520, 600, 1600, 2048, 3000, 4600, 5120, 6000, size - 5):
        path = tmp_path / "cut.tar"
        path.write_bytes(content[:cut])
        found = sources.Shards([path]).items(0, 9)
        problems = [item.problem for item in found if item.problem is not None]
        assert [problem.reason for problem in problems] == [filters.CUT_SHORT], cut
        assert "shard cut.tar is cut short" in problems[0].detail
        for item in found:
            if item.problem is None:
                assert colour_of(item) == (9, 9, 9)


def test_shards_of_no_use_are_errors(tmp_path: pathlib.Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(errors.DataError, match=r"no\.tar cannot be read as a tar file"):
        sources.Shards([tmp_path / "no.tar"])
    with pytest.raises(errors.DataError, match="hold no pictures"):
        sources.Shards([tar(tmp_path / "empty.tar", [])])


def test_patterns_of_shards(tmp_path: pathlib.Path) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-08.tar"):
        tar(tmp_path / name, MEMBERS)

    def names(pattern: str) -> list[str]:
        return [path.name for path in sources.expand(str(tmp_path / pattern))]

    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("{a,b}-{08..08}.tar") == ["a-08.tar", "b-08.tar"]
    assert names("a-*.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    with pytest.raises(errors.DataError, match=r"no shard .*a-11\.tar \(of 4 that"):
        names("a-{08..11}.tar")
    with pytest.raises(errors.DataError, match="no shard"):
        names("c-*.tar")
