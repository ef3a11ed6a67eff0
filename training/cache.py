"""A prepared cache on disk: latents and encoded captions in chunks, written whole, read by row without filling memory.

    CACHE/
      manifest.json                     written last: what all this is; without it the cache is unfinished
      rejected.jsonl                    a line for each item that was left out, with its reason
      index.safetensors                 bucket -> (N, 2) of chunk and row, for every item that counts
      chunks/000000/record.json         counts, hashes, what was rejected
      chunks/000000/1024x1024.safetensors   one file a bucket, height x width

| tensor          | of N rows               |                                                          |
|-----------------|-------------------------|----------------------------------------------------------|
| `latents`       | (N, C, h, w) float16    | scaled, mean of the autoencoder's posterior              |
| `prompt_embeds` | (N, L, D) float16       | token states of both text encoders                       |
| `pooled`        | (N, P) float16          |                                                          |
| `time_ids`      | (N, 6) int32            | original height, width, crop top, left, target height, width |
| `item`          | (N,) int64              | position in the source                                   |
| `thumbnail`     | (N, 8, 9, 3) uint8      | what duplicates are found by                             |
| `licence`, `source` | (N,) int32          | positions in the record's lists of them                  |
| `captions`, `ids`   | (bytes,) uint8      | UTF-8, one after another; `captions_end`, `ids_end`: (N,) int64 |
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_kd import artifact, errors, files
from diffusion_kd.types import Conditioning
from training.preparation import filters
from training.preparation.identity import Identity

SCHEMA_VERSION = 1
MANIFEST, INDEX, REJECTED, RECORD = "manifest.json", "index.safetensors", "rejected.jsonl", "record.json"
_OPEN_FILES = 128
_FLOATS = ("latents", "prompt_embeds", "pooled")

Size = tuple[int, int]
"""Height and width, px."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """An item left out. item: its position in the source."""

    item: int
    id: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """What is written of one bucket of a chunk. tensors: as the module's table names them, but for the four texts."""

    tensors: dict[str, Tensor]
    captions: list[str]
    ids: list[str]

    def packed(self) -> dict[str, Tensor]:
        return {name: tensor.contiguous() for name, tensor in self.tensors.items()} | {
            **_pack("captions", self.captions),
            **_pack("ids", self.ids),
        }


def _pack(name: str, texts: Sequence[str]) -> dict[str, Tensor]:
    encoded = [text.encode("utf-8", "replace") for text in texts]
    ends = torch.tensor([len(text) for text in encoded], dtype=torch.int64).cumsum(0)
    return {name: torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8), f"{name}_end": ends}


def size_name(size_px: Size) -> str:
    """`1024x768`: height x width."""
    return f"{size_px[0]}x{size_px[1]}"


def size_of(name: str) -> Size:
    height, width = name.split("x")
    return int(height), int(width)


def chunk_folder(folder: pathlib.Path, chunk: int) -> pathlib.Path:
    return folder / "chunks" / f"{chunk:06d}"


def write_chunk(
    folder: pathlib.Path, chunk: int, rows: Mapping[Size, Rows], rejected: Sequence[Rejected], notes: Mapping[str, Any]
) -> None:
    """Write one chunk whole. notes: further entries of its record; `start` and `stop` among them."""
    with files.written_whole(chunk_folder(folder, chunk)) as unfinished:
        unfinished.mkdir()
        buckets = {}
        for size, some in sorted(rows.items()):
            content = safetensors.torch.save(some.packed())
            (unfinished / f"{size_name(size)}.safetensors").write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            buckets[size_name(size)] = {"count": len(some.ids), "bytes": len(content), "sha256": digest}
        record = {**notes, "buckets": buckets, "rejected": [dataclasses.asdict(one) for one in rejected]}
        _write_json(unfinished / RECORD, record)


