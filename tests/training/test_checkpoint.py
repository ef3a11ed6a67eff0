"""Checkpoints: whole or not there, whoever kills the program, fills the disk or damages a file."""

import collections
import errno
import json
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_kd import errors, files
from training import checkpoint
from training.checkpoint import Checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def _state(step: int, numbers: int = 100) -> dict[str, Any]:
    """What a loop's state looks like; its numbers are the step's own."""
    drawn = torch.Generator().manual_seed(step)
    weights = torch.randn(numbers, generator=drawn)
    return {
        "student": {"weight": weights, "half": weights.bfloat16(), "empty": torch.zeros(0)},
        "optimizer": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "random": drawn.get_state(),
        "elapsed_s": step * 0.1,
        "curves": {"distillation": [(800, 0.5), (1600, float("inf"))]},
        "note": None,
    }


def _same(found: Any, expected: Any) -> bool:
    """Bit for bit."""
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[key], expected[key]) for key in expected)
    return bool(found == expected)


def _save(checkpoints: Checkpoints, *steps: int, healthy: bool = True) -> None:
    """And let others write."""
    with checkpoints:
        for step in steps:
            checkpoints.save(step, _state(step), healthy=healthy)


def _newest(folder: pathlib.Path, *, healthy_only: bool = False) -> int | None:
    """The step of the newest, whose state is asserted to be that step's."""
    found = Checkpoints(folder).newest(healthy_only=healthy_only)
    assert found is None or (_same(found.state, _state(found.step)))
    return found.step if found else None


# --- writing and reading ----------------------------------------------------------------------------


def test_what_was_saved_is_read_bit_for_bit(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.newest() is None and checkpoints.steps() == []
        path = checkpoints.save(1200, _state(1200), healthy=False)
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.path, found.healthy) == (1200, path, False)
    assert path == tmp_path / "run" / "checkpoints" / "step-000001200"
    assert _same(found.state, _state(1200))
    assert _same(checkpoints.read(1200).state, _state(1200))


def test_the_manifest_is_true_of_the_file(tmp_path: pathlib.Path) -> None:
    path = Checkpoints(tmp_path).save(7, _state(7), healthy=True)
    manifest = json.loads((path / "manifest.json").read_text())
    hashed = subprocess.run(["sha256sum", path / "state.pt"], check=True, capture_output=True, text=True).stdout
    assert manifest.pop("sha256") == hashed.split()[0]
    assert manifest.pop("versions").keys() == {"diffusion_kd", "torch", "python"}
    size = (path / "state.pt").stat().st_size
    assert manifest == {"schema_version": 1, "step": 7, "size_bytes": size, "healthy": True}
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.pt"]


def test_a_state_that_is_changed_in_memory_does_not_change_the_file(tmp_path: pathlib.Path) -> None:
    _save(Checkpoints(tmp_path), 1)
    found = Checkpoints(tmp_path).newest()
    assert found is not None
    found.state["student"]["weight"].zero_()
    assert _newest(tmp_path) == 1


def test_the_last_few_are_kept_and_the_newest_healthy_one(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    _save(checkpoints, 1, 2, 3)
    assert checkpoints.steps() == [2, 3]
    _save(checkpoints, 4, 5, 6, healthy=False)
    assert checkpoints.steps() == [3, 5, 6]
    assert (_newest(tmp_path), _newest(tmp_path, healthy_only=True)) == (6, 3)
    _save(checkpoints, 7)
    assert checkpoints.steps() == [6, 7]
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]


