"""Blind votes: of two pictures of one prompt and seed, which did somebody like better? Never deleted."""

import dataclasses

import sqlalchemy
from sqlalchemy import func

from diffusion_kd import errors
from eval import preference
from serve.store import database, records
from serve.store.tables import VoteRow

VOTER_CHARACTERS = 64


class Votes(database.Database):
    def record_vote(self, vote: records.Vote) -> bool:
        """Keep a vote. False if its pair has one already, which stays: a pair counts once.

        Raises DataError for a voter that is not 1 to 64 printable ASCII characters.
        """
        _check_voter(vote.voter)
        with self._writing() as session:
            statement = database.insert(session, VoteRow).on_conflict_do_nothing(index_elements=["id"])
            kept = session.execute(statement.values(dataclasses.asdict(vote)).returning(VoteRow.id))
            return kept.first() is not None

    def tallies(self, turbo_version: str, premium_version: str) -> list[preference.Tally]:
        """The votes on these two versions, counted by voter and number of turbo steps, in that order.

        They may be thousands: the database counts them.
        """
        of_turbo, of_neither = VoteRow.choice == VoteRow.turbo_side, VoteRow.choice == "neither"
        query = (
            sqlalchemy.select(
                VoteRow.voter,
                VoteRow.turbo_steps,
                func.count().filter(of_turbo),
                func.count().filter(~of_turbo & ~of_neither),
                func.count().filter(of_neither),
                func.count().filter(VoteRow.choice == "left"),
            )
            .where(VoteRow.turbo_version == turbo_version, VoteRow.premium_version == premium_version)
            .group_by(VoteRow.voter, VoteRow.turbo_steps)
            .order_by(VoteRow.voter, VoteRow.turbo_steps)
        )
        with self._reading() as session:
            return [preference.Tally(*row) for row in session.execute(query)]


def _check_voter(voter: str) -> None:
    """It comes from a browser's storage, where anything may stand."""
    if not (0 < len(voter) <= VOTER_CHARACTERS and voter.isascii() and voter.isprintable()):
        raise errors.DataError(
            f"the voter {voter[: VOTER_CHARACTERS + 1]!a} is not 1 to {VOTER_CHARACTERS} printable ASCII characters; "
            "give a random id that the browser keeps, such as 32 hex digits"
        )
