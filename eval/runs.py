"""What trainings have left on disk, read while they go on.

A run is a folder with `origin.json`, `config.yaml` and a folder for each stage, which holds TensorBoard's event files
and a checkpoint. Knows the files and nothing of what the curves mean; `eval.health` judges them.

Event files are read here record by record, not with TensorBoard's EventAccumulator: that one keeps grids at random,
mixes the repeated steps of a run that was resumed, and sums every picture's checksum in plain Python (1.5 s for 14 MB).
"""

import collections
import dataclasses
import enum
import functools
import logging
import math
import operator
import os
import pathlib
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from diffusion_kd import errors

_log = logging.getLogger(__name__)

TRAINING = "training"
"""The stage of a distillation."""

TEACHER_STAGES = ("contrastive", "vae", "decoder", "unet")

CHECKPOINT = "checkpoint.pt"

ACTIVE_S = 300.0
"""A run that has written nothing for so long counts as ended. Checkpoints come every 120 s and event files are flushed
every 120 s: two of these, and a minute for a long step."""

MOST_GRIDS = 50
"""Sample grids of a history, evenly spread over the run; the first and the last are among them."""

DEPTH = 4
"""Folders below the first that are searched for runs."""

_EXPORTS = ("student", "teacher")
_NO_STAGES = {*_EXPORTS, "encoder", "tokenizer", "teacher_images", "cache"}
_STAGE_NAMES = {TRAINING, *TEACHER_STAGES}
_EVENTS = "tfevents"
_MOST_CONFIG_BYTES = 1 << 20
_KEPT_RUNS = 8
"""Runs whose curves stay in memory. A curve's point takes some 100 bytes; of a grid its place on disk is kept."""


class Kind(enum.StrEnum):
    DISTILL = "distill"
    TEACHER = "teacher"
    OTHER = "other"


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One training's folder.

    name: the folder's path below the one that was searched, with slashes; "." for that one itself.
    stages: names of the folders with event files, in the order in which they ran: `training`, or a teacher's.
    last_written_s: when a stage's files were last written, in seconds since 1970. active: whether that is at most
        `ACTIVE_S` ago and nothing has been exported since. finished: whether there is an export that is no older than
        the training, give or take `ACTIVE_S`, as copies lose their times.
    config: text of `config.yaml`, the resolved settings. exported: `student`, or a teacher's `teacher` folder.
    report: `report.json`. checkpoint: whether any stage has one. Each is None or False where it is missing.
    """

    name: str
    path: pathlib.Path
    kind: Kind
    stages: tuple[str, ...]
    last_written_s: float
    active: bool
    finished: bool
    checkpoint: bool
    config: str | None = None
    exported: pathlib.Path | None = None
    report: pathlib.Path | None = None

    @property
    def student(self) -> pathlib.Path | None:
        """The exported student; None for a teacher's run, and until the export."""
        return self.exported if self.exported is not None and self.exported.name == "student" else None


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """A scalar over the run. All three are as long as the curve, in the order of `images_seen`, which rises.

    images_seen: training examples; of a foreign run, its steps. values: may be NaN or infinite.
    wall_s: when each was written, in seconds since 1970.
    """

    stage: str
    tag: str
    images_seen: tuple[int, ...]
    values: tuple[float, ...]
    wall_s: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """A picture of samples. Its bytes stay in the event file until they are asked for."""

    stage: str
    tag: str
    images_seen: int
    wall_s: float
    file: pathlib.Path
    start: int  # of the record's content, in bytes
    length: int

    @property
    def png(self) -> bytes:
        """The encoded picture. Raises DataError if the event file is gone or was changed since."""
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                event = _event_class().FromString(file.read(self.length))
            return next(
                bytes(value.image.encoded_image_string) for value in event.summary.value if value.tag == self.tag
            )
        except (OSError, StopIteration, _decode_error()) as error:
            raise errors.DataError(
                f"the picture {self.tag!r} at {self.images_seen} images can no longer be read from {self.file.name} "
                f"({errors.first_line(error)}); read the run again"
            ) from None


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """What a run has logged. curves: by stage, then by tag. notes: a sentence on each thing that could not be read."""

    run: Run
    curves: tuple[Curve, ...]
    grids: tuple[Grid, ...]
    notes: tuple[str, ...]

    def curve(self, tag: str, stage: str = TRAINING) -> Curve | None:
        return next((curve for curve in self.curves if (curve.stage, curve.tag) == (stage, tag)), None)


# --- finding ----------------------------------------------------------------------------------------


