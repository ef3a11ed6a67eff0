"""Where a command may write, and what it leaves where it fails."""

import os
import pathlib

import pytest

from diffusion_kd import errors, files


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path: pathlib.Path) -> None:
    files.check_folder(tmp_path / "a" / "b")
    files.check_folder(tmp_path)
    assert not (tmp_path / "a").exists()


def test_a_file_in_the_way_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(errors.ConfigError, match="file is a file"):
            files.check_folder(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(errors.ConfigError, match="no permission"):
        files.check_folder(tmp_path / "run")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file.json"
    for text in ("old", "new"):
        with files.replacing(path) as unfinished:
            unfinished.write_text(text)

    def fail() -> None:
        with files.replacing(path) as unfinished:
            unfinished.write_text("ha")
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_a_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, standing = tmp_path / "file.json", []
    monkeypatch.setattr(files.os, "fsync", lambda _: standing.append(path.exists()))
    with files.replacing(path) as unfinished:
        unfinished.write_text("new")
    assert standing == [False] and path.exists()


def test_a_folders_files_are_on_the_disk_before_it_takes_a_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, folder = list[tuple[str, bool]](), tmp_path / "folder"
    monkeypatch.setattr(files, "flush", lambda path: flushed.append((path.name, folder.exists())))
    with files.written_whole(folder) as unfinished:
        (unfinished / "deeper").mkdir(parents=True)
        (unfinished / "deeper" / "a.json").write_text("{}")
        (unfinished / "b.json").write_text("{}")
    assert sorted(flushed) == [("a.json", False), ("b.json", False)] and folder.is_dir()


def test_what_a_killed_process_left_is_swept(tmp_path: pathlib.Path) -> None:
    files.write(tmp_path / "kept.json", "{}")
    (tmp_path / ".kept.json.7.unfinished").write_text("{")
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
