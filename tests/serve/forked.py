"""Run by a process that `processes` has forked: `python -m serve` with the arguments and settings of FORKED."""

import os
import signal
import sys

from diffusion_kd import errors
from serve import __main__ as entry


def run(arguments: list[str], environment: dict[str, str], log: str) -> None:
    for stream, path in ((0, os.devnull), (1, log), (2, log)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), stream)
    # As of a fresh interpreter; multiprocessing has set up its own.
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    sys.argv = ["serve", *arguments]
    errors.run(entry.main)


if __name__ == "forked":
    run(**globals()["FORKED"])
