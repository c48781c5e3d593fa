"""Frontiers of a run and their points."""

import sqlalchemy as sa
from alembic import op

revision = "0002_frontiers"
down_revision = "0001_first_tables"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "frontiers",
        sa.Column("run_id", sa.String(length=12), nullable=False),
        sa.Column("costs", sa.String(), nullable=False),
        sa.Column("complete", sa.Boolean(), nullable=False),
        sa.Column("grid", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.id"], name="fk_frontiers_run_id_runs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "costs", name="pk_frontiers"),
    )
    op.create_table(
        "frontier_points",
        sa.Column("run_id", sa.String(length=12), nullable=False),
        sa.Column("costs", sa.String(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("solver", sa.String(), nullable=False),
        sa.Column("score", sa.Double(), nullable=False),
        sa.Column("bound", sa.Double(), nullable=False),
        sa.Column("gap", sa.Double(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("budgets", sa.JSON(), nullable=False),
        sa.Column("totals", sa.JSON(), nullable=False),
        sa.Column("places", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id", "costs"],
            ["frontiers.run_id", "frontiers.costs"],
            name="fk_frontier_points_run_id_costs_frontiers",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("run_id", "costs", "position", name="pk_frontier_points"),
    )
    op.create_index(
        "ix_frontier_points_run_id_costs_score", "frontier_points", ["run_id", "costs", "score"]
    )


def downgrade() -> None:
    op.drop_table("frontier_points")
    op.drop_table("frontiers")