def find(folder: pathlib.Path, *, now_s: float | None = None) -> list[Run]:
    """Every run in a folder and up to `DEPTH` folders below it, the one that wrote last first.

    now_s: seconds since 1970, the clock if None. Links are not followed, folders that cannot be read are passed over,
    and none at all is an empty list.
    """
    now_s = time.time() if now_s is None else now_s
    found = [_run(path, stages, folder, now_s) for path, stages in _below(folder, DEPTH)]
    return sorted(found, key=lambda run: (-run.last_written_s, run.name))


def _below(folder: pathlib.Path, depth: int) -> Iterator[tuple[pathlib.Path, list[pathlib.Path]]]:
    """Runs and their stages' folders. What is below a run belongs to it."""
    entries = _entries(folder)
    children = [pathlib.Path(entry.path) for entry in entries if _is_folder(entry) and not entry.name.startswith(".")]
    stages = [folder] if any(_is_event_file(entry) for entry in entries) else []
    if any(entry.name == "origin.json" for entry in entries) or {child.name for child in children} & _STAGE_NAMES:
        stages += [child for child in children if child.name not in _NO_STAGES and _event_files(child)]
    if stages:
        yield folder, sorted(stages, key=_stage_order)
    elif depth:
        for child in children:
            yield from _below(child, depth - 1)


def _stage_order(stage: pathlib.Path) -> tuple[int, str]:
    known = stage.name in TEACHER_STAGES
    return (TEACHER_STAGES.index(stage.name) if known else len(TEACHER_STAGES)), stage.name


def _run(path: pathlib.Path, stages: list[pathlib.Path], folder: pathlib.Path, now_s: float) -> Run:
    names = tuple(stage.name for stage in stages)
    written_s = max((entry_s for stage in stages for entry_s in _written(stage)), default=0.0)
    exported = next((own for name in _EXPORTS if (own := _own(path / name)) and own.is_dir()), None)
    done_s = _modified(exported) if exported is not None else 0.0
    return Run(
        name=path.relative_to(folder).as_posix(),
        path=path,
        kind=_kind(names),
        stages=names,
        last_written_s=written_s,
        active=now_s - written_s <= ACTIVE_S and done_s < written_s,
        finished=exported is not None and done_s >= written_s - ACTIVE_S,
        checkpoint=any((stage / CHECKPOINT).is_file() for stage in stages),
        config=_config(path),
        exported=exported,
        report=_own(path / "report.json"),
    )


def _kind(stages: Sequence[str]) -> Kind:
    if TRAINING in stages:
        return Kind.DISTILL
    return Kind.TEACHER if set(stages) & set(TEACHER_STAGES) else Kind.OTHER


