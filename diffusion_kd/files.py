"""Where a command may write, and files and folders that appear whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from diffusion_kd import errors


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
    """A path to write a folder at, which then takes the place of `folder`; a failure leaves what stood there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        unfinished = pathlib.Path(temporary) / folder.name
        yield unfinished
        for weights in unfinished.rglob("*.safetensors"):
            weights.chmod(0o644)
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
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


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
