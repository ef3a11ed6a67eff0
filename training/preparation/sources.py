"""Where captioned pictures come from: a folder with metadata, a Hugging Face dataset, WebDataset shards.

| source         | what is given                                    | an item's id                     |
|----------------|--------------------------------------------------|----------------------------------|
| `Folder`       | pictures beside metadata.jsonl, .csv or .parquet | its file_name                    |
| `HubDataset`   | a saved dataset, a local builder or a hub id     | split/index                      |
| `Shards`       | tar files of key.jpg and key.txt or key.json     | shard:key                        |

All are read by position, in runs of neighbours, so that several processes can share one and each can go on anywhere.
What cannot be used is an item with its reason; what makes the whole source useless raises DataError.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import pathlib
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from diffusion_kd import errors
from training.preparation import filters, pictures

_log = logging.getLogger(__name__)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_CAPTIONS = ("text", "caption", "prompt")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_LICENCES = ("licence", "license")
_SOURCES = ("source", "url")


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """A picture yet to be opened. caption: as it was found, None if there is none. problem: why it is not to be used.

    licence, source: what the data says of itself, "" if nothing.
    """

    id: str
    caption: str | None
    image: bytes | pictures.FileRange
    licence: str = ""
    source: str = ""
    problem: filters.Rejection | None = None


class Source(Protocol):
    """A list of items that is read in runs. name: for people. digest: changes when what is listed changes."""

    name: str
    digest: str

    def __len__(self) -> int: ...

    def items(self, start: int, stop: int) -> list[Item]:
        """Those of positions start to stop - 1."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A line of metadata. where: file and line, for errors. What it lacks is None."""

    where: str
    file_name: object
    text: object
    licence: str = ""
    source: str = ""


def read_metadata(folder: pathlib.Path) -> list[Row]:
    """The rows of a folder's metadata.jsonl, .csv or .parquet.

    Raises DataError if there is none or more than one, if it has no column file_name or text, is not UTF-8 or damaged.
    """
    if not folder.is_dir():
        raise errors.DataError(f"no folder {folder}; give one with images and a metadata.jsonl")
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if not found:
        raise errors.DataError(
            f'{folder} has no metadata.jsonl (or .csv, .parquet); write a line {{"file_name": …, "text": …}} '
            "for each image"
        )
    if len(found) > 1:
        raise errors.DataError(f"{folder} has {' and '.join(path.name for path in found)}; keep the one that counts")
    rows = list(_READERS[found[0].suffix](found[0]))
    if not rows:
        raise errors.DataError(f"{found[0]} names no images")
    return rows


def lines(path: pathlib.Path) -> list[str]:
    """Of a UTF-8 file, with or without a byte order mark; only a newline ends a line. Raises DataError."""
    return _text(path).split("\n")


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _row(where: str, entry: Mapping[str, Any]) -> Row:
    licence, source = first_text(entry, _LICENCES), first_text(entry, _SOURCES)
    return Row(where, entry.get("file_name"), entry.get("text"), licence, source)