def _config(path: pathlib.Path) -> str | None:
    own = _own(path / "config.yaml")
    if own is None:
        return None
    try:
        with own.open("rb") as file:
            return file.read(_MOST_CONFIG_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return None


def _own(path: pathlib.Path) -> pathlib.Path | None:
    """The path; None where it does not exist or is a link, which may lead out of the folder."""
    return None if path.is_symlink() or not path.exists() else path


def _entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _log.debug("%s is passed over: %s", folder, error)
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _is_event_file(entry: os.DirEntry[str]) -> bool:
    try:
        return _EVENTS in entry.name and entry.is_file(follow_symlinks=False)
    except OSError:
        return False


def _event_files(stage: pathlib.Path) -> list[pathlib.Path]:
    return [pathlib.Path(entry.path) for entry in _entries(stage) if _is_event_file(entry)]


def _written(stage: pathlib.Path) -> Iterator[float]:
    """When each file of a stage that training writes to was last written. An unfinished checkpoint counts."""
    for entry in _entries(stage):
        if _is_event_file(entry) or entry.name.startswith(CHECKPOINT):
            yield _modified(pathlib.Path(entry.path))


def _modified(path: pathlib.Path) -> float:
    """0 for a file that has vanished meanwhile."""
    try:
        return path.stat(follow_symlinks=False).st_mtime
    except OSError:
        return 0.0


# --- reading ----------------------------------------------------------------------------------------


def read(run: Run, *, most_grids: int = MOST_GRIDS) -> History:
    """What a run has logged so far. Only what was written since the last call is read again.

    What cannot be read is left out and named in `notes`. Where a run was resumed and repeats steps, its later self
    counts: what an earlier file holds from the first step of a later one on is left out.
    Raises ConfigError if TensorBoard is not installed, or for less than two grids.
    """
    errors.require(most_grids >= 2, "most_grids", most_grids, "2 or more")
    _event_class()
    with _lock:
        known = _known.pop(run.path, None) or _Reading()
        _known[run.path] = known  # at the end, as the one used last
        while len(_known) > _KEPT_RUNS:
            _known.popitem(last=False)
        notes = known.update(run)
        curves, grids = known.merged()
    return History(run, curves, _spread(grids, most_grids), tuple(notes))


def _spread(grids: Sequence[Grid], most: int) -> tuple[Grid, ...]:
    """At most so many, evenly spread; the first and the last are kept."""
    if len(grids) <= most:
        return tuple(grids)
    return tuple(grids[round(index * (len(grids) - 1) / (most - 1))] for index in range(most))


class _Reading:
    """A run's event files as far as they are read."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, pathlib.Path], _EventFile] = {}
        self._merged: tuple[tuple[Curve, ...], tuple[Grid, ...]] = (), ()

    def update(self, run: Run) -> list[str]:
        """Read on. Returns what could not be read, a sentence each."""
        standing = [(stage, path) for stage in run.stages for path in _event_files(_stage_folder(run, stage))]
        changed = standing != list(self._files)
        self._files = {key: self._files.get(key) or _EventFile(*key) for key in standing}
        for file in self._files.values():
            changed |= file.update()
        if changed:
            self._merged = self._merge(run.stages)
        return [note for file in self._files.values() for note in file.notes(run.active)]

    def merged(self) -> tuple[tuple[Curve, ...], tuple[Grid, ...]]:
        return self._merged

    def _merge(self, stages: Sequence[str]) -> tuple[tuple[Curve, ...], tuple[Grid, ...]]:
        curves: list[Curve] = []
        grids: list[Grid] = []
        for stage in stages:
            files = [file for file in self._files.values() if file.stage == stage and file.first_step is not None]
            files.sort(key=lambda file: (file.began_s, file.path.name))
            points: dict[str, _Points] = collections.defaultdict(_Points)
            shown: list[Grid] = []
            for file in files:
                assert file.first_step is not None, "files without points were left out"
                for earlier in points.values():
                    earlier.cut(file.first_step)
                shown = [grid for grid in shown if grid.images_seen < file.first_step]
                for tag, own in file.points.items():
                    points[tag].extend(own)
                shown += file.grids
            curves += [points[tag].curve(stage, tag) for tag in points if points[tag].values]
            grids += sorted(shown, key=lambda grid: grid.images_seen)
        return tuple(curves), tuple(grids)


@dataclasses.dataclass(slots=True)
class _Points:
    """A curve as it grows, in columns: a long one is copied in no time."""

    images_seen: list[int] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)
    wall_s: list[float] = dataclasses.field(default_factory=list)

    def add(self, images_seen: int, value: float, wall_s: float) -> None:
        self.images_seen.append(images_seen)
        self.values.append(value)
        self.wall_s.append(wall_s)

    def extend(self, other: "_Points") -> None:
        self.images_seen += other.images_seen
        self.values += other.values
        self.wall_s += other.wall_s

    def choose(self, indices: Sequence[int]) -> None:
        self.images_seen = [self.images_seen[index] for index in indices]
        self.values = [self.values[index] for index in indices]
        self.wall_s = [self.wall_s[index] for index in indices]

    def cut(self, first_step: int) -> None:
        """Leave out that step and all after it."""
        self.choose([index for index, step in enumerate(self.images_seen) if step < first_step])

    def curve(self, stage: str, tag: str) -> Curve:
        """In the order of steps; of points at one step the one that was written last."""
        if not all(map(operator.lt, self.images_seen, self.images_seen[1:])):
            order = sorted(range(len(self.values)), key=lambda index: (self.images_seen[index], self.wall_s[index]))
            self.choose(list({self.images_seen[index]: index for index in order}.values()))
        return Curve(stage, tag, tuple(self.images_seen), tuple(self.values), tuple(self.wall_s))


def _stage_folder(run: Run, stage: str) -> pathlib.Path:
    """A stage's folder bears its name; a run without stages of its own holds its event files itself."""
    child = run.path / stage
    return child if child.is_dir() else run.path


class _EventFile:
    """One event file, read up to the last whole record."""

    def __init__(self, stage: str, path: pathlib.Path) -> None:
        self.stage, self.path = stage, path
        self._begin()

    def _begin(self) -> None:
        self.points: dict[str, _Points] = collections.defaultdict(_Points)
        self.grids: list[Grid] = []
        self.first_step: int | None = None
        self.began_s = 0.0
        self._seen: tuple[int, int, int] | None = None  # inode, size, time of the last change
        self._read = self._bad = 0  # bytes; records
        self._problem = ""  # ends the reading of this file

    def update(self) -> bool:
        """Read what is new. Returns whether there was something."""
        try:
            stat = self.path.stat(follow_symlinks=False)
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if seen == self._seen:
                return False
            if self._seen and (seen[0] != self._seen[0] or seen[1] < self._read):
                self._begin()  # another file of the same name
            with self.path.open("rb", buffering=1 << 20) as file:
                self._read_on(file, stat.st_size)
        except OSError as error:
            new, self._problem = f"cannot be read ({error.strerror or errors.first_line(error)})", self._problem
            changed = new != self._problem
            self._problem = new
            return changed
        self._seen = seen
        return True

    def _read_on(self, file: BinaryIO, size: int) -> None:
        if self._problem.startswith("cannot"):
            self._problem = ""
        parse = _event_class().FromString
        file.seek(self._read)
        while not self._problem and size - self._read >= _FRAME_BYTES:
            head = file.read(_HEAD.size)
            (length, checksum) = _HEAD.unpack(head)
            end = self._read + _FRAME_BYTES + length
            if (length == 0 or end > size) and checksum != _masked_crc32c(head[:8]):
                self._problem = f"is damaged after {self._read:,} bytes" if self._read else "is no event file"
                return
            if end > size:
                return
            content = file.read(length)
            file.seek(end)
            try:
                self._take(parse(content), self._read + _HEAD.size, length)
            except _decode_error():
                if checksum != _masked_crc32c(head[:8]):
                    self._problem = f"is damaged after {self._read:,} bytes" if self._read else "is no event file"
                    return
                self._bad += 1
            self._read = end

    def _take(self, event: Any, start: int, length: int) -> None:
        self.began_s = self.began_s or event.wall_time
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                self.points[value.tag].add(event.step, value.simple_value, event.wall_time)
            elif kind == "image":
                grid = Grid(self.stage, value.tag, event.step, event.wall_time, self.path, start, length)
                self.grids.append(grid)
            else:
                continue
            self.first_step = event.step if self.first_step is None else min(self.first_step, event.step)

    def notes(self, active: bool) -> Iterator[str]:
        """active: whether the run goes on; what is not whole yet then goes without saying."""
        name = f"{self.stage}/{self.path.name}"
        if self._problem:
            yield f"{name} {self._problem}; {'what follows' if self._read else 'it'} is not shown."
        if self._bad:
            yield f"{name} holds {self._bad:,} damaged records; they are not shown."
        if self._seen is None or self._problem or active:
            return
        if self._seen[1] == 0:
            yield f"{name} is empty: its run ended before it wrote anything."
        elif self._seen[1] > self._read:
            yield f"{name} ends within a record: its run was killed while it wrote. What is whole is shown."


_known: collections.OrderedDict[pathlib.Path, _Reading] = collections.OrderedDict()
_lock = threading.Lock()

_HEAD = struct.Struct("<QI")  # length of the content, masked checksum of these eight bytes
_FRAME_BYTES = _HEAD.size + 4  # and the content's checksum, behind it


@functools.cache
def _event_class() -> Any:
    """TensorBoard's Event. Raises ConfigError if it is not installed."""
    try:
        from tensorboard.compat.proto import event_pb2  # type: ignore[import-untyped]
    except ImportError:
        raise errors.ConfigError(
            "reading curves needs tensorboard, which is not installed; pip install 'diffusion-kd[train]' or '[app]'"
        ) from None
    return event_pb2.Event


@functools.cache
def _decode_error() -> type[Exception]:
    from google.protobuf import message  # type: ignore[import-untyped]

    raised: type[Exception] = message.DecodeError
    return raised


def _masked_crc32c(content: bytes) -> int:
    """Of a record's length. Bit by bit: only asked where something looks wrong. Source: RFC 3720, B.4; TFRecord."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# --- showing ----------------------------------------------------------------------------------------


def thin(curve: Curve, most: int = 400) -> Curve:
    """A curve of at most so many points that looks the same: of each stretch the lowest and the highest value, and the
    first that is not finite; and both ends. Raises ConfigError for less than 5 points."""
    errors.require(most >= 5, "most", most, "5 or more")
    count = len(curve)
    if count <= most:
        return curve
    stretches = (most - 2) // 3
    kept = {0, count - 1}
    for index in range(stretches):
        kept |= _extremes(curve.values, index * count // stretches, (index + 1) * count // stretches)
    chosen = sorted(kept)
    return dataclasses.replace(
        curve,
        images_seen=tuple(curve.images_seen[index] for index in chosen),
        values=tuple(curve.values[index] for index in chosen),
        wall_s=tuple(curve.wall_s[index] for index in chosen),
    )


def _extremes(values: Sequence[float], start: int, end: int) -> set[int]:
    finite = [index for index in range(start, end) if math.isfinite(values[index])]
    broken = next((index for index in range(start, end) if not math.isfinite(values[index])), None)
    kept = {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else set()
    return kept if broken is None else kept | {broken}
