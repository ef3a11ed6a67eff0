"""Images that outlive their answer: a file in the images' folder, a row in the store, a link."""

import datetime
import logging
import secrets
from collections.abc import Sequence

from serve import errors
from serve.engine import encoding
from serve.store import ImageFolder, Store, records

log = logging.getLogger(__name__)


class Pictures:
    """public_url: of the service, for links to folders that have none of their own. Blocks; call it from threads."""

    def __init__(self, store: Store, folder: ImageFolder, public_url: str) -> None:
        self._store, self._folder, self._public_url = store, folder, public_url.rstrip("/")

    def record(
        self, key_id: str, file_format: encoding.Format, ttl_s: float, job_id: str | None = None
    ) -> records.Image:
        """What will be known of an image. Its id cannot be guessed: whoever has it may fetch the image."""
        name = secrets.token_hex(20)
        now = datetime.datetime.now(datetime.UTC)
        return records.Image(
            id=f"img_{name}",
            key_id=key_id,
            job_id=job_id,
            path=f"{name[:2]}/{name}.{file_format}",
            media_type=encoding.MEDIA_TYPES[file_format],
            created_at=now,
            expires_at=now + datetime.timedelta(seconds=ttl_s),
        )

    def keep(self, images: Sequence[records.Image], files: Sequence[bytes]) -> None:
        """Row before file: what a crash leaves behind is a row, which expires, and never a file that nobody knows."""
        for image, file in zip(images, files, strict=True):
            self._store.add_image(image)
            self._folder.put(image.path, file)

    def read_all(self, image_ids: Sequence[str]) -> list[bytes]:
        """The bytes of several. Raises NotFound if one is not there, or no longer."""
        return [self.read(image_id)[0] for image_id in image_ids]

    def read(self, image_id: str) -> tuple[bytes, str]:
        """Bytes and media type. Raises NotFound for an image that is not there, or no longer."""
        image = self._store.get_image(image_id)
        try:
            if image is not None:
                return self._folder.get(image.path), image.media_type
        except FileNotFoundError:
            pass
        except OSError as error:
            log.error("an image cannot be read: %s", error)
            raise unavailable() from None
        raise errors.NotFound("no such image; it may have expired")

    def urls(self, image_ids: Sequence[str]) -> list[str | None]:
        """Links that work until the images expire; None for one that has."""
        known = self._store.get_images(image_ids)
        return [self._url(known[image_id]) if image_id in known else None for image_id in image_ids]

    def _url(self, image: records.Image) -> str:
        left_s = (image.expires_at - datetime.datetime.now(datetime.UTC)).total_seconds()
        signed = self._folder.signed_url(image.path, max(1, int(left_s)))
        return signed or f"{self._public_url}/v1/images/{image.id}"


def unavailable() -> errors.Overloaded:
    """The folder of images, or its bucket, does not answer."""
    return errors.Overloaded("images cannot be stored or read now", code="images_unavailable", retry_after_s=5)
