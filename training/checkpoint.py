"""Checkpoints on disk: each appears whole or not at all, is verified when it is read, and the last few are kept.

    <run>/<stage>/checkpoints/step-000001200/state.pt        what `torch.save` makes of the state
                                             manifest.json   step, size and hash of it, whether the training was healthy

One is written under a hidden name, flushed to the disk, then renamed: whoever kills the program or fills the disk
leaves the checkpoints that stood. Knows files alone: what a state holds, and what a step is, is the loop's affair.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import pickle
import platform
import shutil
from collections.abc import Mapping
from typing import IO, Any, BinaryIO, Self, cast

import torch

import diffusion_kd
from diffusion_kd import errors, files

_log = logging.getLogger(__name__)

FOLDER = "checkpoints"
"""The name that a stage gives the folder."""

STATE, MANIFEST = "state.pt", "manifest.json"

SCHEMA_VERSION = 1

_PREFIX = "step-"
_LOCK = ".lock"
_UNFINISHED, _REPLACED, _REMOVED = ".unfinished", ".replaced", ".removed"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointNotWritten(errors.TrainingError):
    """A checkpoint could not be written. Those that stood before still stand."""


class _Damaged(Exception):
    """What is wrong with a checkpoint, in a few words."""


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was read. state: as it was given to `save`. healthy: whether the training was, by then."""

    step: int
    state: dict[str, Any]
    healthy: bool
    path: pathlib.Path


