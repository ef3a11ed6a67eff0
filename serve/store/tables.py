"""The tables. A change here needs a migration; a test compares the two."""

import datetime
from typing import Any

import sqlalchemy
from sqlalchemy import ForeignKey, Index, UniqueConstraint, orm

Whole = sqlalchemy.BigInteger().with_variant(sqlalchemy.Integer(), "sqlite")
"""SQLite numbers rows by itself only where the primary key is an INTEGER (which has 64 bits there)."""

Document = sqlalchemy.JSON(none_as_null=True)
"""Not JSONB, which refuses the NUL character that JSON allows in a prompt."""


class UtcDateTime(sqlalchemy.TypeDecorator[datetime.datetime]):
    """Aware UTC times, in SQLite too, which knows no time zones: there they are stored as text in UTC."""

    impl = sqlalchemy.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(
        self, value: datetime.datetime | None, dialect: sqlalchemy.Dialect
    ) -> datetime.datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"the time {value} has no time zone; give datetime.now(datetime.UTC) or the like")
        return value.astimezone(datetime.UTC)

    def process_result_value(
        self, value: datetime.datetime | None, dialect: sqlalchemy.Dialect
    ) -> datetime.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value.astimezone(datetime.UTC)


class Identifier(sqlalchemy.TypeDecorator[str]):
    """An id, which clients may send to look things up.

    Text that PostgreSQL cannot hold is bound as NULL: it equals nothing, so look-ups find nothing and inserts fail.
    """

    impl = sqlalchemy.String(64)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sqlalchemy.Dialect) -> str | None:
        return value if value is not None and value.isprintable() and value.isascii() else None


class Base(orm.DeclarativeBase):
    metadata = sqlalchemy.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - declared so by SQLAlchemy
        datetime.datetime: UtcDateTime,
        dict[str, Any]: Document,
        str: sqlalchemy.Text,
    }


class KeyRow(Base):
    __tablename__ = "api_keys"

    id: orm.Mapped[str] = orm.mapped_column(Identifier, primary_key=True)
    name: orm.Mapped[str]
    prefix: orm.Mapped[str]
    secret_sha256: orm.Mapped[str] = orm.mapped_column(sqlalchemy.String(64), unique=True)
    scopes: orm.Mapped[str]  # sorted, with spaces between
    requests_per_minute: orm.Mapped[int | None]
    monthly_budget_nanousd: orm.Mapped[int | None] = orm.mapped_column(sqlalchemy.BigInteger)
    created_at: orm.Mapped[datetime.datetime]
    revoked_at: orm.Mapped[datetime.datetime | None]


class UsageRow(Base):
    __tablename__ = "usage"
    # The second holds all that a budget needs: it is asked for at each request.
    __table_args__ = (Index(None, "key_id", "day"), Index(None, "key_id", "at", "cost_nanousd"))

    id: orm.Mapped[int] = orm.mapped_column(Whole, primary_key=True)
    key_id: orm.Mapped[str] = orm.mapped_column(Identifier, ForeignKey(KeyRow.id))
    at: orm.Mapped[datetime.datetime]
    day: orm.Mapped[datetime.date]  # of `at`, in UTC
    tier: orm.Mapped[str]
    images: orm.Mapped[int]
    compute_ms: orm.Mapped[float] = orm.mapped_column(sqlalchemy.Double)
    cost_nanousd: orm.Mapped[int] = orm.mapped_column(sqlalchemy.BigInteger)
    premium_cost_nanousd: orm.Mapped[int] = orm.mapped_column(sqlalchemy.BigInteger)


class IdempotencyRow(Base):
    __tablename__ = "idempotency"
    __table_args__ = (UniqueConstraint("key_id", "idempotency_key"), Index(None, "expires_at"), Index(None, "owner"))

    id: orm.Mapped[int] = orm.mapped_column(Whole, primary_key=True)
    key_id: orm.Mapped[str] = orm.mapped_column(Identifier, ForeignKey(KeyRow.id))
    idempotency_key: orm.Mapped[str]
    body_hash: orm.Mapped[str]
    owner: orm.Mapped[str | None]  # None once there is an answer
    lease_until: orm.Mapped[datetime.datetime]
    expires_at: orm.Mapped[datetime.datetime]
    answer: orm.Mapped[dict[str, Any] | None]


