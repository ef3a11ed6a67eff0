"""Blind votes."""

import dataclasses
import datetime
import secrets
from typing import Any

import alembic.command
import pytest
import sqlalchemy

from diffusion_kd import errors
from eval import preference
from serve import store as store_module
from serve.store import database, migrations, records, tables


@pytest.fixture
def vote(key_id: str) -> store_module.Vote:
    return store_module.Vote(
        id="pair",
        key_id=key_id,
        voter="somebody",
        at=datetime.datetime(2026, 5, 31, 12, 0, tzinfo=datetime.UTC),
        prompt="a red circle",
        seed=2**32 - 1,
        turbo_version="student-1",
        premium_version="teacher-1",
        turbo_steps=4,
        premium_steps=25,
        guidance_scale=7.5,
        turbo_side="left",
        choice="left",
    )


def kept(store: store_module.Store) -> list[store_module.Vote]:
    with store._reading() as session:
        rows = session.scalars(sqlalchemy.select(tables.VoteRow).order_by(tables.VoteRow.id)).all()
    names = [field.name for field in dataclasses.fields(store_module.Vote)]
    return [store_module.Vote(**{name: getattr(row, name) for name in names}) for row in rows]


def cast_votes(store: store_module.Store, vote: store_module.Vote, *choices: tuple[str, str], **changed: Any) -> None:
    """choices: (turbo_side, choice)."""
    for side, choice in choices:
        changed |= {"id": secrets.token_hex(20), "turbo_side": side, "choice": choice}
        assert store.record_vote(dataclasses.replace(vote, **changed))


def test_a_vote_is_kept_as_it_was_cast(store: store_module.Store, vote: store_module.Vote) -> None:
    assert store.record_vote(vote) is True
    assert kept(store) == [vote]


def test_a_pair_counts_once_and_its_first_vote_stays(
    store: store_module.Store, other_store: store_module.Store, vote: store_module.Vote
) -> None:
    assert store.record_vote(vote) is True
    again = dataclasses.replace(vote, choice="right", voter="another")
    assert [store.record_vote(again), other_store.record_vote(vote)] == [False, False]
    assert kept(store) == [vote]


def test_of_many_that_vote_on_one_pair_at_once_one_counts(
    store: store_module.Store, vote: store_module.Vote, race: Any
) -> None:
    told = race(lambda index: store.record_vote(dataclasses.replace(vote, voter=f"voter-{index}")), 8)
    assert sorted(told) == [False] * 7 + [True]
    assert [one.voter for one in kept(store)] == [f"voter-{told.index(True)}"]


@pytest.mark.parametrize(
    ("side", "choice", "winner"),
    [
        ("left", "left", "turbo"),
        ("left", "right", "premium"),
        ("left", "neither", "neither"),
        ("right", "left", "premium"),
        ("right", "right", "turbo"),
        ("right", "neither", "neither"),
    ],
)
def test_who_won_is_the_same_to_the_record_and_to_the_database(
    store: store_module.Store, vote: store_module.Vote, side: records.Side, choice: records.Choice, winner: str
) -> None:
    cast_one = dataclasses.replace(vote, turbo_side=side, choice=choice)
    store.record_vote(cast_one)
    (tally,) = store.tallies("student-1", "teacher-1")
    assert cast_one.winner == winner
    assert {name: getattr(tally, name) for name in ("turbo", "premium", "neither", "left")} == {
        "turbo": 0,
        "premium": 0,
        "neither": 0,
        "left": int(choice == "left"),
    } | {winner: 1}


def test_votes_are_counted_by_voter_and_steps(store: store_module.Store, vote: store_module.Vote) -> None:
    turbo_left, premium_left, tie = ("left", "left"), ("right", "left"), ("right", "neither")
    cast_votes(store, vote, turbo_left, turbo_left, premium_left, tie, ("right", "right"), voter="b")
    cast_votes(store, vote, tie, voter="b", turbo_steps=1)
    cast_votes(store, vote, ("left", "right"), ("left", "right"), voter="a")
    assert store.tallies("student-1", "teacher-1") == [
        preference.Tally("a", 4, turbo=0, premium=2, neither=0, left=0),
        preference.Tally("b", 1, turbo=0, premium=0, neither=1, left=0),
        preference.Tally("b", 4, turbo=3, premium=1, neither=1, left=3),
    ]


