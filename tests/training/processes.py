"""Programs in processes of their own, as a user starts them; one thread each."""

import os
import subprocess
import sys

PATIENCE_S = 240.0


def run(*program: str, processes: int = 1, patience_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    """`python PROGRAM...`, or so many of it by `torchrun`. Raises TimeoutExpired if it hangs.

    program: a script, or -m and a module, and its arguments.
    """
    together = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [sys.executable, *(together if processes > 1 else []), *program]
    with subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        try:
            out, err = started.communicate(timeout=patience_s)
        except subprocess.TimeoutExpired:
            started.terminate()  # torchrun hands it on to its workers, which would outlive its being killed
            started.communicate(timeout=60)
            raise
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def succeed(*program: str, processes: int = 1, patience_s: float = PATIENCE_S) -> str:
    """The same, where it must end well. Returns what it said."""
    finished = run(*program, processes=processes, patience_s=patience_s)
    assert finished.returncode == 0, finished.stderr[-9000:]  # torchrun has much to say after the cause
    return finished.stdout
