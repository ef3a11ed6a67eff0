"""Every error that the project raises on purpose.

DiffusionKDError
├── ConfigError            a setting is unknown, malformed or out of range
├── DataError              images, captions or prompts that cannot be used
├── ModelError             a model folder or its weights cannot be used
│   └── ArtifactError      an exported student cannot be written or read
├── TrainingError          a training that cannot go on
├── ComparisonError        two numbers that were not measured alike
├── UnknownShapeError      a word outside the shapes domain
└── (of the service)       serve.errors, serve.engine.errors, serve.store.errors draw their own branches

Messages say what was wrong, what was given and what would do. Command lines print the message alone and
exit with code 2 (a launcher of several processes adds its own report and code); a traceback means a defect of ours.
"""

import errno
import sys
from collections.abc import Callable

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiffusionKDError(Exception):
    """Root of all deliberate errors."""


class ConfigError(DiffusionKDError):
    """A setting is unknown, malformed or out of range."""


class DataError(DiffusionKDError):
    """Images, captions or prompts that cannot be used."""


class ModelError(DiffusionKDError):
    """A model folder or its weights cannot be used."""


class ArtifactError(ModelError):
    """An exported student cannot be written or read."""


class TrainingError(DiffusionKDError):
    """A training that cannot go on."""


class ComparisonError(DiffusionKDError):
    """Two numbers that were not measured alike."""


class UnknownShapeError(DiffusionKDError):
    """A word outside the shapes domain."""


def require(fits: bool, key: str, given: object, wanted: str) -> None:
    """Raise ConfigError unless a setting fits."""
    if not fits:
        raise ConfigError(f"{key} is {given!r}; it must be {wanted}")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to quote in one of ours; its class if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def run(main: Callable[[], object]) -> None:
    """Run a command line: a deliberate error or a full disk is a sentence on stderr and exit code 2, Ctrl-C 130."""
    try:
        main()
    except DiffusionKDError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.stderr.write(f"error: {error.strerror}{where}; free space, then run the same command again\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
