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
import json
import logging
import math
import os
import pathlib
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from diffusion_kd import errors

_log = logging.getLogger(__name__)

TRAINING = "training"
"""The stage of a distillation."""

TEACHER_STAGES = ("contrastive", "vae", "decoder", "unet")

CHECKPOINT = "checkpoint.pt"
"""Of runs that know no `CHECKPOINTS` yet."""

CHECKPOINTS = "checkpoints"
"""A stage's folder of checkpoints (`training.checkpoint`)."""

HEALTH = "health.jsonl"
"""A stage's own account of when it rolled back (`training.health`)."""

ACTIVE_S = 300.0
"""A run that has written nothing for so long counts as ended: two checkpoints, which come every 120 s, and a minute for
a long step. Event files are flushed every 10 s."""

MOST_GRIDS = 12
"""Sample grids of a history, evenly spread over the run; the first and the last are among them."""

DEPTH = 4
"""Folders below the first that are searched for runs."""

_EXPORTS = ("student", "teacher")
_NO_STAGES = {*_EXPORTS, "encoder", "tokenizer", "teacher_images", "cache"}
_STAGE_NAMES = {TRAINING, *TEACHER_STAGES}
_EVENTS = "tfevents"
_MOST_CONFIG_BYTES = _MOST_HEALTH_BYTES = 1 << 20
_KEPT_FILES = 8
"""Event files whose points stay in memory, at some 200 bytes each. One that grows counts anew at each look."""


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
        Each is None where it is missing. checkpoint: whether any stage has one.
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
class Intervention:
    """What a training did about its own health, at `images_seen`.

    time_s: since 1970. to_images: where it went back to; None where it gave up. attempt: its number of roll-backs then.
    why: a sentence or more.
    """

    stage: str
    time_s: float
    images_seen: int
    to_images: int | None
    attempt: int
    why: str


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """What a run has logged. curves: by stage, then by tag. notes: a sentence on each thing that could not be read.

    interventions: by stage, in the order in which they happened.
    """

    run: Run
    curves: tuple[Curve, ...]
    grids: tuple[Grid, ...]
    notes: tuple[str, ...]
    interventions: tuple[Intervention, ...] = ()


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
        checkpoint=any(map(_has_checkpoint, stages)),
        config=_config(path),
        exported=exported,
    )


