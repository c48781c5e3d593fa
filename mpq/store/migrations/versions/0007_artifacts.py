"""Objects of submitted jobs by their digest, in chunks, and which runs need them."""

import sqlalchemy as sa
from alembic import op

revision = "0007_artifacts"
down_revision = "0006_api_tokens"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "artifacts",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_artifacts"),
    )
    op.create_index("ix_artifacts_used_at", "artifacts", ["used_at"])
    op.create_table(
        "artifact_chunks",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["digest"],
            ["artifacts.digest"],
            name="fk_artifact_chunks_digest_artifacts",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("digest", "position", name="pk_artifact_chunks"),
    )
    op.create_table(
        "run_artifacts",
        sa.Column("run_id", sa.String(length=12), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name="fk_run_artifacts_run_id_runs", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["digest"], ["artifacts.digest"], name="fk_run_artifacts_digest_artifacts"
        ),
        sa.PrimaryKeyConstraint("run_id", "digest", name="pk_run_artifacts"),
    )
    op.create_index("ix_run_artifacts_digest", "run_artifacts", ["digest"])


def downgrade() -> None:
    op.drop_table("run_artifacts")
    op.drop_table("artifact_chunks")
    op.drop_table("artifacts")
