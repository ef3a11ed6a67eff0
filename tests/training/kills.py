"""Run one distillation again and again, killed each time, until it ends: for `test_resume`.

`python kills.py SEED KILLS ARGUMENTS...`. Everything is imported once, and each attempt is a fork: a
process of its own, killed from outside at a random time, or by itself at a random flush to the disk, in the middle of
writing a checkpoint. Prints a line of JSON with what happened.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time

from training import distill


def _die_at_flush(number: int) -> None:
    flush, left = os.fsync, [number]

    def deadly(file: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(file)

    os.fsync = deadly


def attempt(arguments: list[str], *, after_s: float | None, at_flush: int | None) -> int:
    """Start once; returns the exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        if at_flush is not None:
            _die_at_flush(at_flush)
        distill.main(arguments)
        os._exit(0)
    until = None if after_s is None else time.monotonic() + after_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            until = None
        time.sleep(0.005)


def main() -> None:
    seed, kills, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    rng = random.Random(seed)
    checkpoints = pathlib.Path(arguments[arguments.index("--out") + 1]) / "training" / "checkpoints"
    codes, halves, steps = [], 0, []
    while len(codes) < 10 * kills + 10:
        killed = sum(code == -signal.SIGKILL for code in codes)
        by_time = rng.random() < 0.5
        after_s = rng.uniform(0.5, 3.0) if killed < kills and by_time else None
        at_flush = rng.randint(1, 25) if killed < kills and not by_time else None
        codes.append(attempt(arguments, after_s=after_s, at_flush=at_flush))
        halves += any(checkpoints.glob(".*unfinished"))
        steps.append(max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0))
        if codes[-1] != -signal.SIGKILL:
            break
    sys.stdout.write(json.dumps({"codes": codes, "amid_a_write": halves, "steps": steps}) + "\n")


if __name__ == "__main__":
    main()
