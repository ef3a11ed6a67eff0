"""API keys."""

import hashlib

import sqlalchemy

from serve import store as store_module
from serve.store import tables


def test_a_key_is_found_by_its_secret_and_stored_without_it(store: store_module.Store) -> None:
    key, secret = store.create_key("mine", ["generate", "admin"], 60, 5_000_000_000_000)
    assert secret.startswith("dkd_") and len(secret) == 47
    assert key.prefix == secret[:12] and key.scopes == {"admin", "generate"}
    assert (key.requests_per_minute, key.monthly_budget_nanousd) == (60, 5_000_000_000_000)
    assert store.find_key(secret) == store.get_key(key.id) == key
    with store._reading() as session:
        row = session.scalars(sqlalchemy.select(tables.KeyRow)).one()
    assert row.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert not any(secret in str(value) for value in vars(row).values())


def test_another_secret_finds_nothing(store: store_module.Store) -> None:
    _, secret = store.create_key("mine", ["generate"], None, None)
    assert [store.find_key(given) for given in (secret[:-1], secret[:12], "", "\x00", "\ud800")] == [None] * 5


def test_secrets_differ(store: store_module.Store) -> None:
    assert len({store.create_key("same", [], None, None)[1] for _ in range(5)}) == 5


def test_a_revoked_key_opens_nothing_and_is_listed_only_when_asked_for(store: store_module.Store) -> None:
    kept, _ = store.create_key("kept", [], None, None)
    revoked, secret = store.create_key("revoked", [], None, None)
    assert store.revoke_key(revoked.id) is True
    assert store.revoke_key(revoked.id) is store.revoke_key("nobody") is False
    assert store.find_key(secret) is None
    assert [key.id for key in store.list_keys()] == [kept.id]
    assert {key.id for key in store.list_keys(include_revoked=True)} == {kept.id, revoked.id}
    found = store.get_key(revoked.id)
    assert found is not None and found.revoked_at is not None


def test_a_key_of_the_settings_follows_the_settings(store: store_module.Store) -> None:
    store.ensure_key("key_admin", "admin", ["admin"], "first secret")
    store.revoke_key("key_admin")
    key = store.ensure_key("key_admin", "admin", ["admin", "generate"], "second secret")
    assert store.find_key("first secret") is None
    assert store.find_key("second secret") == key
    assert key.scopes == {"admin", "generate"} and key.revoked_at is None
    assert len(store.list_keys()) == 1


def test_a_key_that_nobody_presents_has_no_secret_to_show(store: store_module.Store) -> None:
    key = store.ensure_key("key_open", "without authentication", ["generate"], None)
    assert key.prefix == "" and store.get_key("key_open") == key and store.find_key("") is None


def test_an_id_that_no_database_can_hold_is_unknown(store: store_module.Store) -> None:
    odd = ("\x00", "é", "\ud800", "x" * 500)
    assert [store.get_key(given) for given in odd] == [None] * 4
    assert [store.get_job(given, None) for given in odd] == [None] * 4
    assert [store.get_image(given) for given in odd] == [None] * 4
    assert [store.cancel_job(given, None) for given in odd] == [None] * 4
    assert [store.revoke_key(given) for given in odd] == [False] * 4
