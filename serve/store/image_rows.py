"""Which pictures there are and until when; their bytes are in an ImageFolder."""

import dataclasses

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
        with self._reading() as session:
            row = session.scalar(
                sqlalchemy.select(ImageRow).where(ImageRow.id == image_id, ImageRow.expires_at > self._now())
            )
        if row is None:
            return None
        return records.Image(**{field.name: getattr(row, field.name) for field in dataclasses.fields(records.Image)})


def put(session: orm.Session, image: records.Image) -> None:
    """Into a transaction that does more. An attempt that died may have left the same row."""
    values = dataclasses.asdict(image)
    statement = database.insert(session, ImageRow).values(values)
    session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=values))
