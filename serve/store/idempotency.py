"""Idempotency keys: of a request that is sent twice, one generates and both get its answer."""

import datetime
from typing import Any

import sqlalchemy
from sqlalchemy import orm

from serve.store import database, records
from serve.store.errors import StoreUnavailable
from serve.store.tables import IdempotencyRow

_TRIES = 5


class Idempotency(database.Database):
    def begin_idempotent(
        self, key_id: str, idempotency_key: str, body_hash: str, owner: str, lease_s: float, ttl_s: float
    ) -> records.Idempotent:
        """Ask whether to do the work. Of concurrent callers exactly one is told "new".

        body_hash: of the request; another one for the same key is a conflict.
        owner: who works on it if it is new, for `lease_s` unless it renews; after that another may take it over.
        ttl_s: counted from here; after that the key is free again, answered or not.
        """
        now = self._now()
        state = {
            "body_hash": body_hash,
            "owner": owner,
            "lease_until": now + datetime.timedelta(seconds=lease_s),
            "expires_at": now + datetime.timedelta(seconds=ttl_s),
            "answer": None,
        }
        for _ in range(_TRIES):
            with self._writing() as session:
                fresh = database.insert(session, IdempotencyRow).on_conflict_do_nothing(
                    index_elements=["key_id", "idempotency_key"]
                )
                values = {"key_id": key_id, "idempotency_key": idempotency_key} | state
                if session.execute(fresh.values(values).returning(IdempotencyRow.id)).first():
                    return records.Idempotent("new")
                row = session.scalar(_row(key_id, idempotency_key).with_for_update())
                if row is not None:
                    return _stand(row, state, now)
            # Forgotten by its owner between the two statements: now it is free.
        raise StoreUnavailable("the idempotency key comes and goes; try again later")

    def complete_idempotent(self, key_id: str, idempotency_key: str, owner: str, answer: dict[str, Any]) -> bool:
        """Keep the answer for those who come again. False, and nothing kept, if another has taken the work over."""
        with self._writing() as session:
            row = session.scalar(_row(key_id, idempotency_key).where(IdempotencyRow.owner == owner).with_for_update())
            if row is not None:
                row.answer, row.owner = answer, None
            return row is not None

    def forget_idempotent(self, key_id: str, idempotency_key: str, owner: str) -> None:
        """After a failure: who comes again is told "new". Does nothing if another has taken the work over."""
        with self._writing() as session:
            row = session.scalar(_row(key_id, idempotency_key).where(IdempotencyRow.owner == owner).with_for_update())
            if row is not None:
                session.delete(row)


def _row(key_id: str, idempotency_key: str) -> sqlalchemy.Select[IdempotencyRow]:
    return sqlalchemy.select(IdempotencyRow).where(
        IdempotencyRow.key_id == key_id, IdempotencyRow.idempotency_key == idempotency_key
    )


def _stand(row: IdempotencyRow, state: dict[str, Any], now: datetime.datetime) -> records.Idempotent:
    """Where a row that was there before stands; takes it over if its time or its owner's lease has run out."""
    if row.expires_at > now:
        if row.body_hash != state["body_hash"]:
            return records.Idempotent("conflict")
        if row.owner is None:
            return records.Idempotent("done", row.answer)
        if row.lease_until > now:
            return records.Idempotent("running")
    for name, value in state.items():
        setattr(row, name, value)
    return records.Idempotent("new")


def renew(session: orm.Session, owner: str, until: datetime.datetime) -> None:
    """Prolong the leases of an owner, within a transaction that does more."""
    session.execute(sqlalchemy.update(IdempotencyRow).where(IdempotencyRow.owner == owner).values(lease_until=until))