class Checkpoints:
    """The checkpoints of a folder. Reading takes no lock and changes nothing; `open` is for the one who writes.

    keep: so many of the last ones stay, 1 or more; the newest healthy one stays as well.
    Raises ConfigError for less.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 2) -> None:
        errors.require(keep >= 1, "keep_checkpoints", keep, "1 or more")
        self.folder, self.keep = folder, keep
        self._lock: int | None = None  # file descriptor

    # --- writing ------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Make the folder, keep other processes from writing to it, and clear away what a killed one left half done.

        Does nothing if it is open. Raises ConfigError if another process writes there, or nothing can be written.
        """
        if self._lock is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = files.lock(self.folder / _LOCK)
                self._clear()
            except OSError as error:
                self.close()
                raise errors.ConfigError(
                    f"checkpoints cannot be written to {self.folder} ({_said(error)}); free its disk, or use --out"
                ) from None
        return self

    def close(self) -> None:
        """Let others write. The program's end does that too, however it comes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: Mapping[str, object], *, healthy: bool) -> pathlib.Path:
        """Write a checkpoint, then remove those that are not to be kept. Returns its folder. Opens if need be.

        step: 0 or more; a checkpoint of the same step gives way once the new one is written, and one of a later step
            is removed: the training has gone back, and that one leads nowhere.
        state: tensors, numbers, strings, lists, tuples and dicts.
        Raises CheckpointNotWritten if the disk is full or fails, having removed its half; TrainingError if the state
        could not be read back.
        """
        self.open()
        final = self._path(step)
        unfinished = self.folder / f".{final.name}{_UNFINISHED}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            _write(unfinished, step, dict(state), healthy)
            self._put(unfinished, final)
        except OSError as error:
            raise CheckpointNotWritten(self._not_written(step, error)) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # gone already if all went well
        self._prune(step)
        return final

    def confirm(self, step: int) -> None:
        """Mark what stands of this step and before as healthy: a report since then found nothing wrong."""
        self.open()
        for earlier in (found for found in self.steps() if found <= step):
            manifest = _sound(self._path(earlier))
            if manifest is not None and not manifest["healthy"]:
                try:
                    _mark_healthy(self._path(earlier))
                except OSError as error:
                    _log.warning("%s could not be marked as healthy (%s)", self._path(earlier), _said(error))

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the training goes back to this one, and they lead nowhere."""
        self.open()
        for later in (found for found in self.steps() if found > step):
            self._remove(self._path(later))

    def _put(self, new: pathlib.Path, final: pathlib.Path) -> None:
        replaced = self.folder / f".{final.name}{_REPLACED}"
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        try:
            new.rename(final)
        except BaseException:
            if replaced.exists():
                replaced.rename(final)
            raise
        files.flush(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self, saved: int) -> None:
        """Keep the last ones up to the one just saved, and the newest healthy one."""
        sound = {step: manifest for step in self.steps() if step <= saved and (manifest := _sound(self._path(step)))}
        kept = set(sorted(sound)[-self.keep :])
        healthy = [step for step, manifest in sound.items() if manifest["healthy"]]
        kept |= set(sorted(healthy)[-1:])
        for step in set(self.steps()) - kept:
            self._remove(self._path(step))

    def _remove(self, path: pathlib.Path) -> None:
        """By a rename first, so that none is ever half there. One that cannot be removed stays, and is named."""
        removed = self.folder / f".{path.name}{_REMOVED}"
        try:
            shutil.rmtree(removed, ignore_errors=True)
            path.rename(removed)
            shutil.rmtree(removed)
        except OSError as error:
            _log.warning("%s could not be removed (%s)", path, _said(error))

    def _clear(self) -> None:
        """What a killed process left. One that was about to be replaced by one that then did not come stands again."""
        for left in self.folder.glob(f".{_PREFIX}*"):
            original = self.folder / left.name.removeprefix(".").removesuffix(_REPLACED)
            if left.suffix == _REPLACED and not original.exists():
                left.rename(original)
            else:
                shutil.rmtree(left, ignore_errors=True)

    def _not_written(self, step: int, error: OSError) -> str:
        steps = self.steps()
        stands = f"that of step {steps[-1]} still stands" if steps else "none stands yet"
        do = "look at the disk"
        if error.errno in _FULL:
            do = f"free space, or keep fewer (keep_checkpoints is {self.keep})"
        return f"the checkpoint of step {step} could not be written to {self.folder} ({_said(error)}); {stands}; {do}"

    # --- reading ------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The steps whose checkpoints stand, ascending; whether they can be read is not looked at."""
        names = [path.name for path in self.folder.glob(f"{_PREFIX}*") if path.is_dir()]
        numbers = [int(number) for name in names if (number := name.removeprefix(_PREFIX)).isdecimal()]
        return sorted(number for number in numbers if folder_name(number) in names)

    def newest_step(self) -> int | None:
        """The last step whose checkpoint is whole, by its size; its hash is not looked at. None if there is none."""
        return next((step for step in reversed(self.steps()) if _sound(self._path(step))), None)

    def newest(self, *, healthy_only: bool = False) -> Checkpoint | None:
        """The last checkpoint that is whole, verified against its hash. None if none was ever written.

        A damaged one is named in a warning, and the one before is taken. The state's tensors are mapped from the file,
        which a change of theirs does not reach; copy them, as `load_state_dict` mostly does, for while one is held the
        file's space stays taken.
        healthy_only: pass over those that were saved while the training was not healthy.
        Raises ConfigError if some stand and none can be read, or a newer version of this program wrote one.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                manifest = _manifest(self._path(step))
                if manifest["healthy"] or not healthy_only:
                    return self._read(step, manifest, verify=True)
            except _Damaged as error:
                damaged.append(f"{self._path(step).name}: {error}")
                _log.warning("the checkpoint %s is passed over: %s", self._path(step), error)
        if damaged:
            raise errors.ConfigError(
                f"no checkpoint in {self.folder} can be read ({'; '.join(damaged)}); put a copy of one back, remove "
                "the folder to begin anew, or use --out"
            )
        return None

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of this step, its hash not looked at: for a process whose fellow has called `newest`.

        Raises ConfigError if it is not there or cannot be read.
        """
        try:
            return self._read(step, _manifest(self._path(step)), verify=False)
        except _Damaged as error:
            standing = ", ".join(map(str, self.steps())) or "none"
            raise errors.ConfigError(
                f"the checkpoint of step {step} in {self.folder} cannot be read ({error}); those of steps {standing} "
                "stand"
            ) from None

    def _read(self, step: int, manifest: dict[str, Any], *, verify: bool) -> Checkpoint:
        path = self._path(step)
        if manifest["step"] != step:
            raise _Damaged(f"its {MANIFEST} is of step {manifest['step']}")
        _check_size(path, manifest)
        if verify:
            _check_hash(path, manifest)
        return Checkpoint(step, _load(path / STATE), manifest["healthy"], path)

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / folder_name(step)


def folder_name(step: int) -> str:
    """Of a checkpoint's folder."""
    return f"{_PREFIX}{step:09d}"


