"""API keys: shown once, stored hashed."""

import hashlib
import secrets
import uuid
from collections.abc import Iterable

import sqlalchemy

from serve.store import database, locks, records, tables
from serve.store.tables import KeyRow

_PREFIX_CHARACTERS = 12


class Keys(database.Database):
    def create_key(
        self, name: str, scopes: Iterable[str], requests_per_minute: int | None, monthly_budget_nanousd: int | None
    ) -> tuple[records.Key, str]:
        """A new key and its secret, "dkd_" and 256 random bits, which cannot be read again.

        requests_per_minute, monthly_budget_nanousd: None means no limit.
        """
        secret = f"dkd_{secrets.token_urlsafe(32)}"
        row = KeyRow(id=f"key_{uuid.uuid4().hex}", created_at=self._now())
        _describe(row, name, scopes, secret)
        row.requests_per_minute, row.monthly_budget_nanousd = requests_per_minute, monthly_budget_nanousd
        with self._writing() as session:
            session.add(row)
        return _key(row), secret

    def ensure_key(self, key_id: str, name: str, scopes: Iterable[str], secret: str | None) -> records.Key:
        """A key that the settings define, without limits: made, or made so again, at each start.

        secret: None for a key that nobody can present, as that of a service without authentication.
        """
        with self._writing() as session:
            locks.hold(session, locks.KEYS)  # of processes that start together, one makes it
            row = session.get(KeyRow, key_id) or KeyRow(id=key_id, created_at=self._now())
            _describe(row, name, scopes, secret or secrets.token_urlsafe(32))
            # People chose it, and it may be short: nothing of it is shown.
            row.prefix = "" if secret is None else "settings"
            row.requests_per_minute = row.monthly_budget_nanousd = row.revoked_at = None
            session.add(row)
        return _key(row)

    def find_key(self, secret: str) -> records.Key | None:
        """The key with that secret; None for an unknown or revoked one."""
        with self._reading() as session:
            found = session.scalar(
                sqlalchemy.select(KeyRow).where(KeyRow.secret_sha256 == _sha256(secret), KeyRow.revoked_at.is_(None))
            )
        return None if found is None else _key(found)

    def get_key(self, key_id: str) -> records.Key | None:
        """The key with that id, revoked or not."""
        with self._reading() as session:
            found = session.scalar(sqlalchemy.select(KeyRow).where(KeyRow.id == key_id))
        return None if found is None else _key(found)

    def list_keys(self, *, include_revoked: bool = False) -> list[records.Key]:
        """Newest first."""
        query = sqlalchemy.select(KeyRow).order_by(KeyRow.created_at.desc(), KeyRow.id)
        if not include_revoked:
            query = query.where(KeyRow.revoked_at.is_(None))
        with self._reading() as session:
            return [_key(row) for row in session.scalars(query)]

    def revoke_key(self, key_id: str) -> bool:
        """Whether there was such a key that was not revoked. Its usage, jobs and votes stay."""
        with self._writing() as session:
            revoked = session.scalars(
                sqlalchemy.update(KeyRow)
                .where(KeyRow.id == key_id, KeyRow.revoked_at.is_(None))
                .values(revoked_at=self._now())
                .returning(KeyRow.id)
            )
            return revoked.first() is not None


def _describe(row: tables.KeyRow, name: str, scopes: Iterable[str], secret: str) -> None:
    row.name, row.scopes = name, " ".join(sorted(set(scopes)))
    row.prefix, row.secret_sha256 = secret[:_PREFIX_CHARACTERS], _sha256(secret)


def _sha256(secret: str) -> str:
    """Unsalted and fast: a secret of 256 random bits cannot be guessed, unlike a password."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _key(row: tables.KeyRow) -> records.Key:
    return records.Key(
        id=row.id,
        name=row.name,
        prefix=row.prefix,
        scopes=frozenset(row.scopes.split()),
        requests_per_minute=row.requests_per_minute,
        monthly_budget_nanousd=row.monthly_budget_nanousd,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
    )