def _write_json(path: pathlib.Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")


def read_record(folder: pathlib.Path, chunk: int) -> dict[str, Any] | None:
    """A chunk's record, if the chunk stands with files of the right size."""
    there = chunk_folder(folder, chunk)
    try:
        record: dict[str, Any] = json.loads((there / RECORD).read_text(encoding="utf-8"))
        sizes = {name: (there / f"{name}.safetensors").stat().st_size for name in record["buckets"]}
        whole = all(sizes[name] == bucket["bytes"] for name, bucket in record["buckets"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """All rows of all chunks, in the order of their items. bucket: position in `sizes`."""

    sizes: list[str]
    item: NDArray[np.int64]
    bucket: NDArray[np.int64]
    chunk: NDArray[np.int64]
    row: NDArray[np.int64]
    thumbnail: NDArray[np.uint8]
    licence: NDArray[np.int64]
    source: NDArray[np.int64]
    ids: list[str]
    names: dict[str, list[str]]


def _gather(folder: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> _Kept:
    """Read from all chunks what the index is made of. Licences and sources become positions in lists of all."""
    sizes = sorted({name for record in records for name in record["buckets"]})
    names = {kind: sorted({name for record in records for name in record[kind]}) for kind in ("licences", "sources")}
    columns: dict[str, list[NDArray[Any]]] = collections.defaultdict(list)
    ids: list[str] = []
    for chunk, record in enumerate(records):
        lists = {kind: np.array([names[kind].index(name) for name in record[kind]], np.int64) for kind in names}
        for name in sorted(record["buckets"]):
            with safetensors.safe_open(chunk_folder(folder, chunk) / f"{name}.safetensors", "np") as file:
                count = record["buckets"][name]["count"]
                ids += _unpack(file.get_tensor("ids"), file.get_tensor("ids_end"))
                columns["item"].append(file.get_tensor("item"))
                columns["thumbnail"].append(file.get_tensor("thumbnail"))
                columns["licence"].append(lists["licences"][file.get_tensor("licence")])
                columns["source"].append(lists["sources"][file.get_tensor("source")])
                columns["bucket"].append(np.full(count, sizes.index(name), np.int64))
                columns["chunk"].append(np.full(count, chunk, np.int64))
                columns["row"].append(np.arange(count))
    if not ids:
        nothing = {name: np.zeros(0, np.int64) for name in ("item", "bucket", "chunk", "row", "licence", "source")}
        return _Kept(sizes=[], ids=[], names=names, thumbnail=np.zeros((0, 8, 9, 3), np.uint8), **nothing)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    order = np.argsort(joined["item"])
    return _Kept(sizes=sizes, ids=[ids[i] for i in order], names=names, **{n: v[order] for n, v in joined.items()})


def _unpack(content: NDArray[np.uint8], ends: NDArray[np.int64]) -> list[str]:
    raw, bounds = content.tobytes(), [0, *ends.tolist()]
    return [raw[start:stop].decode() for start, stop in itertools.pairwise(bounds)]


def finish(
    folder: pathlib.Path,
    chunks: int,
    *,
    identity: Identity,
    made: Mapping[str, Any],
    most_rejected: float,
    most_bits: int,
    device: torch.device,
) -> dict[str, Any]:
    """Find duplicates among all chunks, write the index, the list of rejected items and last the manifest.

    made: how, as the manifest tells it. most_rejected: share of the items. most_bits: see `filters.duplicates`.
    Returns the manifest. Raises DataError if a chunk is missing, too much was rejected, or nothing is left.
    """
    records = []
    for chunk in range(chunks):
        if (record := read_record(folder, chunk)) is None:
            raise errors.DataError(f"chunk {chunk} of {folder} is missing or damaged; the same command makes it anew")
        records.append(record)
    kept = _gather(folder, records)
    rejected = [Rejected(**one) for record in records for one in record["rejected"]]
    first = filters.duplicates(kept.thumbnail, most_bits=most_bits, device=device)
    for row in np.nonzero(first >= 0)[0]:
        detail = f"{kept.ids[row]} looks like {kept.ids[first[row]]}"
        rejected.append(Rejected(int(kept.item[row]), kept.ids[row], filters.DUPLICATE, detail))
    rejected.sort(key=lambda one: one.item)
    total = sum(record["stop"] - record["start"] for record in records)
    check_share(rejected, total, most_rejected)
    lines = [json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in rejected]
    files.write(folder / REJECTED, "".join(lines).encode("utf-8", "replace"))
    single = first < 0
    files.write(folder / INDEX, safetensors.torch.save(_index(kept, single)))
    manifest = _manifest(folder, records, kept, single, rejected) | {"teacher": identity.to_json(), "made": dict(made)}
    files.write(
        folder / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    )
    return manifest


def check_share(rejected: Sequence[Rejected], total: int, most: float) -> None:
    """Raise DataError if more than this share of the items was rejected, or all: with the commonest reasons."""
    if len(rejected) <= most * total and len(rejected) < total:
        return
    reasons = collections.Counter(one.reason for one in rejected).most_common(4)
    examples = {one.reason: one.detail for one in reversed(rejected)}
    said = "; ".join(f"{reason}: {count}, such as: {examples[reason]}" for reason, count in reasons)
    raise errors.DataError(
        f"{len(rejected)} of {total} items were rejected, more than --most-rejected {most:g} allows or all of them. "
        f"{said or 'The source is empty'}. Mend the data, or change the filters in another --out"
    )


def _index(kept: _Kept, single: NDArray[np.bool_]) -> dict[str, Tensor]:
    index = {}
    for number, name in enumerate(kept.sizes):
        chosen = single & (kept.bucket == number)
        if chosen.any():
            pairs = np.stack([kept.chunk[chosen], kept.row[chosen]], 1).astype(np.int32)
            index[name] = torch.from_numpy(pairs)
    return index


def _manifest(
    folder: pathlib.Path,
    records: Sequence[Mapping[str, Any]],
    kept: _Kept,
    single: NDArray[np.bool_],
    rejected: Sequence[Rejected],
) -> dict[str, Any]:
    def counts(values: NDArray[np.int64], names: Sequence[str]) -> dict[str, int]:
        found = np.bincount(values[single], minlength=len(names))
        return {name or "unknown": int(count) for name, count in zip(names, found, strict=True) if count}

    scrubbed: collections.Counter[str] = collections.Counter()
    for record in records:
        scrubbed.update(record["scrubbed"])
    stored = {
        f"chunks/{chunk:06d}/{name}.safetensors": {"bytes": bucket["bytes"], "sha256": bucket["sha256"]}
        for chunk, record in enumerate(records)
        for name, bucket in record["buckets"].items()
    }
    for name in (INDEX, REJECTED):
        content = (folder / name).read_bytes()
        stored[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reasons = collections.Counter(one.reason for one in rejected)
    return {
        "schema_version": SCHEMA_VERSION,
        "items": sum(record["stop"] - record["start"] for record in records),
        "count": int(single.sum()),
        "buckets": counts(kept.bucket, kept.sizes),
        "rejected": dict(sorted(reasons.items())),
        "scrubbed": dict(sorted(scrubbed.items())),
        "licences": counts(kept.licence, kept.names["licences"]),
        "sources": counts(kept.source, kept.names["sources"]),
        "files": stored,
    }


@dataclasses.dataclass(frozen=True, slots=True)
class CachedBatch:
    """latents: (B, C, h, w) float32, scaled; cond: float32; both on the CPU. ids: what the source calls the items."""

    latents: Tensor
    cond: Conditioning
    captions: list[str]
    ids: list[str]


class CachedImages:
    """A finished cache, opened and checked.

    Items are numbered bucket by bucket. teacher: the parts (or the identity of the parts) whose latents and text
    states are wanted; None takes any. verify: read every file once and compare its hash; sizes are always compared.
    Raises DataError for a cache that is unfinished, of another release, damaged, or of another teacher.
    """

    def __init__(
        self, folder: pathlib.Path, teacher: artifact.Parts | Identity | None = None, *, verify: bool = False
    ) -> None:
        self._folder = folder
        self.manifest = read_manifest(folder)
        if teacher is not None:
            self._require_teacher(teacher if isinstance(teacher, Identity) else Identity.of(teacher))
        _check_files(folder, self.manifest["files"], verify=verify)
        with safetensors.safe_open(folder / INDEX, "np") as file:
            index = {size_of(name): file.get_tensor(name) for name in sorted(file.keys(), key=size_of)}
        self._places = np.concatenate(list(index.values()))
        ends = np.cumsum([len(places) for places in index.values()]).tolist()
        self.buckets: dict[Size, range] = {
            size: range(end - len(places), end) for end, (size, places) in zip(ends, index.items(), strict=True)
        }
        """(height, width) in px -> the numbers of its items."""
        self._starts = np.array([numbers.start for numbers in self.buckets.values()])
        self._opened: collections.OrderedDict[pathlib.Path, Any] = collections.OrderedDict()
        digest = self.manifest["files"][INDEX]["sha256"][:8]
        self.source = f"cache {folder.resolve().name}, {len(self)} images, index {digest}"

    def __len__(self) -> int:
        return len(self._places)

    def _require_teacher(self, wanted: Identity) -> None:
        try:
            found = Identity.from_json(self.manifest["teacher"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise errors.DataError(f"{self._folder / MANIFEST} is damaged: {errors.first_line(error)}") from None
        if part := found.difference(wanted):
            name = self.manifest["made"].get("teacher")
            raise errors.DataError(
                f"{self._folder} was made with the {part} of {name}, and this teacher has another; "
                "prepare the data anew with this teacher, in another folder"
            )

    def draw(self, seed: Sequence[int], step: int, batch_size: int) -> list[int]:
        """Numbers of a batch's items, all of one bucket: the same for the same seed and step, in every process.

        Buckets come in proportion to their counts. Within a batch no item comes twice, unless the bucket is smaller
        than the batch.
        """
        rng = np.random.default_rng((*seed, step))
        bucket = self.buckets[self._size_of(int(rng.integers(len(self))))]
        chosen = rng.choice(len(bucket), batch_size, replace=len(bucket) < batch_size)
        return [bucket.start + int(index) for index in chosen]

    def _size_of(self, number: int) -> Size:
        return list(self.buckets)[int(np.searchsorted(self._starts, number, side="right")) - 1]

    def batch(self, indices: Sequence[int]) -> CachedBatch:
        """Read items of one bucket. Raises DataError for damaged rows, naming file and row, and for mixed buckets."""
        sizes = {self._size_of(index) for index in indices}
        if len(sizes) != 1:
            raise errors.DataError(
                f"a batch has items of one bucket, not of {', '.join(map(size_name, sorted(sizes)))}"
            )
        name = size_name(sizes.pop())
        rows = [self._row(name, *self._places[index].tolist()) for index in indices]
        stacked = {key: torch.cat([row[key] for row, _, _ in rows]).float() for key in (*_FLOATS, "time_ids")}
        cond = Conditioning(stacked["prompt_embeds"], stacked["pooled"], stacked["time_ids"])
        return CachedBatch(stacked["latents"], cond, [row[1] for row in rows], [row[2] for row in rows])

    def _row(self, name: str, chunk: int, row: int) -> tuple[dict[str, Tensor], str, str]:
        path = chunk_folder(self._folder, chunk) / f"{name}.safetensors"
        file = self._open(path)
        tensors = {key: file.get_slice(key)[row : row + 1] for key in (*_FLOATS, "time_ids")}
        for key in _FLOATS:
            if not bool(torch.isfinite(tensors[key]).all()):
                raise errors.DataError(
                    f"{path}, row {row}: {key} hold NaN or infinite values; delete the folder {path.parent} and "
                    "prepare again with the same command"
                )
        return tensors, _text(file, "captions", row), _text(file, "ids", row)

    def _open(self, path: pathlib.Path) -> Any:
        """A file's map; the least recently used of many is closed."""
        if path not in self._opened:
            try:
                self._opened[path] = safetensors.safe_open(path, "pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise errors.DataError(f"{path} cannot be read: {errors.first_line(error)}") from None
            if len(self._opened) > _OPEN_FILES:
                self._opened.popitem(last=False)
        self._opened.move_to_end(path)
        return self._opened[path]


def _text(file: Any, name: str, row: int) -> str:
    ends = file.get_slice(f"{name}_end")
    start, stop = int(ends[row - 1 : row][0]) if row else 0, int(ends[row : row + 1][0])
    return bytes(file.get_slice(name)[start:stop].tolist()).decode("utf-8", "replace") if stop > start else ""


def open_for(folder: pathlib.Path, teacher: artifact.Parts, size_px: int) -> CachedImages:
    """A cache of this teacher's for a training at this size. Raises DataError, or ConfigError for another size."""
    images = CachedImages(folder, teacher)
    if (made := images.manifest["made"]["settings"]["size_px"]) != size_px:
        raise errors.ConfigError(
            f"{folder} was prepared for {made} px and the training is for {size_px} px; set size_px={made}, "
            "or prepare the data anew with --size-px"
        )
    return images


def is_cache(folder: pathlib.Path) -> bool:
    """Whether a folder is a cache, finished or not, rather than pictures with metadata."""
    return (folder / MANIFEST).is_file() or (folder / "chunks").is_dir()


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """A finished cache's manifest. Raises DataError."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
        if not all(isinstance(manifest[key], dict) for key in ("files", "buckets", "teacher", "made")):
            raise TypeError("its files, buckets, teacher or made are no tables")
    except FileNotFoundError:
        done = "is unfinished: prepare it with the same command" if (folder / "chunks").is_dir() else "is no cache"
        raise errors.DataError(f"{folder} {done} (it has no {MANIFEST})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.DataError(f"{path} is damaged: {errors.first_line(error)}") from None
    if version != SCHEMA_VERSION:
        raise errors.DataError(f"{path} has schema version {version}; this release reads {SCHEMA_VERSION}")
    return manifest


def _check_files(folder: pathlib.Path, stored: Mapping[str, Mapping[str, Any]], *, verify: bool) -> None:
    for name, said in stored.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != said["bytes"]:
            was = "missing" if found is None else f"{found} bytes long and not {said['bytes']}"
            raise errors.DataError(f"{path} is {was}; prepare again with the same command")
        if verify:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != said["sha256"]:
                raise errors.DataError(
                    f"{path} was changed after it was written (sha256); delete {path.parent.name}/ and prepare again "
                    "with the same command"
                )