# --- one folder -------------------------------------------------------------------------------------


class _Hashed:
    """A file for `torch.save`, which writes from front to back, that hashes what passes: 40 GB are not read again.

    torch.save loses an error that a write raises. The first one is kept in `failure`, and what follows is swallowed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.size = 0
        self.failure: BaseException | None = None

    def write(self, data: Any) -> int:
        """data: anything with a buffer. Returns its length in bytes."""
        whole = memoryview(data).cast("B")
        if self.failure is None:
            try:
                _write_all(self._file, whole)
                self._hash.update(whole)
                self.size += len(whole)
            except BaseException as error:  # noqa: BLE001 - raised again by `_write_state`
                self.failure = error
        return len(whole)

    def flush(self) -> None:
        """Nothing waits here; the file is not buffered."""

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _write_all(file: BinaryIO, data: memoryview) -> None:
    """An unbuffered file may take a part: at most 2 GiB on Linux, and what still fits where the disk fills up."""
    while data:
        data = data[file.write(data) :]


def _write(folder: pathlib.Path, step: int, state: dict[str, Any], healthy: bool) -> None:
    """Both files, on the disk when this returns. Raises OSError, TrainingError for a state that cannot be read back."""
    size, sha256 = _write_state(folder / STATE, state)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "size_bytes": size,
        "sha256": sha256,
        "healthy": healthy,
        "versions": {
            "diffusion_kd": diffusion_kd.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    (folder / MANIFEST).write_text(_as_text(manifest), encoding="utf-8")
    files.flush(folder / MANIFEST)
    files.flush(folder)


def _as_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2)


def _mark_healthy(folder: pathlib.Path) -> None:
    """In its manifest, the old one of which stands until the new one is on the disk."""
    files.write(folder / MANIFEST, _as_text(json.loads((folder / MANIFEST).read_bytes()) | {"healthy": True}))
    files.flush(folder)


def _write_state(path: pathlib.Path, state: dict[str, Any]) -> tuple[int, str]:
    """Its size in bytes and its hash."""
    with path.open("wb", buffering=0) as file:
        hashed = _Hashed(file)
        torch.save(state, cast(IO[bytes], hashed))
        if hashed.failure is not None:
            raise hashed.failure
        os.fsync(file.fileno())
    try:
        _load(path)  # maps the tensors and does not read them
    except _Damaged as error:
        raise errors.TrainingError(
            f"the state could not be read back ({error}); it may hold tensors, numbers, strings, lists, tuples and "
            "dicts alone"
        ) from None
    return hashed.size, hashed.sha256


def _sound(path: pathlib.Path) -> dict[str, Any] | None:
    """The manifest, if the state is as long as it says."""
    try:
        manifest = _manifest(path)
        _check_size(path, manifest)
    except _Damaged:
        return None
    return manifest


def _manifest(path: pathlib.Path) -> dict[str, Any]:
    """Raises ConfigError if a newer version of this program wrote it."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        version = int(manifest["schema_version"])
        if version <= SCHEMA_VERSION:
            return {name: kind(manifest[name]) for name, kind in _FIELDS.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _Damaged(f"its {MANIFEST} cannot be read ({_said(error)})") from None
    raise errors.ConfigError(
        f"{path} was written by a newer version of this program (schema {version}, known is {SCHEMA_VERSION}); go on "
        "with that version, or begin anew with --out"
    )


_FIELDS = {"step": int, "size_bytes": int, "sha256": str, "healthy": bool}


def _check_size(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    try:
        size = (path / STATE).stat().st_size
    except OSError as error:
        raise _Damaged(f"its {STATE} cannot be read ({_said(error)})") from None
    if size != manifest["size_bytes"]:
        raise _Damaged(f"its {STATE} has {size:,} bytes and should have {manifest['size_bytes']:,}")


def _check_hash(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    try:
        with (path / STATE).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _Damaged(f"its {STATE} cannot be read ({_said(error)})") from None
    if found != manifest["sha256"]:
        raise _Damaged(f"its {STATE} has changed since it was written (its SHA-256 is another)")


def _load(path: pathlib.Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise _Damaged(errors.first_line(error)) from None
    return state


def _said(error: Exception) -> str:
    """The reason alone; the path stands beside it."""
    return (error.strerror if isinstance(error, OSError) else None) or errors.first_line(error)
