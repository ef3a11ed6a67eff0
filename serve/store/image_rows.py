"""Which pictures there are and until when; their bytes are in an ImageFolder."""

import dataclasses
from collections.abc import Sequence

import sqlalchemy
from sqlalchemy import orm

from serve.store import database, records
from serve.store.tables import ImageRow


class Images(database.Database):
    def add_image(self, image: records.Image) -> None:
        """Add or, by its id, replace."""
        with self._writing() as session:
            put(session, image)

    def get_image(self, image_id: str) -> records.Image | None:
        """None for an unknown or expired one."""
        return self.get_images([image_id]).get(image_id)

    def get_images(self, image_ids: Sequence[str]) -> dict[str, records.Image]:
        """By id; unknown and expired ones are left out."""
        query = sqlalchemy.select(ImageRow).where(ImageRow.id.in_(image_ids), ImageRow.expires_at > self._now())
        with self._reading() as session:
            return {row.id: _image(row) for row in session.scalars(query)}


def _image(row: ImageRow) -> records.Image:
    return records.Image(**{field.name: getattr(row, field.name) for field in dataclasses.fields(records.Image)})


def put(session: orm.Session, image: records.Image) -> None:
    """Into a transaction that does more. An attempt that died may have left the same row."""
    values = dataclasses.asdict(image)
    statement = database.insert(session, ImageRow).values(values)
    session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values))
