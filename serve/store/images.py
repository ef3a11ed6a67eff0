"""Pictures as files: in a local folder, or in a bucket that speaks S3."""

import contextlib
import mimetypes
import os
import pathlib
import re
import secrets
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from diffusion_kd import errors, files

_NAME = re.compile(r"(?:[a-z0-9_-]{2}/)?[a-z0-9_-]{1,64}\.[a-z0-9]{1,8}")
_WOULD_DO = "give a folder, file:///absolute/folder or s3://bucket/prefix"
_CONNECT_S, _READ_S = 5, 30


class ImageFolder:
    """A flat place for pictures, safe to use from many threads.

    url: a folder's path, file:///absolute/folder, or s3://bucket/prefix.
    options: of S3 alone, all optional; None counts as absent: endpoint_url, key, secret, and
        public_endpoint_url, the address by which browsers reach the bucket, for signed links.
    Raises ConfigError for another kind of URL or an unknown option. `check` tells whether the place works.

    A name is 1-64 of a-z, 0-9, "_" and "-", and an extension; it may stand in a subfolder of two such characters.
    Another name raises ValueError, so that none leads out of the folder.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self._url = url
        given = {name: value for name, value in (options or {}).items() if value is not None}
        scheme = urllib.parse.urlsplit(url).scheme if "://" in url else "file"
        if scheme == "s3":
            self._place: _Place = _Bucket(url, given)
        elif scheme == "file" and url:
            self._place = _Local(_local_path(url))
        else:
            raise errors.ConfigError(f"no images can be kept at {url!r}; {_WOULD_DO}")

    def put(self, name: str, data: bytes) -> None:
        """Store a picture, in place of one of the same name; once this returns it survives a power cut.

        It appears whole or not at all. Raises OSError if it cannot be stored.
        """
        self._place.put(_checked(name), data)

    def get(self, name: str) -> bytes:
        """Raises FileNotFoundError if there is none, another OSError if it cannot be read."""
        return self._place.get(_checked(name))

    def delete(self, name: str) -> None:
        """Raises FileNotFoundError if there is none and that can be told (S3 does not), OSError if it stays."""
        self._place.delete(_checked(name))

    def signed_url(self, name: str, expires_s: int) -> str | None:
        """A link that anyone may follow for that long; None for a local folder, which has none."""
        return self._place.signed_url(_checked(name), expires_s)

    def check(self) -> None:
        """Write, read and delete a probe. Raises ConfigError where that fails."""
        name, data = f"probe-{secrets.token_hex(8)}.bin", secrets.token_bytes(16)
        try:
            self.put(name, data)
            found = self.get(name)
            self.delete(name)
        except OSError as error:
            raise errors.ConfigError(
                f"images cannot be written, read and deleted at {self._url}: {errors.first_line(error)}; {_WOULD_DO} "
                "with permission for all three"
            ) from error
        errors.require(found == data, "what was just written to the image folder", found, f"{data!r} when read back")


class _Place(Protocol):
    def put(self, name: str, data: bytes) -> None: ...
    def get(self, name: str) -> bytes: ...
    def delete(self, name: str) -> None: ...
    def signed_url(self, name: str, expires_s: int) -> str | None: ...


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"the image name {name!r} is not 1-64 of a-z, 0-9, _ and -, with an extension")
    return name


# --- local ------------------------------------------------------------------------------------------


def _local_path(url: str) -> pathlib.Path:
    if "://" not in url:
        return pathlib.Path(url).expanduser()
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise errors.ConfigError(f"no images can be kept at {url!r}, which names a host and no folder; {_WOULD_DO}")
    return pathlib.Path(urllib.parse.unquote(parts.path))


class _Local:
    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def put(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.parent / f".{path.name}.{secrets.token_hex(8)}"
        try:
            with unfinished.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        for folder in {path.parent, self._folder}:
            files.flush(folder)  # or a power cut may undo the rename

    def get(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def delete(self, name: str) -> None:
        (self._folder / name).unlink()

    def signed_url(self, name: str, expires_s: int) -> str | None:
        return None


# --- S3 ---------------------------------------------------------------------------------------------


class _Bucket:
    """s3fs runs its requests on a thread of its own, so that any thread may wait for one."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        known = {"endpoint_url", "public_endpoint_url", "key", "secret"}
        unknown = sorted(options.keys() - known)
        errors.require(not unknown, "an option of the image bucket", ", ".join(unknown), f"one of {sorted(known)}")
        self._root = url.removeprefix("s3://").strip("/")
        errors.require(bool(self._root), "the URL of the image bucket", url, "s3://bucket or s3://bucket/prefix")
        public = options.pop("public_endpoint_url", None)
        self._files = _s3(options)
        self._public_files = self._files if public is None else _s3(options | {"endpoint_url": public})

    def put(self, name: str, data: bytes) -> None:
        media_type = mimetypes.guess_type(name, strict=False)[0] or "application/octet-stream"
        with _as_os_errors():
            self._files.pipe_file(self._path(name), data, ContentType=media_type)

    def get(self, name: str) -> bytes:
        with _as_os_errors():
            content: bytes = self._files.cat_file(self._path(name))
            return content

    def delete(self, name: str) -> None:
        with _as_os_errors():
            self._files.rm_file(self._path(name))

    def signed_url(self, name: str, expires_s: int) -> str | None:
        """Signing asks nobody: it works for an address that only browsers reach."""
        return str(self._public_files.url(self._path(name), expires=expires_s))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _s3(options: dict[str, Any]) -> Any:
    """A file system of its own (fsspec would share it between equal settings), which remembers no listings."""
    try:
        import s3fs  # type: ignore[import-untyped]
    except ImportError:
        raise errors.ConfigError("images in S3 need s3fs: pip install 's3fs'") from None
    own_endpoint = options.get("endpoint_url") is not None
    return s3fs.S3FileSystem(
        key=options.get("key"),
        secret=options.get("secret"),
        endpoint_url=options.get("endpoint_url"),
        config_kwargs={
            "signature_version": "s3v4",
            "connect_timeout": _CONNECT_S,
            "read_timeout": _READ_S,
            # A bucket as a subdomain needs DNS that servers other than Amazon's seldom have.
            "s3": {"addressing_style": "path" if own_endpoint else "auto"},
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """s3fs translates what the server answers to OSErrors; what befalls the connection it does not."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"the image bucket does not answer: {errors.first_line(error)}") from error
