"""Where a command may write."""

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
