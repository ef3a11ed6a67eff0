"""Where a command may write, and files and folders that appear whole or not at all."""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Iterator

from diffusion_kd import errors

_log = logging.getLogger(__name__)


def check_folder(folder: pathlib.Path) -> None:
    """Raise ConfigError where no folder can be made or written to; makes nothing. For the first line of a command."""
    standing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not standing.is_dir():
        raise errors.ConfigError(f"nothing can be written to {folder}: {standing} is a file; give a folder")
    if not os.access(standing, os.W_OK | os.X_OK):
        raise errors.ConfigError(f"nothing can be written to {folder}: no permission to write in {standing}")


def check_replaceable(folder: pathlib.Path, mark: str) -> None:
    """Raise ConfigError unless a folder is missing, empty, or one of ours, which holds the file `mark`.

    For what `written_whole` would replace: nobody's pictures or checkpoints may vanish for a slip of the pen.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise errors.ConfigError(f"{folder} holds something else (it has no {mark}); give an empty or a new folder")


@contextlib.contextmanager
def written_whole(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write a folder at, which then takes the place of `folder`; a failure leaves what stood there.

    Its files are flushed to the disk before it is renamed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        unfinished = pathlib.Path(temporary) / folder.name
        yield unfinished
        for path in filter(pathlib.Path.is_file, unfinished.rglob("*")):
            if path.suffix == ".safetensors":
                path.chmod(0o644)
            flush(path)
        _put(unfinished, folder)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside `path` to write a file at, which then takes its place; a failure leaves what stood there.

    Flushed to the disk before it is renamed, so that not even a power cut leaves half a file under the name. Several
    processes may write the same name; the last one stays.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        flush(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write(path: pathlib.Path, content: str | bytes) -> None:
    """`replacing`, with this content; text is UTF-8."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def sweep(folder: pathlib.Path) -> None:
    """Remove what killed processes left half written by `replacing`; nobody must be writing there."""
    for left in folder.glob(".*.unfinished"):
        left.unlink(missing_ok=True)


def flush(path: pathlib.Path) -> None:
    """Put a file on the disk, or of a folder its names, which flushing the files does not."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def lock(path: pathlib.Path) -> int:
    """Lock a file, which is made, until the descriptor that is returned is closed, or the process ends.

    For the one who writes to the folder that the file is in. Raises ConfigError if another process holds it.
    A record lock, not `flock`: workers that were forked do not hold on to it when their parent is killed.
    """
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(opened, 200, 0).decode(errors="replace").strip() or "another process"
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(opened)
            raise errors.ConfigError(
                f"{holder} writes to {path.parent}; let it end, or give another folder with --out"
            ) from None
        _log.warning("%s cannot be locked (%s); see to it that no other run writes there", path, error.strerror)
    with contextlib.suppress(OSError):  # the name is a courtesy, and the disk may be full
        os.ftruncate(opened, 0)
        os.pwrite(opened, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return opened


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Make a folder and keep other processes from writing to it. Raises ConfigError as `lock` does, or if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = lock(folder / ".lock")
    except OSError as error:
        raise errors.ConfigError(
            f"nothing can be written to {folder} ({error.strerror}); give another folder"
        ) from None
    try:
        yield
    finally:
        os.close(opened)


def _put(new: pathlib.Path, folder: pathlib.Path) -> None:
    """Rename `new` to `folder`. The old one stays, under a hidden name, until the new one stands."""
    if not folder.exists():
        new.rename(folder)
        return
    old = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old.")) / folder.name
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        old.parent.rmdir()
        raise
    shutil.rmtree(old.parent)
