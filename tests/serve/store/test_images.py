"""Pictures as files."""

import os
import pathlib
import urllib.request
from typing import Any

import pytest

from diffusion_kd import errors
from serve import store as store_module


def test_what_was_put_is_got_until_it_is_deleted(folder: store_module.ImageFolder) -> None:
    folder.put("ab/picture-1_0.png", b"first")
    folder.put("ab/picture-1_0.png", b"second")
    folder.put("other.webp", b"")
    assert folder.get("ab/picture-1_0.png") == b"second" and folder.get("other.webp") == b""
    folder.delete("ab/picture-1_0.png")
    with pytest.raises(FileNotFoundError):
        folder.get("ab/picture-1_0.png")
    assert folder.get("other.webp") == b""


def test_a_new_picture_is_seen_by_who_looked_too_early(folder: store_module.ImageFolder) -> None:
    for data in (b"1", b"2"):
        with pytest.raises(FileNotFoundError):
            folder.get("ab/late.png")
        folder.put("ab/late.png", data)
        assert folder.get("ab/late.png") == data
        folder.delete("ab/late.png")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../up.png",
        "ab/../../up.png",
        "/etc/passwd.txt",
        "abc/x.png",
        "ab/cd/x.png",
        "noextension",
        ".png",
        "x.png\n",
        "X.png",
        "a" * 65 + ".png",
        "x.tar.gz",
        "x\x00.png",
        "ab\\x.png",
        "x.png?versionId=1",
    ],
)
def test_no_other_name_leads_anywhere(folder: store_module.ImageFolder, name: str) -> None:
    for use in (folder.get, folder.delete, lambda name: folder.put(name, b""), lambda name: folder.signed_url(name, 1)):
        with pytest.raises(ValueError, match="image name"):
            use(name)


def test_many_threads_may_use_it(folder: store_module.ImageFolder, race: Any) -> None:
    def use(index: int) -> bool:
        name, data = f"{index:02d}/picture.png", bytes([index]) * 100_000
        folder.put(name, data)
        found = folder.get(name) == data
        folder.delete(name)
        return found

    assert race(use, 8) == [True] * 8


def test_of_many_that_write_one_picture_one_is_whole(folder: store_module.ImageFolder, race: Any) -> None:
    race(lambda index: folder.put("same.png", bytes([index]) * 300_000), 6)
    data = folder.get("same.png")
    assert len(data) == 300_000 and len(set(data)) == 1


def test_check_leaves_nothing_behind(tmp_path: pathlib.Path) -> None:
    store_module.ImageFolder(f"file://{tmp_path}/made%20for/it").check()
    assert list((tmp_path / "made for" / "it").iterdir()) == []


def test_check_passes_where_all_is_well(folder: store_module.ImageFolder) -> None:
    folder.check()


# --- local ------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_picture_and_no_litter(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store_module.ImageFolder(str(tmp_path))
    folder.put("x.png", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        folder.put("x.png", b"new")
    assert folder.get("x.png") == b"old" and [path.name for path in tmp_path.iterdir()] == ["x.png"]
    with pytest.raises(errors.ConfigError, match="No space"):
        folder.check()


def test_file_and_folder_are_on_disk_before_put_returns(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(pathlib.Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    store_module.ImageFolder(str(tmp_path)).put("ab/x.png", b"data")
    assert synced[0].startswith(str(tmp_path / "ab" / ".x.png."))
    assert sorted(synced[1:]) == [str(tmp_path), str(tmp_path / "ab")]


def test_a_local_picture_has_no_link(tmp_path: pathlib.Path) -> None:
    assert store_module.ImageFolder(str(tmp_path)).signed_url("x.png", 60) is None


def test_deleting_what_is_not_there_is_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        store_module.ImageFolder(str(tmp_path)).delete("x.png")


@pytest.mark.parametrize("url", ["", "gs://bucket", "http://host/x", "file://host/x", "file://"])
def test_another_kind_of_place_is_refused(url: str) -> None:
    with pytest.raises(errors.ConfigError, match="give a folder"):
        store_module.ImageFolder(url)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.ConfigError, match="cannot be written"):
        store_module.ImageFolder(str(tmp_path / "file")).check()


# --- S3 ---------------------------------------------------------------------------------------------


@pytest.fixture
def s3() -> tuple[str, dict[str, str]]:
    named = os.environ.get("DIFFUSION_KD_TEST_S3")
    if not named:
        pytest.skip("DIFFUSION_KD_TEST_S3 names no bucket")
    endpoint, key, secret, bucket = named.split("|")
    return bucket, {"endpoint_url": endpoint, "key": key, "secret": secret}


def test_a_signed_link_gives_the_picture_to_anyone(s3: tuple[str, dict[str, str]]) -> None:
    bucket, options = s3
    folder = store_module.ImageFolder(f"s3://{bucket}/links", options)
    folder.put("x.png", b"data")
    link = folder.signed_url("x.png", 60)
    assert link is not None
    with urllib.request.urlopen(link) as answer:
        assert answer.read() == b"data" and answer.headers["Content-Type"] == "image/png"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(link.partition("?")[0])
    folder.delete("x.png")


def test_a_link_may_name_another_address() -> None:
    options = {
        "endpoint_url": "http://inside:9000",
        "public_endpoint_url": "https://outside",
        "key": "k",
        "secret": "s",
    }
    link = store_module.ImageFolder("s3://bucket/prefix", options).signed_url("ab/x.png", 60)
    assert link is not None and link.startswith("https://outside/bucket/prefix/ab/x.png?")
    assert "X-Amz-Expires=60" in link and "X-Amz-Algorithm=AWS4-HMAC-SHA256" in link


def test_a_bucket_that_is_not_there_is_refused(s3: tuple[str, dict[str, str]]) -> None:
    with pytest.raises(errors.ConfigError, match=r"cannot be written.*s3://no-such-bucket"):
        store_module.ImageFolder("s3://no-such-bucket/x", s3[1]).check()


def test_a_wrong_secret_is_refused_and_not_repeated(s3: tuple[str, dict[str, str]]) -> None:
    bucket, options = s3
    with pytest.raises(errors.ConfigError, match="cannot be written") as caught:
        store_module.ImageFolder(f"s3://{bucket}", options | {"secret": "hunter2"}).check()
    assert "hunter2" not in str(caught.value)


def test_a_server_that_is_not_there_is_an_os_error() -> None:
    options = {"endpoint_url": "http://127.0.0.1:1", "key": "k", "secret": "s"}
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        store_module.ImageFolder("s3://bucket", options).delete("x.png")


@pytest.mark.parametrize(("url", "options"), [("s3://", {}), ("s3://bucket", {"password": "x"})])
def test_a_malformed_bucket_is_refused(url: str, options: dict[str, str]) -> None:
    with pytest.raises(errors.ConfigError, match="must be"):
        store_module.ImageFolder(url, options)
