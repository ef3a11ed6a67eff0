"""Blind votes."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "votes",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("voter", sa.String(length=64), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("prompt", sa.JSON(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("turbo_version", sa.Text(), nullable=False),
        sa.Column("premium_version", sa.Text(), nullable=False),
        sa.Column("turbo_steps", sa.Integer(), nullable=False),
        sa.Column("premium_steps", sa.Integer(), nullable=False),
        sa.Column("guidance_scale", sa.Double(), nullable=False),
        sa.Column("turbo_side", sa.String(length=16), nullable=False),
        sa.Column("choice", sa.String(length=16), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name="fk_votes_key_id_api_keys"),
        sa.PrimaryKeyConstraint("id", name="pk_votes"),
    )
    op.create_index(
        "ix_votes_turbo_version_premium_version_voter_turbo_steps",
        "votes",
        ["turbo_version", "premium_version", "voter", "turbo_steps"],
    )