class JobRow(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "status", "created_at"),
        Index(None, "status", "finished_at"),
        Index(None, "key_id", "created_at"),
        Index(None, "key_id", "started_at"),
        Index(None, "owner"),
    )

    id: orm.Mapped[str] = orm.mapped_column(Identifier, primary_key=True)
    key_id: orm.Mapped[str] = orm.mapped_column(Identifier, ForeignKey(KeyRow.id))
    status: orm.Mapped[str] = orm.mapped_column(sqlalchemy.String(16))
    request: orm.Mapped[dict[str, Any]]
    webhook_url: orm.Mapped[str | None]
    created_at: orm.Mapped[datetime.datetime]
    started_at: orm.Mapped[datetime.datetime | None]
    finished_at: orm.Mapped[datetime.datetime | None]
    attempts: orm.Mapped[int]
    answer: orm.Mapped[dict[str, Any] | None]
    error: orm.Mapped[dict[str, Any] | None]
    cancel_requested: orm.Mapped[bool]
    owner: orm.Mapped[str | None]  # of a running one
    lease_until: orm.Mapped[datetime.datetime | None]  # of a running one


class DeliveryRow(Base):
    __tablename__ = "deliveries"
    __table_args__ = (Index(None, "status", "next_at"), Index(None, "job_id"))

    id: orm.Mapped[str] = orm.mapped_column(Identifier, primary_key=True)
    job_id: orm.Mapped[str] = orm.mapped_column(Identifier, ForeignKey(JobRow.id))
    url: orm.Mapped[str]
    event: orm.Mapped[str]
    payload: orm.Mapped[dict[str, Any]]
    status: orm.Mapped[str] = orm.mapped_column(sqlalchemy.String(16))  # pending, delivered or failed
    attempts: orm.Mapped[int]
    next_at: orm.Mapped[datetime.datetime]
    owner: orm.Mapped[str | None]
    lease_until: orm.Mapped[datetime.datetime | None]
    finished_at: orm.Mapped[datetime.datetime | None]
    last_error: orm.Mapped[str | None]


class ImageRow(Base):
    __tablename__ = "images"
    __table_args__ = (Index(None, "expires_at"), Index(None, "job_id"))

    id: orm.Mapped[str] = orm.mapped_column(Identifier, primary_key=True)
    key_id: orm.Mapped[str] = orm.mapped_column(Identifier, ForeignKey(KeyRow.id))
    job_id: orm.Mapped[str | None] = orm.mapped_column(Identifier, ForeignKey(JobRow.id, ondelete="SET NULL"))
    path: orm.Mapped[str]
    media_type: orm.Mapped[str]
    created_at: orm.Mapped[datetime.datetime]
    expires_at: orm.Mapped[datetime.datetime]


class VoteRow(Base):
    __tablename__ = "votes"
    # Counted by the last two, of the first two: in the order of the index.
    __table_args__ = (Index(None, "turbo_version", "premium_version", "voter", "turbo_steps"),)

    id: orm.Mapped[str] = orm.mapped_column(Identifier, primary_key=True)
    key_id: orm.Mapped[str] = orm.mapped_column(Identifier, ForeignKey(KeyRow.id))
    voter: orm.Mapped[str] = orm.mapped_column(Identifier)
    at: orm.Mapped[datetime.datetime]
    prompt: orm.Mapped[str] = orm.mapped_column(Document)  # quoted as JSON, which can hold whatever people type
    seed: orm.Mapped[int] = orm.mapped_column(sqlalchemy.BigInteger)
    turbo_version: orm.Mapped[str]
    premium_version: orm.Mapped[str]
    turbo_steps: orm.Mapped[int]
    premium_steps: orm.Mapped[int]
    guidance_scale: orm.Mapped[float] = orm.mapped_column(sqlalchemy.Double)
    turbo_side: orm.Mapped[str] = orm.mapped_column(sqlalchemy.String(16))  # left or right
    choice: orm.Mapped[str] = orm.mapped_column(sqlalchemy.String(16))  # left, right or neither