def test_other_versions_are_other_votes(store: store_module.Store, vote: store_module.Vote) -> None:
    assert store.tallies("student-1", "teacher-1") == []
    cast_votes(store, vote, ("left", "left"))
    cast_votes(store, vote, ("left", "right"), turbo_version="student-2")
    cast_votes(store, vote, ("left", "neither"), premium_version="teacher-2")
    assert [tally.turbo for tally in store.tallies("student-1", "teacher-1")] == [1]
    assert [tally.premium for tally in store.tallies("student-2", "teacher-1")] == [1]
    assert [tally.neither for tally in store.tallies("student-1", "teacher-2")] == [1]
    assert store.tallies("student-2", "teacher-2") == []


@pytest.mark.parametrize(
    "prompt",
    ["", "a\0b", "\0", "half \ud800 of it", "\ud83d\ude00", "\U0001f600", 'say "so"\\', "\u202e\x1b[31m", "null"],
)
def test_whatever_people_type_comes_back(store: store_module.Store, vote: store_module.Vote, prompt: str) -> None:
    typed = dataclasses.replace(vote, prompt=prompt)
    assert store.record_vote(typed) is True
    (found,) = kept(store)
    # Half characters side by side are one character to whoever reads JSON.
    assert found.prompt == prompt.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


@pytest.mark.parametrize("voter", ["", "x" * 65, "x" * 100_000, "a\0b", "é", "\ud800", "a\n"])
def test_a_voter_that_no_browser_of_ours_made_up_is_refused(
    store: store_module.Store, vote: store_module.Vote, voter: str
) -> None:
    with pytest.raises(errors.DataError, match="1 to 64 printable ASCII characters; give") as caught:
        store.record_vote(dataclasses.replace(vote, voter=voter))
    assert len(str(caught.value)) < 250 and str(caught.value).isprintable()
    assert kept(store) == []
    assert store.record_vote(dataclasses.replace(vote, voter="x" * 64)) is True


def test_a_vote_under_no_key_is_not_kept(store: store_module.Store, vote: store_module.Vote) -> None:
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        store.record_vote(dataclasses.replace(vote, key_id="key_nobody"))
    assert kept(store) == []


def test_votes_outlive_their_key_and_every_sweep(
    store: store_module.Store, vote: store_module.Vote, clock: Any, key_id: str
) -> None:
    store.record_vote(vote)
    assert store.revoke_key(key_id)
    clock.forward(100 * 365 * 86_400)
    store.sweep(jobs_older_than=datetime.timedelta(0), delete_file=lambda path: None)
    assert kept(store) == [vote]


def test_the_count_follows_the_index(database_url: str, store: store_module.Store) -> None:
    """No sorting and no other rows: asked of SQLite, which says so in words."""
    if not database_url.startswith("sqlite"):
        pytest.skip("PostgreSQL chooses by how many rows there are")
    asked: list[tuple[Any, ...]] = []
    sqlalchemy.event.listen(store._engine, "before_cursor_execute", lambda *given: asked.append(given[2:4]))
    store.tallies("student-1", "teacher-1")
    statement, parameters = next(each for each in asked if each[0].startswith("SELECT"))
    with store._reading() as session:
        plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    assert [row.detail for row in plan] == [
        "SEARCH votes USING INDEX ix_votes_turbo_version_premium_version_voter_turbo_steps "
        "(turbo_version=? AND premium_version=?)"
    ]


def test_a_database_from_before_there_were_votes_keeps_all_and_takes_them(
    database_url: str, vote: store_module.Vote, clock: Any
) -> None:
    engine = database._engine(database_url)
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE votes")
            alembic.command.stamp(migrations._config(connection), "0001")
    finally:
        engine.dispose()
    opened = store_module.Store(database_url, now=clock)
    assert opened.get_key(vote.key_id) is not None
    assert opened.record_vote(vote) is True
    opened.close()