def _has_checkpoint(stage: pathlib.Path) -> bool:
    """Whether one stands; half-written ones are hidden, and those do not count."""
    return (stage / CHECKPOINT).is_file() or any(
        _is_folder(entry) and entry.name.startswith("step-") for entry in _entries(stage / CHECKPOINTS)
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
        if _is_event_file(entry) or entry.name.startswith(CHECKPOINT + ".") or entry.name == CHECKPOINT:
            yield _modified(pathlib.Path(entry.path))
        elif entry.name == CHECKPOINTS and _is_folder(entry):
            for checkpoint in filter(_is_folder, _entries(pathlib.Path(entry.path))):
                yield from (_modified(pathlib.Path(file.path)) for file in _entries(pathlib.Path(checkpoint.path)))


def _modified(path: pathlib.Path) -> float:
    """0 for a file that has vanished meanwhile."""
    try:
        return path.stat(follow_symlinks=False).st_mtime
    except OSError:
        return 0.0


# --- reading ----------------------------------------------------------------------------------------


def read(run: Run, *, most_grids: int = MOST_GRIDS) -> History:
    """What a run has logged so far. A file that has not changed since the last call is not read again.

    What cannot be read is left out and named in `notes`; that a file ends within a record is not, while the run is
    active. Where a run was resumed and repeats steps, its later self counts: what an earlier file holds from the first
    step of a later one on is left out.
    Raises ConfigError if TensorBoard is not installed, or for less than two grids.
    """
    errors.require(most_grids >= 2, "most_grids", most_grids, "2 or more")
    _event_class()
    curves: list[Curve] = []
    grids: list[Grid] = []
    notes: list[str] = []
    interventions: list[Intervention] = []
    for stage in run.stages:
        files = []
        for path in _event_files(_stage_folder(run, stage)):
            try:
                stat = path.stat(follow_symlinks=False)
                files.append(_file(stage, path, stat.st_size, stat.st_mtime_ns))
            except OSError as error:
                notes.append(f"{stage}/{path.name} cannot be read ({error.strerror or errors.first_line(error)}).")
        notes += [file.note for file in files if file.note and not run.active]
        own = _interventions(stage, _stage_folder(run, stage) / HEALTH)
        own_curves, own_grids = _merge(stage, files, own)
        curves += own_curves
        grids += own_grids
        interventions += own
    return History(run, tuple(curves), _spread(grids, most_grids), tuple(notes), tuple(interventions))


def _stage_folder(run: Run, stage: str) -> pathlib.Path:
    """A stage's folder bears its name; a run without stages of its own holds its event files itself."""
    child = run.path / stage
    return child if child.is_dir() else run.path


def _interventions(stage: str, path: pathlib.Path) -> list[Intervention]:
    """The file's lines, but those that are not whole. One that is told again, by a run that was killed and came to the
    same point, counts once."""
    own = _own(path)
    if own is None:
        return []
    try:
        with own.open("rb") as file:
            lines = file.read(_MOST_HEALTH_BYTES).splitlines()
    except OSError as error:
        _log.debug("%s is passed over: %s", path, error)
        return []
    found = {(each.attempt, each.to_images is None): each for line in lines if (each := _intervention(stage, line))}
    return sorted(found.values(), key=lambda each: each.time_s)


def _intervention(stage: str, line: bytes) -> Intervention | None:
    try:
        told = json.loads(line)
        to_images = told["to_images"]
        return Intervention(
            stage,
            float(told["time_s"]),
            int(told["images_seen"]),
            None if to_images is None else int(to_images),
            int(told["attempt"]),
            " ".join(str(finding["what"]) for finding in told["findings"] if finding["level"] == "bad"),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _leads_nowhere(images_seen: int, wall_s: float, interventions: Sequence[Intervention]) -> bool:
    """Whether the training went back to before it, later."""
    return any(
        each.to_images is not None and wall_s <= each.time_s and images_seen > each.to_images for each in interventions
    )


def _merge(
    stage: str, files: Sequence["_File"], interventions: Sequence[Intervention]
) -> tuple[list[Curve], list[Grid]]:
    """A stage's sessions as one. Of points at one step the one that was written last counts."""
    if interventions:
        files = [file.without(interventions) for file in files]
    points: list[_Point] = []
    grids: list[Grid] = []
    for file in sorted(files, key=lambda file: file.began_s):
        first = file.first_step()
        if first is not None:
            points = [point for point in points if point.images_seen < first] + file.points
            grids = [grid for grid in grids if grid.images_seen < first] + file.grids
    by_tag: dict[str, dict[int, _Point]] = collections.defaultdict(dict)
    for point in points:
        by_tag[point.tag][point.images_seen] = point
    curves = []
    for tag, by_step in by_tag.items():
        _, steps, values, wall_s = zip(*(by_step[step] for step in sorted(by_step)), strict=True)
        curves.append(Curve(stage, tag, steps, values, wall_s))
    return curves, sorted(grids, key=lambda grid: grid.images_seen)


def _spread(grids: Sequence[Grid], most: int) -> tuple[Grid, ...]:
    """At most so many, evenly spread; the first and the last are kept."""
    if len(grids) <= most:
        return tuple(grids)
    return tuple(grids[round(index * (len(grids) - 1) / (most - 1))] for index in range(most))


# --- one event file ---------------------------------------------------------------------------------


class _Point(NamedTuple):
    tag: str
    images_seen: int
    value: float
    wall_s: float


@dataclasses.dataclass(slots=True)
class _File:
    """What an event file holds, in the order in which it was written. note: what is not shown of it; "" for nothing."""

    points: list[_Point] = dataclasses.field(default_factory=list)
    grids: list[Grid] = dataclasses.field(default_factory=list)
    began_s: float = 0.0
    note: str = ""

    def without(self, interventions: Sequence[Intervention]) -> "_File":
        """Itself without what the training went back over."""
        return dataclasses.replace(
            self,
            points=[each for each in self.points if not _leads_nowhere(each.images_seen, each.wall_s, interventions)],
            grids=[each for each in self.grids if not _leads_nowhere(each.images_seen, each.wall_s, interventions)],
        )

    def first_step(self) -> int | None:
        """None for a file without points and grids."""
        steps = [point.images_seen for point in self.points] + [grid.images_seen for grid in self.grids]
        return min(steps, default=None)


@functools.lru_cache(maxsize=_KEPT_FILES)
def _file(stage: str, path: pathlib.Path, size: int, mtime_ns: int) -> _File:
    """An event file of so many bytes, up to the first record that is not whole. Raises OSError if it cannot be read.

    mtime_ns: when it was last changed; only tells the files of one name apart.
    """
    file, end = _File(), 0
    for event, start, length in _events(path, size):
        end = start + length + _TAIL_BYTES
        wall_s = event.wall_time
        file.began_s = file.began_s or wall_s
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                file.points.append(_Point(value.tag, event.step, value.simple_value, wall_s))
            elif kind == "image":
                file.grids.append(Grid(stage, value.tag, event.step, wall_s, path, start, length))
    if end < size:
        file.note = f"{stage}/{path.name} ends within a record, or is damaged, after {end:,} bytes; "
        file.note += "what is whole is shown."
    return file


def _events(path: pathlib.Path, size: int) -> Iterator[tuple[Any, int, int]]:
    """Each event with where its content starts and how long it is, in bytes, up to the first that is not whole."""
    parse, end = _event_class().FromString, 0
    with path.open("rb", buffering=1 << 20) as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            start, length = end + _HEAD.size, _HEAD.unpack(head)[0]
            end = start + length + _TAIL_BYTES
            if not length or end > size:  # a record is never empty, but what a crash leaves may be all zeros
                return
            try:
                event = parse(file.read(length))
            except _decode_error():
                return
            yield event, start, length
            file.seek(end)


_HEAD = struct.Struct("<Q4x")  # length of the content, and the checksum of that
_TAIL_BYTES = 4  # the content's checksum


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