def test_what_is_confirmed_later_is_healthy_and_as_it_was(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    _save(checkpoints, 1, 2, 3, healthy=False)
    before = json.loads((tmp_path / "step-000000002" / checkpoint.MANIFEST).read_text())
    checkpoints.confirm(2)
    assert (_newest(tmp_path), _newest(tmp_path, healthy_only=True)) == (3, 2)
    after = json.loads((tmp_path / "step-000000002" / checkpoint.MANIFEST).read_text())
    assert after == before | {"healthy": True}
    assert sorted(path.name for path in (tmp_path / "step-000000002").iterdir()) == ["manifest.json", "state.pt"]


def test_none_that_is_healthy_is_none(tmp_path: pathlib.Path) -> None:
    _save(Checkpoints(tmp_path), 1, 2, healthy=False)
    assert (_newest(tmp_path), _newest(tmp_path, healthy_only=True)) == (2, None)


def test_going_back_leaves_nothing_that_leads_nowhere(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=9)
    _save(checkpoints, 1, 2, 3, 4)
    checkpoints.discard_after(2)
    assert checkpoints.steps() == [1, 2]
    _save(checkpoints, 5, 6)
    _save(checkpoints, 3)
    assert checkpoints.steps() == [1, 2, 3]


def test_a_step_that_is_saved_again_takes_the_place_of_the_first(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": 1}, healthy=False)
    _save(checkpoints, 1)
    assert (checkpoints.steps(), _newest(tmp_path, healthy_only=True)) == ([1], 1)


def test_what_could_not_be_read_back_is_not_put_in_place(tmp_path: pathlib.Path) -> None:
    _save(Checkpoints(tmp_path), 1)
    with pytest.raises(errors.TrainingError, match="could not be read back") as raised:
        Checkpoints(tmp_path).save(2, {"path": pathlib.Path("here")}, healthy=True)
    assert not isinstance(raised.value, checkpoint.CheckpointNotWritten)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["step-000000001"]


def test_none_is_kept_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.ConfigError, match="keep_checkpoints is 0"):
        Checkpoints(tmp_path, keep=0)


# --- damage -----------------------------------------------------------------------------------------


def _cut(path: pathlib.Path) -> None:
    os.truncate(path / "state.pt", (path / "state.pt").stat().st_size - 1)


def _flip(path: pathlib.Path) -> None:
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def _lose(path: pathlib.Path) -> None:
    (path / "state.pt").unlink()


def _lose_manifest(path: pathlib.Path) -> None:
    (path / "manifest.json").unlink()


def _cut_manifest(path: pathlib.Path) -> None:
    os.truncate(path / "manifest.json", 40)


def _swap(path: pathlib.Path) -> None:
    """The one before, under this one's name."""
    before = path.with_name("step-000000001")
    for name in ("state.pt", "manifest.json"):
        (path / name).write_bytes((before / name).read_bytes())


DAMAGES: list[tuple[Callable[[pathlib.Path], None], str]] = [
    (_cut, "bytes and should have"),
    (_flip, "has changed since it was written"),
    (_lose, "No such file"),
    (_lose_manifest, "manifest.json cannot be read"),
    (_cut_manifest, "manifest.json cannot be read"),
    (_swap, "its manifest.json is of step 1"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_taken(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, damage: Callable[[pathlib.Path], None], said: str
) -> None:
    _save(Checkpoints(tmp_path), 1, 2)
    damage(tmp_path / "step-000000002")
    with caplog.at_level(logging.WARNING):
        assert _newest(tmp_path) == 1
    assert "step-000000002 is passed over" in caplog.text and said in caplog.text
    with pytest.raises(errors.ConfigError, match=r"the checkpoint of step 3 .* those of steps 1, 2 stand"):
        Checkpoints(tmp_path).read(3)


def test_a_damaged_one_never_pushes_a_whole_one_out(tmp_path: pathlib.Path) -> None:
    """Resumed from 4 after 5 was damaged: what is saved at 5 and before counts."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    _save(checkpoints, 3)
    _save(Checkpoints(tmp_path, keep=2), 9)
    _cut(tmp_path / "step-000000009")
    _save(checkpoints, 4)
    assert (checkpoints.steps(), _newest(tmp_path)) == ([4], 4)


def test_every_byte_counts(tmp_path: pathlib.Path) -> None:
    """Wherever a bit has flipped, it is seen."""
    _save(Checkpoints(tmp_path), 1)
    file = tmp_path / "step-000000001" / "state.pt"
    whole = file.read_bytes()
    for position in np.random.default_rng(0).integers(len(whole), size=20):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(errors.ConfigError, match=r"no checkpoint .* can be read"):
            Checkpoints(tmp_path).newest()


def test_where_none_can_be_read_nothing_begins_anew_in_silence(tmp_path: pathlib.Path) -> None:
    _save(Checkpoints(tmp_path), 1, 2)
    for step in (1, 2):
        _cut(tmp_path / f"step-00000000{step}")
    for healthy_only in (False, True):
        with pytest.raises(errors.ConfigError, match=r"step-000000002: its state\.pt has .* step-000000001: .* --out"):
            Checkpoints(tmp_path).newest(healthy_only=healthy_only)


def test_a_newer_versions_is_not_passed_over(tmp_path: pathlib.Path) -> None:
    _save(Checkpoints(tmp_path), 1, 2)
    manifest = tmp_path / "step-000000002" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 2}))
    with pytest.raises(errors.ConfigError, match=r"newer version of this program \(schema 2"):
        Checkpoints(tmp_path).newest()


def test_what_is_not_ours_is_left_alone(tmp_path: pathlib.Path) -> None:
    for name in ("step-12", "step-abc", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000000005").write_text("a file")
    _save(Checkpoints(tmp_path), 1)
    assert Checkpoints(tmp_path).steps() == [1]
    assert (tmp_path / "step-12").is_dir() and (tmp_path / "notes").is_dir()


# --- a full disk ------------------------------------------------------------------------------------


def _fork(work: Callable[[], None]) -> int:
    """Do it in a process of its own; 0, or the signal that killed it, negative."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:  # noqa: BLE001 - the parent sees the exit code
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_file_that_may_not_grow_leaves_what_stood(tmp_path: pathlib.Path) -> None:
    """The kernel itself refuses, in the middle of a write: RLIMIT_FSIZE."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(checkpoint.CheckpointNotWritten, match=r"File too large.*step 1 still stands; free space"):
            Checkpoints(tmp_path).save(2, _state(2, 1_000_000), healthy=True)

    _save(Checkpoints(tmp_path), 1)
    assert _fork(work) == 0
    assert _newest(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-000000001"]


@pytest.mark.parametrize("room", [0, 1, 200, 1000, 5000])
def test_a_full_disk_leaves_what_stood(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    left = room

    def write_all(file: Any, data: memoryview) -> None:
        nonlocal left
        file.write(data[:left])
        if len(data) > left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)

    checkpoints = Checkpoints(tmp_path)
    _save(checkpoints, 1)
    with monkeypatch.context() as full:
        full.setattr(checkpoint, "_write_all", write_all)
        with pytest.raises(checkpoint.CheckpointNotWritten, match=r"No space left.*keep_checkpoints is 2"):
            _save(checkpoints, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-000000001"]
    assert _newest(tmp_path) == 1
    _save(checkpoints, 2)
    assert _newest(tmp_path) == 2


@pytest.mark.parametrize("call", range(4))
def test_a_disk_that_fails_to_flush_leaves_what_stood(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The state's, the manifest's and the new folder's flush fail; of the parent's the new one stands already."""
    calls = iter(range(4))

    def fsync(_: int) -> None:
        if next(calls) == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    _save(Checkpoints(tmp_path), 1)
    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", fsync)
        with pytest.raises(checkpoint.CheckpointNotWritten, match=r"Input/output error.*look at the disk"):
            _save(Checkpoints(tmp_path), 2)
    assert _newest(tmp_path) == (2 if call == 3 else 1)


def test_everything_is_flushed_before_it_is_renamed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    fsync, rename = os.fsync, pathlib.Path.rename

    def noted_fsync(opened: int) -> None:
        done.append(("fsync", pathlib.Path(f"/proc/self/fd/{opened}").readlink().relative_to(tmp_path).as_posix()))
        fsync(opened)

    def noted_rename(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        done.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(pathlib.Path, "rename", noted_rename)
    _save(Checkpoints(tmp_path), 1)
    unfinished = ".step-000000001.unfinished"
    assert done == [
        ("fsync", f"{unfinished}/state.pt"),
        ("fsync", f"{unfinished}/manifest.json"),
        ("fsync", unfinished),
        ("rename", "step-000000001"),
        ("fsync", "."),
    ]


def test_an_interrupted_write_is_no_lost_interrupt(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C within torch.save's callback comes out as itself, not as torch's RuntimeError."""

    def write_all(*_: object) -> None:
        raise KeyboardInterrupt

    _save(Checkpoints(tmp_path), 1)
    monkeypatch.setattr(checkpoint, "_write_all", write_all)
    with pytest.raises(KeyboardInterrupt):
        _save(Checkpoints(tmp_path), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-000000001"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ConfigError, match="checkpoints cannot be written to"):
        Checkpoints(tmp_path / "file" / "checkpoints").open()


# --- kill -9 ----------------------------------------------------------------------------------------


def _killed_at(line: int, work: Callable[[], object]) -> bool:
    """Do it in a process that dies before its n-th line of `training.checkpoint`. False if it has fewer.

    Of a line that runs again and again, as those that write the file's pieces, the first two runs count.
    """
    left = line
    runs: collections.Counter[int] = collections.Counter()

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        runs[frame.f_lineno] += event == "line"
        if event == "line" and runs[frame.f_lineno] <= 2:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced() -> None:
        sys.settrace(trace)
        work()

    ended = _fork(traced)
    assert ended in (0, -signal.SIGKILL)
    return ended != 0


@pytest.mark.parametrize(
    ("saved", "healthy"), [(3, True), (3, False), (2, True)], ids=["a new one", "a sick one", "the same step again"]
)
def test_killed_before_any_line_nothing_is_lost(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, saved: int, healthy: bool
) -> None:
    """Whole or not there, bit for bit, and the folder serves the next: at every line of a save and its pruning."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a kill does not empty the kernel's cache
    _save(Checkpoints(tmp_path / "before"), 1, 2)
    seen, line, killed = set(), 0, True
    while killed:
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(line))
        work = Checkpoints(folder)
        killed = _killed_at(line, lambda work=work: _save(work, saved, healthy=healthy))  # type: ignore[misc]
        with Checkpoints(folder) as after:
            newest = _newest(folder)
            assert newest in (2, saved)
            assert _newest(folder, healthy_only=True) == (newest if healthy else 2)
            assert not [path for path in folder.glob(".*") if path.name != ".lock"]
        seen.add(newest)
        if line % 10 == 0:
            _save(after, 4)
            assert (_newest(folder), len(after.steps())) == (4, 2)
        line += 1
    assert seen == {2, saved}
    assert line > 100


def test_killed_at_random_times_nothing_is_lost(tmp_path: pathlib.Path) -> None:
    """20 times; each goes on where the last was killed. What was told to be written, or the one under way, stands."""
    drawn = np.random.default_rng(0)
    last = 0
    for _ in range(20):
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            checkpoints = Checkpoints(tmp_path)
            for step in range(last + 1, 100_000):
                _save(checkpoints, step)
                os.write(writes, step.to_bytes(4, "little"))
        os.close(writes)
        told = os.read(reads, 4)  # the first one stands, however slow the machine is
        time.sleep(drawn.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reads, "rb") as pipe:  # noqa: PTH123 - a descriptor
            told += pipe.read()
        completed = int.from_bytes(told[-4:], "little")
        last = _newest(tmp_path) or 0
        assert last in (completed, completed + 1)
    assert last >= 20


# --- one writer -------------------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_kept_apart(tmp_path: pathlib.Path) -> None:
    def work() -> None:
        with pytest.raises(errors.ConfigError, match=rf"process {os.getppid()} on .* writes to .*--out"):
            Checkpoints(tmp_path).open()
        assert _newest(tmp_path) == 1  # reading needs no lock

    _save(Checkpoints(tmp_path), 1)
    with Checkpoints(tmp_path):
        assert _fork(work) == 0
    assert _fork(lambda: _save(Checkpoints(tmp_path), 2)) == 0
    assert _newest(tmp_path) == 2


def test_a_workers_hold_on_the_folder_ends_with_its_parent(tmp_path: pathlib.Path) -> None:
    """A forked data worker outlives the process that was killed; the next run need not wait for it."""
    reads, writes = os.pipe()

    def work() -> None:
        checkpoints = Checkpoints(tmp_path).open()
        checkpoints.save(1, _state(1), healthy=True)
        worker = os.fork()
        if not worker:
            time.sleep(30)
            os._exit(0)
        os.write(writes, worker.to_bytes(4, "little"))
        os.kill(os.getpid(), signal.SIGKILL)

    assert _fork(work) == -signal.SIGKILL
    worker = int.from_bytes(os.read(reads, 4), "little")
    try:
        _save(Checkpoints(tmp_path), 2)
        assert _newest(tmp_path) == 2
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reads)
        os.close(writes)


def test_where_files_cannot_be_locked_it_is_said(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    with caplog.at_level(logging.WARNING):
        _save(Checkpoints(tmp_path), 1)
    assert "cannot be locked (No locks available)" in caplog.text