def first_text(entry: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of these columns that holds any text; "" if none does."""
    return next((str(entry[name]).strip() for name in names if entry.get(name)), "")


def json_lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each object of a .jsonl file stands, and the object. Raises DataError for a line that is none."""
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise TypeError
        except (json.JSONDecodeError, TypeError):
            raise errors.DataError(f"{path}, line {number}: not a JSON object: {line[:80]}") from None
        yield f"{path}, line {number}", entry


def _jsonl_rows(path: pathlib.Path) -> Iterator[Row]:
    for where, entry in json_lines(path):
        if not isinstance(entry.get("file_name"), str):
            raise errors.DataError(f'{where}: not of the form {{"file_name": …, "text": …}}: {str(entry)[:80]}')
        yield _row(where, entry)


def csv_lines(path: pathlib.Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `json_lines`, of a .csv file with a header. Raises DataError unless it has these columns."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        _require_columns(path, reader.fieldnames or (), columns)
        for entry in reader:
            yield f"{path}, line {reader.line_num}", entry
    except csv.Error as error:
        raise errors.DataError(
            f"{path}, after line {reader.line_num}: {error}; quote what holds commas or quotes"
        ) from None


def _csv_rows(path: pathlib.Path) -> Iterator[Row]:
    for where, entry in csv_lines(path, ("file_name", "text")):
        yield _row(where, entry)


def _parquet_rows(path: pathlib.Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]

    try:
        with parquet.ParquetFile(path) as file:
            wanted = ("file_name", "text", *_LICENCES, *_SOURCES)
            _require_columns(path, file.schema_arrow.names, ("file_name", "text"))
            columns = [name for name in file.schema_arrow.names if name in wanted]
            numbers = itertools.count()
            for batch in file.iter_batches(columns=columns):
                for entry in batch.to_pylist():
                    yield _row(f"{path}, row {next(numbers)}", entry)
    except (pyarrow.ArrowException, OSError) as error:
        raise errors.DataError(f"{path} cannot be read as parquet: {errors.first_line(error)}") from None


def _require_columns(path: pathlib.Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in found]:
        raise errors.DataError(
            f"{path} has no column {' and '.join(missing)}; it has {', '.join(map(str, found)) or 'none'}"
        )


_READERS = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


class Folder:
    """Pictures and a metadata file. A name that leads out of the folder, or that came before, is an item's problem."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder.resolve()
        self._rows = read_metadata(folder)
        self.name = f"folder {self._folder.name}"
        self.digest = _digest(f"{row.file_name}\t{row.text}\t{row.licence}\t{row.source}" for row in self._rows)
        first: dict[object, int] = {}
        self._again = {index for index, row in enumerate(self._rows) if first.setdefault(row.file_name, index) != index}

    def __len__(self) -> int:
        return len(self._rows)

    def items(self, start: int, stop: int) -> list[Item]:
        return [self._item(index, row) for index, row in enumerate(self._rows[start:stop], start)]

    def _item(self, index: int, row: Row) -> Item:
        name = str(row.file_name or "")
        text = row.text if isinstance(row.text, str) else None
        return Item(
            name,
            text,
            pictures.FileRange(self._folder / name),
            row.licence,
            row.source,
            self._problem(index, name, row.where),
        )

    def _problem(self, index: int, name: str, where: str) -> filters.Rejection | None:
        path = pathlib.PurePath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            return filters.Rejection(filters.OUTSIDE, f"{where}: {name[:200]!r} leads out of the folder")
        if index in self._again:
            return filters.Rejection(filters.TWICE, f"{where}: {name} was named before")
        try:
            file = (self._folder / name).resolve(strict=True)
        except OSError:
            return filters.Rejection(filters.MISSING, f"{where}: there is no file {name[:200]!r}")
        if not file.is_relative_to(self._folder):
            return filters.Rejection(filters.OUTSIDE, f"{where}: {name} is a link out of the folder")
        if not file.is_file():
            return filters.Rejection(filters.MISSING, f"{where}: {name!r} is no file")
        return None


class HubDataset:
    """A dataset of the `datasets` library: a folder of `save_to_disk`, a local builder's folder, or a hub id.

    caption_column: None takes the first of text, caption, prompt. Of several captions the first is taken.
    Raises DataError for a dataset that cannot be had, an unknown split or column.
    """

    def __init__(
        self, name_or_path: str, split: str = "train", image_column: str = "image", caption_column: str | None = None
    ) -> None:
        import datasets  # type: ignore[import-untyped, unused-ignore]

        dataset = _load_dataset(name_or_path, split)
        columns = list(dataset.column_names)
        caption_column = caption_column or next((name for name in _CAPTIONS if name in columns), _CAPTIONS[0])
        for column, option in ((image_column, "--image-column"), (caption_column, "--caption-column")):
            if column not in columns:
                raise errors.DataError(
                    f"dataset {name_or_path} has no column {column!r}; it has {', '.join(columns)}: give {option}"
                )
        if not isinstance(dataset.features[image_column], datasets.Image):
            raise errors.DataError(
                f"column {image_column!r} of {name_or_path} holds {dataset.features[image_column]}, not images; "
                "give --image-column"
            )
        kept = {image_column, caption_column, *_LICENCES, *_SOURCES}
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self._dataset = dataset.select_columns([column for column in columns if column in kept])
        self._image, self._caption, self._split = image_column, caption_column, split
        self.name = (
            f"dataset {pathlib.PurePath(name_or_path).name if pathlib.Path(name_or_path).is_dir() else name_or_path}"
        )
        self.digest = _digest([f"{split} {len(dataset)} {image_column} {caption_column}", *self._probe()])

    def _probe(self) -> Iterator[str]:
        """Of at most 1,000 rows, spread over the dataset: the library's own fingerprint is another in each process."""
        size = len(self)
        for index in range(0, size, max(1, size // 1000)):
            item = self.items(index, index + 1)[0]
            taste = item.image[:4096] if isinstance(item.image, bytes) else str(item.image.path.name).encode()
            yield f"{item.caption} {hashlib.sha256(taste).hexdigest()}"

    def __len__(self) -> int:
        return len(self._dataset)

    def items(self, start: int, stop: int) -> list[Item]:
        columns = self._dataset[start:stop]
        count = len(columns[self._image])
        return [
            self._item(start + row, {name: values[row] for name, values in columns.items()}) for row in range(count)
        ]

    def _item(self, index: int, entry: dict[str, Any]) -> Item:
        caption, image = entry[self._caption], entry[self._image] or {}
        if isinstance(caption, list) and caption:
            caption = caption[0]
        name = f"{self._split}/{index}"
        content: bytes | pictures.FileRange = image.get("bytes") or b""
        if not content and image.get("path"):
            content = pictures.FileRange(pathlib.Path(image["path"]))
        problem = None if content else filters.Rejection(filters.MISSING, f"{name} has no image")
        return Item(
            name,
            caption if isinstance(caption, str) else None,
            content,
            first_text(entry, _LICENCES),
            first_text(entry, _SOURCES),
            problem,
        )


def _load_dataset(name_or_path: str, split: str) -> Any:
    import datasets

    folder = pathlib.Path(name_or_path)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name_or_path)
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise errors.DataError(f"{name_or_path} has no split {split!r}; it has {', '.join(loaded)}")
                return loaded[split]
            return loaded
        return datasets.load_dataset(name_or_path, split=split)
    except errors.DataError:
        raise
    except Exception as error:  # noqa: BLE001 - datasets raises errors of several libraries
        raise errors.DataError(f"dataset {name_or_path} cannot be had: {errors.first_line(error)}") from None


@dataclasses.dataclass(slots=True)
class _Member:
    """What one key of a shard has. Positions are of content within the tar file."""

    shard: int
    key: str
    image: tuple[int, int] | None = None
    text: tuple[int, int] | None = None
    json: tuple[int, int] | None = None
    problem: str = ""


class Shards:
    """WebDataset tar files. Members are listed once at the start, from the headers alone; content is read when asked.

    paths: of the shards; `expand` makes them of a pattern. A key is what stands before the first dot of a file's name.
    A shard that is cut short gives what it holds, and an item that says where it ends. Raises DataError for a shard
    that is missing or no tar file (a compressed one, for it cannot be read by position).
    """

    def __init__(self, paths: Sequence[pathlib.Path], caption_key: str | None = None) -> None:
        self._paths, self._caption_key = list(paths), caption_key
        self._members = [member for number, path in enumerate(self._paths) for member in _list_shard(number, path)]
        if not self._members:
            raise errors.DataError(f"{self._paths[0]} and its fellows hold no pictures ({', '.join(_PICTURES)})")
        self.name = f"{len(self._paths)} shards, {self._paths[0].name} the first"
        self.digest = _digest(f"{path.name}\t{path.stat().st_size}" for path in self._paths)

    def __len__(self) -> int:
        return len(self._members)

    def items(self, start: int, stop: int) -> list[Item]:
        return [self._item(member) for member in self._members[start:stop]]

    def _item(self, member: _Member) -> Item:
        path = self._paths[member.shard]
        name = f"{path.name}:{member.key}"
        if member.problem:
            return Item(name, None, b"", problem=filters.Rejection(filters.CUT_SHORT, member.problem))
        if member.image is None:
            missing = filters.Rejection(filters.MISSING, f"{name} has no picture ({', '.join(_PICTURES)})")
            return Item(name, None, b"", problem=missing)
        entry = self._json(path, member.json)
        caption = self._caption(path, member, entry)
        image = pictures.FileRange(path, *member.image)
        return Item(name, caption, image, first_text(entry, _LICENCES), first_text(entry, _SOURCES))

    def _json(self, path: pathlib.Path, where: tuple[int, int] | None) -> dict[str, Any]:
        if where is None:
            return {}
        try:
            entry = json.loads(pictures.FileRange(path, *where).read())
        except (ValueError, RecursionError):
            return {}
        return entry if isinstance(entry, dict) else {}

    def _caption(self, path: pathlib.Path, member: _Member, entry: Mapping[str, Any]) -> str | None:
        if member.text is not None and self._caption_key is None:
            try:
                return pictures.FileRange(path, *member.text).read().decode("utf-8-sig")
            except UnicodeDecodeError:
                return None
        return first_text(entry, (self._caption_key,) if self._caption_key else _CAPTIONS) or None


def _list_shard(number: int, path: pathlib.Path) -> list[_Member]:
    """The keys of a tar file in their order, each with where its parts lie; of a cut one, the last is where it ends."""
    size = path.stat().st_size if path.is_file() else 0
    members: dict[str, _Member] = {}
    last = "its beginning"
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in _entries(tar):
                if entry.isfile():
                    last = entry.name
                    _put(members, number, path, entry, size)
        ends = size < 1024 or not _ends_well(path, size)
    except (tarfile.TarError, OSError) as error:
        if not members:
            raise errors.DataError(f"shard {path} cannot be read as a tar file: {errors.first_line(error)}") from None
        ends = True
    listed = list(members.values())
    if ends and not any(member.problem for member in listed):
        listed.append(_Member(number, "(end)", problem=f"shard {path.name} is cut short after {last}"))
    return listed


def _entries(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Without keeping them: tarfile holds on to all it has seen."""
    while (entry := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]
        yield entry


def _ends_well(path: pathlib.Path, size: int) -> bool:
    """Whether the two blocks of zeros stand there that end every tar file."""
    return not any(pictures.FileRange(path, size - 1024, 1024).read())


def _put(members: dict[str, _Member], number: int, path: pathlib.Path, entry: tarfile.TarInfo, size: int) -> None:
    folder, _, file = entry.name.rpartition("/")
    stem, _, kind = file.partition(".")
    if not stem:
        return
    key = f"{folder}/{stem}" if folder else stem
    member = members.setdefault(key, _Member(number, key))
    if entry.offset_data + entry.size > size:
        member.problem = f"shard {path.name} is cut short within {entry.name}"
    where = (entry.offset_data, entry.size)
    kind = kind.lower()
    if f".{kind}" in _PICTURES:
        member.image = where
    elif kind == "txt":
        member.text = where
    elif kind == "json":
        member.json = where


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def expand(pattern: str) -> list[pathlib.Path]:
    """The files of a pattern: `{0000..0009}` counts, `{a,b}` chooses, `*` and `?` stand for what is there.

    Raises DataError, naming the first, where files are missing.
    """
    names = list(_expand_braces(pattern))
    found: list[pathlib.Path] = []
    for name in names:
        path = pathlib.Path(name)
        matches = sorted(path.parent.glob(path.name)) if any(mark in path.name for mark in "*?[") else [path]
        found += [match for match in matches if match.is_file()]
        if not matches or not matches[0].is_file():
            raise errors.DataError(f"there is no shard {name} (of {len(names)} that {pattern} names)")
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    if match := _RANGE.search(pattern):
        low, high = match.groups()
        if int(low) > int(high):
            raise errors.DataError(f"{pattern}: {{{low}..{high}}} counts downwards; write the lower number first")
        values = [f"{number:0{len(low)}}" for number in range(int(low), int(high) + 1)]
    elif match := _CHOICE.search(pattern):
        values = match[1].split(",")
    else:
        yield pattern
        return
    for value in values:
        yield from _expand_braces(pattern[: match.start()] + value + pattern[match.end() :])


def _digest(parts: Iterator[str] | Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]
